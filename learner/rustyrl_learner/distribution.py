"""Log-probability and entropy of the action distributions, as pure functions of a network's outputs.

The actors' twin is ``rustyrl_actors/sampling.py``; a parity test holds them together for every kind of action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    nodes, weights = quadrature(mean.dtype, mean.device, points)
    raw = mean[..., None] + log_std.exp()[:, None] * nodes
    return (squash_log_derivative(raw) @ weights).sum(-1)


@lru_cache
def quadrature(dtype: torch.dtype, device: torch.device, points: int = QUADRATURE_POINTS) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True, slots=True)
class BoxTrace:
    """What the gradient of a box needs, see `ActionDistribution.trace`.

    scaled: `[A, N]` the action's distance from its mean in deviations
    log_std: `[A]`
    mean: `[A, N]`
    """

    scaled: Tensor
    log_std: Tensor
    mean: Tensor


@dataclass(frozen=True, slots=True)
class ChoiceTrace:
    """What the gradient of k choices needs, see `ActionDistribution.trace`.

    probability, log_probability: `[k, n, N]`
    chosen: `[k, 1, N]` int64
    entropy: `[k, 1, N]`
    """

    probability: Tensor
    log_probability: Tensor
    chosen: Tensor
    entropy: Tensor


class ActionDistribution:
    """What a policy's outputs mean as a distribution over its whole action: a product over the blocks of its parts.

    action: its parts
    blocks: of the action, each box with where its deviations are in log_std
    squashed: whether boxes are
    log_half: the log of the half widths of squashed boxes, summed
    """

    def __init__(self, spec: PolicySpec) -> None:
        self.action = spec.action
        self.blocks: list[tuple[ActionBlock, slice | None]] = []
        self.squashed = spec.box == "squashed"
        self.log_half = 0.0
        start = 0
        for block in action_blocks(spec.action):
            deviations = None
            if block.kind == "box":
                deviations = slice(start, start + block.groups)
                start += block.groups
                part = spec.action[block.part]
                half = (np.array(part.high, np.float32) - np.array(part.low, np.float32)) * np.float32(0.5)
                self.log_half += float(np.log(half).sum()) if self.squashed else 0.0
            self.blocks.append((block, deviations))

    def log_prob(self, outputs: Tensor, log_std: Tensor | None, action: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probability `[N]` of raw actions.

        Args:
            outputs: `[N, outputs]` of the policy network.
            log_std: `[boxes]`, None without boxes.
            action: `[N, A]` float32, all parts joined; choices as whole numbers.
            mask: `[N, M]` bool, the masks of the masked parts joined; None without any.
        """
        terms = []
        for block, deviations in self.blocks:
            part = action[:, block.column]
            if deviations is not None:
                term = box_log_prob(outputs[:, block.output], _present(log_std)[deviations], part)
                if self.squashed:
                    term = term - squash_log_derivative(part).sum(-1)
            else:
                term = choice_log_prob(_logits(outputs, block, mask), part.long())
            terms.append(term)
        return _sum(terms) - self.log_half

    def trace(
        self, outputs: Tensor, log_std: Tensor | None, action: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, list[BoxTrace | ChoiceTrace]]:
        """`log_prob`, `entropy`, and what `backward` needs of both.

        Rows come last here, so that sums over choices run along whole rows: log_softmax over two choices of 4096 rows
        takes a tenth of the time.
        """
        log_probs, entropies, traces = [], [], list[BoxTrace | ChoiceTrace]()
        for block, deviations in self.blocks:
            output, part = outputs[:, block.output].T, action[:, block.column].T
            if deviations is not None:
                deviation = _present(log_std)[deviations]
                scaled = (part - output) * torch.exp(-deviation)[:, None]
                log_prob = -0.5 * scaled.square().sum(0) - (deviation.sum() + 0.5 * LOG_2_PI * len(deviation))
                entropy = box_entropy(deviation)
                if self.squashed:
                    log_prob = log_prob - squash_log_derivative(part).sum(0)
                    entropy = entropy + squash_entropy(output.T, deviation)
                traces.append(BoxTrace(scaled, deviation, output))
            else:
                if block.mask is not None:
                    output = output.masked_fill(~_present(mask)[:, block.mask].T, MASKED_LOGIT)
                log_odds = torch.log_softmax(output.reshape(block.groups, block.choices, -1), 1)
                odds, chosen = log_odds.exp(), part.long()[:, None]
                of_each = (odds * log_odds).sum(1, keepdim=True).neg_()
                log_prob, entropy = _total(log_odds.gather(1, chosen)), _total(of_each)
                traces.append(ChoiceTrace(odds, log_odds, chosen, of_each))
            log_probs.append(log_prob)
            entropies.append(entropy)
        return _sum(log_probs) - self.log_half, _sum(entropies) + self.log_half, traces

    def backward(
        self, traces: Sequence[BoxTrace | ChoiceTrace], dlog_prob: Tensor, dentropy: float, dlog_std: Tensor | None
    ) -> Tensor:
        """The gradient `[N, outputs]` of the outputs.

        Args:
            traces: of `trace`.
            dlog_prob: `[N]`, the loss by the log-probability of each row.
            dentropy: the loss by the entropy of any row.
            dlog_std: `[boxes]`, written: the gradient of the deviations' logarithms.
        """
        parts = []
        for trace, (_, deviations) in zip(traces, self.blocks, strict=True):
            if isinstance(trace, BoxTrace):
                doutput, ddeviation = _box_gradient(trace, dlog_prob, dentropy, squashed=self.squashed)
                _present(dlog_std)[deviations] = ddeviation
            else:
                doutput = _choice_gradient(trace, dlog_prob, dentropy)
            parts.append(doutput)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).T

    def entropy(self, outputs: Tensor, log_std: Tensor | None, mask: Tensor | None) -> Tensor:
        """Entropy in nats, `[N]`, or `[]` where it is the same for every row; arguments as of `log_prob`."""
        terms = []
        for block, deviations in self.blocks:
            if deviations is not None:
                deviation = _present(log_std)[deviations]
                term = box_entropy(deviation)
                if self.squashed:
                    term = term + squash_entropy(outputs[:, block.output], deviation)
            else:
                term = choice_entropy(_logits(outputs, block, mask))
            terms.append(term)
        return _sum(terms) + self.log_half


