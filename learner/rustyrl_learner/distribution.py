"""Log-probability and entropy of the action distributions, as pure functions of a network's outputs.

The actors' twin is ``rustyrl_actors/sampling.py``; a parity test holds them together for every kind of action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from rustyrl.spec import ActionBlock, action_blocks
from rustyrl.weights import PolicySpec

__all__ = [
    "ActionDistribution",
    "box_entropy",
    "box_log_prob",
    "choice_entropy",
    "choice_log_prob",
    "squash_entropy",
    "squash_log_derivative",
]

LOG_2_PI = math.log(2 * math.pi)
MASKED_LOGIT = -1e9  # far below any logit, its exponential is 0, and products with 0 stay finite
QUADRATURE_POINTS = 32


def box_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density `[N]` of raw actions `[N, A]` under a diagonal Gaussian with mean `[N, A]`, log_std `[A]`."""
    scaled = (action - mean) * torch.exp(-log_std)
    return -0.5 * (scaled * scaled).sum(-1) - log_std.sum() - 0.5 * LOG_2_PI * mean.shape[-1]


def box_entropy(log_std: Tensor) -> Tensor:
    """Entropy `[]` in nats of a diagonal Gaussian, which does not depend on its mean."""
    return log_std.sum() + 0.5 * (1 + LOG_2_PI) * log_std.shape[-1]


def squash_log_derivative(raw: Tensor) -> Tensor:
    """log(1 - tanh(u)^2), elementwise, as 2 (log 2 - u - softplus(-2 u)), which keeps small numbers at large |u|."""
    return 2 * (math.log(2) - raw - nn.functional.softplus(-2 * raw))


def squash_entropy(mean: Tensor, log_std: Tensor, points: int = QUADRATURE_POINTS) -> Tensor:
    """What a tanh adds to the entropy `[N]` of a diagonal Gaussian: E[log(1 - tanh(u)^2)], summed over `[N, A]`.

    There is no closed form; Gauss-Hermite quadrature in each dimension gives it without noise.
    """
    nodes, weights = _quadrature(points, mean.dtype, mean.device)
    raw = mean[..., None] + log_std.exp()[:, None] * nodes
    return (squash_log_derivative(raw) @ weights).sum(-1)


@lru_cache
def _quadrature(points: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the expectation under a standard normal."""
    node, weight = np.polynomial.hermite_e.hermegauss(points)
    nodes = torch.as_tensor(node, dtype=dtype, device=device)
    return nodes, torch.as_tensor(weight / weight.sum(), dtype=dtype, device=device)


def choice_log_prob(logits: Tensor, choice: Tensor) -> Tensor:
    """Log-probability `[N]` of k independent choices `[N, k]` int64 under logits `[N, k, n]`."""
    return torch.log_softmax(logits, -1).gather(-1, choice[..., None]).squeeze(-1).sum(-1)


def choice_entropy(logits: Tensor) -> Tensor:
    """Entropy `[N]` in nats of k independent categorical distributions with logits `[N, k, n]`."""
    log_prob = torch.log_softmax(logits, -1)
    return -(log_prob.exp() * log_prob).sum((-1, -2))


class ActionDistribution:
    """What a policy's outputs mean as a distribution over its whole action: a product over the blocks of its parts."""

    def __init__(self, spec: PolicySpec) -> None:
        self._blocks = action_blocks(spec.action)
        self._squashed = spec.box == "squashed"
        self._deviation: dict[int, slice] = {}  # of log_std, by block
        self._log_half: dict[int, float] = {}  # log of the half widths of a squashed box, summed
        start = 0
        for index, block in enumerate(self._blocks):
            if block.kind == "box":
                self._deviation[index] = slice(start, start + block.groups)
                start += block.groups
                part = spec.action[block.part]
                half = (np.array(part.high, np.float32) - np.array(part.low, np.float32)) * np.float32(0.5)
                self._log_half[index] = float(np.log(half).sum()) if self._squashed else 0.0

    def log_prob(self, outputs: Tensor, log_std: Tensor | None, action: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probability `[N]` of raw actions.

        Args:
            outputs: `[N, outputs]` of the policy network.
            log_std: `[boxes]`, None without boxes.
            action: `[N, A]` float32, all parts joined; choices as whole numbers.
            mask: `[N, M]` bool, the masks of the masked parts joined; None without any.
        """
        terms = []
        for index, block in enumerate(self._blocks):
            part = action[:, block.column]
            if block.kind == "box":
                deviation = _present(log_std)[self._deviation[index]]
                term = box_log_prob(outputs[:, block.output], deviation, part)
                if self._squashed:
                    term = term - squash_log_derivative(part).sum(-1) - self._log_half[index]
            else:
                term = choice_log_prob(_logits(outputs, block, mask), part.long())
            terms.append(term)
        return _sum(terms)

    def entropy(self, outputs: Tensor, log_std: Tensor | None, mask: Tensor | None) -> Tensor:
        """Entropy in nats, `[N]`, or `[]` where it is the same for every row; arguments as of `log_prob`."""
        terms = []
        for index, block in enumerate(self._blocks):
            if block.kind == "box":
                deviation = _present(log_std)[self._deviation[index]]
                term = box_entropy(deviation)
                if self._squashed:
                    term = term + squash_entropy(outputs[:, block.output], deviation) + self._log_half[index]
            else:
                term = choice_entropy(_logits(outputs, block, mask))
            terms.append(term)
        return _sum(terms)


def _logits(outputs: Tensor, block: ActionBlock, mask: Tensor | None) -> Tensor:
    logits = outputs[:, block.output]
    if block.mask is not None:
        logits = logits.masked_fill(~_present(mask)[:, block.mask], MASKED_LOGIT)
    return logits.reshape(-1, block.groups, block.choices)


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("the action has boxes or masks, and their deviations or masks are missing")
    return tensor


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
