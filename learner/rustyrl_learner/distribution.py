"""Log-probability and entropy of the action distributions, as pure functions of a network's outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["box_entropy", "box_log_prob", "discrete_entropy", "discrete_log_prob"]

LOG_2_PI = math.log(2 * math.pi)


def box_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density `[N]` of raw actions `[N, A]` under a diagonal Gaussian with mean `[N, A]`, log_std `[A]`."""
    scaled = (action - mean) * torch.exp(-log_std)
    return -0.5 * (scaled * scaled).sum(-1) - log_std.sum() - 0.5 * LOG_2_PI * mean.shape[-1]


def box_entropy(log_std: Tensor) -> Tensor:
    """Entropy `[]` in nats of a diagonal Gaussian, which does not depend on its mean."""
    return log_std.sum() + 0.5 * (1 + LOG_2_PI) * log_std.shape[-1]


def discrete_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability `[N]` of the choices `[N]` int64 under logits `[N, A]`."""
    return torch.log_softmax(logits, -1).gather(-1, action[:, None]).squeeze(-1)


def discrete_entropy(logits: Tensor) -> Tensor:
    """Entropy `[N]` in nats of the categorical distributions with logits `[N, A]`."""
    log_prob = torch.log_softmax(logits, -1)
    return -(log_prob.exp() * log_prob).sum(-1)