def _box_gradient(trace: BoxTrace, dlog_prob: Tensor, dentropy: float, *, squashed: bool) -> tuple[Tensor, Tensor]:
    """By the mean `[A, N]` and by the logarithm of the deviation `[A]`."""
    scaled, deviation = trace.scaled, trace.log_std
    dmean = scaled * (dlog_prob * torch.exp(-deviation)[:, None])
    ddeviation = (scaled.square() - 1) @ dlog_prob + dentropy * scaled.shape[1]
    if squashed and dentropy:  # the slope of log(1 - tanh(u)^2) is -2 tanh(u), with u = mean + deviation * node
        nodes, weights = quadrature(scaled.dtype, scaled.device)
        spread = deviation.exp()[:, None] * nodes  # [A, points]
        slope = -2 * dentropy * torch.tanh(trace.mean[..., None] + spread[:, None]) * weights
        dmean = dmean + slope.sum(-1)
        ddeviation = ddeviation + (slope * spread[:, None]).sum((1, 2))
    return dmean, ddeviation


def _choice_gradient(trace: ChoiceTrace, dlog_prob: Tensor, dentropy: float) -> Tensor:
    """By the logits `[k n, N]`; 0 for those that are masked, whose probability is 0."""
    by_each = dlog_prob
    if dentropy:
        by_each = dlog_prob + dentropy * (trace.log_probability + trace.entropy)
    dlogits = trace.probability * -by_each
    return dlogits.scatter_add_(1, trace.chosen, dlog_prob.expand_as(trace.chosen)).flatten(0, 1)


def _total(of_each: Tensor) -> Tensor:
    """`[N]`: the sum over the k choices of `[k, 1, N]`."""
    return of_each.view(-1) if len(of_each) == 1 else of_each.sum((0, 1))


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
