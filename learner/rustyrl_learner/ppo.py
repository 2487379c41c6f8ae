"""Proximal policy optimization: the loss as a pure function, and one update on one batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor

from rustyrl.config import PPOConfig
from rustyrl_learner.adam import Adam, Optimizer
from rustyrl_learner.compiled import FIGURES, Arrays, CompiledUpdate
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.rows import (
    APPROX_KL,
    ENTROPY,
    FIRST_RATIO_ERROR,
    GRADIENT_NORM,
    POLICY_LOSS,
    VALUE_LOSS,
    Minibatch,
    TrainingBatch,
)

if TYPE_CHECKING:
    from rustyrl_learner.graphs import EpochGraphs

__all__ = ["Losses", "TakeEpoch", "kl_estimate", "minibatch_gradient", "policy_gradient", "policy_loss", "ppo_update"]
__all__ += ["run_epoch", "value_gradient", "value_loss"]

# Of an order, a learning rate and `on_minibatch`, as `run_epoch` takes them, the figures of an epoch.
TakeEpoch = Callable[[Tensor, float, Callable[[], None]], Tensor]
AT_ONCE = 1 << 30  # rows times parameters that compiled code takes at once: a twentieth of a second on two cores
MAX_IMPORTANCE = 2.0  # truncates the weight of what the version that collected it found unlikely


@dataclass(frozen=True, slots=True)
class Losses:
    """What one update did, averaged over its minibatches; ``learning_rate`` is the one to go on with.

    approx_kl, clip_fraction: against the version that the update started from.
    first_ratio_error: the largest |probability now / at collection - 1| in the first minibatch, before any step:
    0 up to rounding at lag 0.
    """

    policy_loss: float
    value_loss: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    gradient_norm: float
    first_ratio_error: float
    epochs: int
    learning_rate: float


def policy_loss(ratio: Tensor, importance: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped surrogate, negated and averaged, with its two roles of the old policy kept apart.

    Schulman et al. 2017, equation 7, where ``importance`` is 1. At a policy lag the update must not move far from
    where it starts, while the samples are weighed by who drew them: Hilton, Cobbe and Schulman 2021, 'Batch
    size-invariance for policy optimization', equation 2.

    Args:
        ratio: `[N]` probability of the action now over that when the update started.
        importance: `[N]` probability when the update started over that at collection; 1 at lag 0.
        advantage: `[N]`.
        clip: epsilon.
    """
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(importance * torch.minimum(ratio * advantage, clipped * advantage)).mean()


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """Half the mean squared error, with the change of the value clipped if ``clip`` is positive.

    Args:
        value: `[N]` now.
        old_value: `[N]` when the batch was prepared.
        target: `[N]` advantage + old value.
        clip: the largest change that is rewarded; 0 switches clipping off.
    """
    error = (value - target).square()
    if clip > 0:
        moved = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (moved - target).square())
    return 0.5 * error.mean()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """KL(old || new) from samples of the old policy: the k3 estimator (Schulman, 'Approximating KL Divergence')."""
    return (torch.expm1(log_ratio) - log_ratio).mean()


def clip_fraction(ratio: Tensor, clip: float) -> Tensor:
    """The share of samples whose probability has left the range within which it is rewarded."""
    return ((ratio - 1).abs() > clip).float().mean()


def policy_gradient(ratio: Tensor, importance: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """`[N]`: `policy_loss`, before it is negated and averaged, by the log-probability of each action."""
    gain, limit = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return gain.masked_fill(gain > limit, 0.0).mul_(importance)  # where this is nan, the loss is, too


def value_gradient(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """`[N]`: `value_loss`, before it is averaged, by each value."""
    error = value - target
    if clip > 0:
        change = value - old_value
        clipped = old_value + change.clamp(-clip, clip) - target
        error.masked_fill_((change.abs() > clip) & (clipped.abs() > error.abs()), 0.0)
    return error


def ppo_update(
    network: ActorCritic,
    optimizer: Optimizer,
    batch: TrainingBatch,
    config: PPOConfig,
    learning_rate: float,
    generator: torch.Generator,
    on_minibatch: Callable[[], None] = lambda: None,
    graphs: EpochGraphs | None = None,
) -> Losses:
    """Run all epochs over one batch; returns the learning rate to go on with among the `Losses`.

    Args:
        network: changed in place.
        optimizer: over the network's parameters.
        batch: N valid steps.
        config: epochs, minibatch size, coefficients.
        learning_rate: the rate of the first epoch.
        generator: of the shuffles, on the CPU so that every device trains in the same order.
        on_minibatch: called after each optimiser step, or after several that are one piece of work; may raise to
            abandon the update.
        graphs: of this network and optimiser, if epochs are to be replayed on a GPU.

    Raises:
        FloatingPointError: naming the first loss or gradient that is not finite. On the CPU the parameters are then
            what they were before that optimiser step; elsewhere it is looked for once an epoch.
    """
    if graphs is not None:
        take = graphs.prepare(batch, config)
    else:
        take = _compiled(network, optimizer, batch, config) or partial(run_epoch, network, optimizer, batch, config)
    order = _shuffled(batch, generator)
    numbers: list[list[float]] = []
    for epoch in range(config.epochs):
        figures = take(order, learning_rate, on_minibatch)
        if epoch + 1 < config.epochs:
            order = _shuffled(batch, generator)  # while a device is at the epoch, which to look at numbers waits for
        numbers.append(figures.tolist())
        if not math.isfinite(numbers[-1][GRADIENT_NORM]):
            _refuse(network, numbers[-1])
        kl = numbers[-1][APPROX_KL]
        if config.schedule == "kl":
            learning_rate = _adapt(learning_rate, kl, config)
        if config.stop_kl and kl > config.stop_kl:
            break
    means = (math.fsum(column) / len(numbers) for column in zip(*numbers, strict=True))
    policy, value, entropy, approx_kl, clipped, norm, _ = means
    first_ratio_error = numbers[0][FIRST_RATIO_ERROR]
    return Losses(policy, value, entropy, approx_kl, clipped, norm, first_ratio_error, len(numbers), learning_rate)


def _shuffled(batch: TrainingBatch, generator: torch.Generator) -> Tensor:
    """`[N]` int64: the order of an epoch, on the batch's device once that comes to it."""
    device, order = batch.advantage.device, torch.randperm(len(batch.advantage), generator=generator)
    return order.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else order.to(device)


def run_epoch(
    network: ActorCritic,
    optimizer: Optimizer,
    batch: TrainingBatch,
    config: PPOConfig,
    order: Tensor,
    learning_rate: float | Tensor,
    on_minibatch: Callable[[], None] = lambda: None,
    *,
    watched: bool | None = None,
) -> Tensor:
    """Take an optimiser step for each minibatch of a batch.

    Args:
        network: changed in place.
        optimizer: over the network's parameters.
        batch: N rows.
        config: minibatch size, coefficients.
        order: `[N]` int64, of the rows.
        learning_rate: a number, or `[]` on the device.
        on_minibatch: called after each step, or after several that compiled code takes.
        watched: whether each gradient is looked at before its step, which waits for the device; on a CPU it is.

    Returns:
        `[7]`, means over its minibatches, and the largest error of the first one's ratios; see `rustyrl_learner.rows`.

    Raises:
        FloatingPointError: where gradients are looked at.
    """
    watched = batch.advantage.device.type == "cpu" if watched is None else watched
    if (take := _compiled(network, optimizer, batch, config)) is not None:
        return take(order, float(learning_rate), on_minibatch)
    edges = _edges(len(batch.advantage), config)
    gradient = network.flat()[1].tensor
    rows = batch.select(order)
    importance = _importance(rows)
    seen: list[Minibatch] = []
    for start, stop in itertools.pairwise(edges):
        part, weight = rows.slice(start, stop), importance[start:stop]
        result = minibatch_gradient(network, part, weight, config)
        if watched:
            if not math.isfinite(norm := result.gradient_norm.item()):  # where a loss is not, this is not either
                _refuse(network, _figures(part, weight, [result], config).tolist())
            if (scale := config.max_gradient_norm / (norm + 1e-6)) < 1:
                gradient.mul_(scale)
        else:
            gradient.mul_((config.max_gradient_norm / (result.gradient_norm + 1e-6)).clamp_(max=1.0))
        optimizer.step(learning_rate)
        seen.append(result)
        on_minibatch()
    return _figures(rows, importance, seen, config)


def _edges(count: int, config: PPOConfig) -> list[int]:
    """Where each minibatch of so many rows begins, and where the last one ends."""
    minibatches = max(1, round(count / config.minibatch_size))
    return [count * i // minibatches for i in range(minibatches + 1)]


def _compiled(network: ActorCritic, optimizer: Optimizer, batch: TrainingBatch, config: PPOConfig) -> TakeEpoch | None:
    """What takes the epochs of this batch by compiled code; None where torch takes them."""
    if network.compiled is None or not isinstance(optimizer, Adam):
        return None
    rows = network.compiled.arrays(batch, _importance(batch))
    return partial(_compiled_epoch, network, network.compiled, optimizer, batch, rows, config)


def _compiled_epoch(
    network: ActorCritic,
    compiled: CompiledUpdate,
    adam: Adam,
    batch: TrainingBatch,
    rows: Arrays,
    config: PPOConfig,
    order: Tensor,
    learning_rate: float,
    on_minibatch: Callable[[], None],
) -> Tensor:
    """`run_epoch` by `CompiledUpdate.steps`, as many minibatches at a time as do not keep a stop waiting."""
    shuffled, edges = order.numpy().astype(np.int32), np.array(_edges(len(order), config), np.int32)
    minibatches = len(edges) - 1
    each = max(1, minibatches * AT_ONCE // (len(shuffled) * network.flat()[0].tensor.numel()))
    found = np.empty((minibatches, FIGURES), np.float32)
    for first in range(0, minibatches, each):
        some = edges[first : first + each + 1]
        taken, of_each, log_prob = compiled.steps(rows, config, shuffled, some, adam, learning_rate)
        if taken < len(some) - 1:
            _refuse(network, of_each[taken].tolist())
        if not first:
            error = _ratio_error(torch.from_numpy(log_prob), batch.behavior_log_prob[order[: edges[1]]])
        found[first : first + each] = of_each
        on_minibatch()
    means = np.diff(edges).astype(np.float32) @ found / len(shuffled)
    means[ENTROPY], means[GRADIENT_NORM] = found[:, ENTROPY].mean(), found[:, GRADIENT_NORM].mean()
    return torch.cat([torch.from_numpy(means), error[None]])


def _importance(batch: TrainingBatch) -> Tensor:
    """`[N]`, see `policy_loss`."""
    return (batch.proximal_log_prob - batch.behavior_log_prob).exp_().clamp_(max=MAX_IMPORTANCE)


@torch.no_grad()
def minibatch_gradient(network: ActorCritic, rows: TrainingBatch, importance: Tensor, config: PPOConfig) -> Minibatch:
    """Write the gradient of the whole loss on N rows into the network's.

    By hand from end to end: autograd and the figures, which can wait for the end of the epoch, took longer than all
    else where minibatches are small.

    Args:
        network: its parameters are only read.
        rows: of the minibatch.
        importance: `[N]`, see `policy_loss`.
        config: coefficients.
    """
    parameters, into = network.flat()
    if network.compiled is not None:
        return network.compiled.gradient(rows, importance, config)
    count = len(importance)
    advantage = rows.advantage
    if config.normalize_advantage and count > 1:
        deviation, mean = torch.std_mean(advantage)
        advantage = (advantage - mean) / (deviation + 1e-8)
    seen: dict[str, Tensor] = {}
    distribution = network.distribution

    def by_outputs(outputs: Tensor) -> Tensor:
        log_prob, entropy, kept = distribution.trace(outputs, parameters.log_std, rows.action, rows.action_mask)
        seen["log_prob"], seen["entropy"] = log_prob, entropy.mean()
        ratio = (log_prob - rows.proximal_log_prob).exp_()
        dlog_prob = policy_gradient(ratio, importance, advantage, config.clip).div_(-count)
        return distribution.backward(kept, dlog_prob, -config.entropy / count, into.log_std)

    def by_value(value: Tensor) -> Tensor:
        seen["value"] = value
        dvalue = value_gradient(value, rows.value, rows.value_target, config.value_clip)
        return dvalue.mul_(config.value_coefficient / count)

    network.take_gradient(rows.observation, by_outputs, by_value)
    return Minibatch(advantage, **seen, gradient_norm=torch.linalg.vector_norm(into.tensor))


@torch.no_grad()
def _figures(rows: TrainingBatch, importance: Tensor, seen: list[Minibatch], config: PPOConfig) -> Tensor:
    """`[7]`, the means over the rows of these minibatches, and the largest error of the first one's ratios."""
    advantage, log_prob, value = (
        torch.cat([getattr(result, name) for result in seen]) for name in ("advantage", "log_prob", "value")
    )
    log_ratio = log_prob - rows.proximal_log_prob
    ratio = log_ratio.exp()
    return torch.stack(
        [
            policy_loss(ratio, importance, advantage, config.clip),
            value_loss(value, rows.value, rows.value_target, config.value_clip),
            torch.stack([result.entropy for result in seen]).mean(),
            kl_estimate(log_ratio),
            clip_fraction(ratio, config.clip),
            torch.stack([result.gradient_norm for result in seen]).mean(),
            _ratio_error(log_prob, rows.behavior_log_prob[: len(seen[0].log_prob)]),
        ]
    )


def _ratio_error(log_prob: Tensor, behavior_log_prob: Tensor) -> Tensor:
    """`[]`: the largest |probability now / at collection - 1| of the first rows, by those that are given of them."""
    return (log_prob[: len(behavior_log_prob)] - behavior_log_prob).expm1_().abs_().max()


def _refuse(network: ActorCritic, figures: list[float]) -> NoReturn:
    """Raise `FloatingPointError` for the first loss of these that is not finite, or the newest gradient, or a norm."""
    for name, index in (("policy loss", POLICY_LOSS), ("value loss", VALUE_LOSS), ("entropy", ENTROPY)):
        if not math.isfinite(figures[index]):
            raise FloatingPointError(f"the {name} is {figures[index]}")
    for name, gradient in network.flat()[1].views.items():
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(f"the gradient of {name} is not finite")
    raise FloatingPointError(f"the gradient norm is {figures[GRADIENT_NORM]}")


def _adapt(learning_rate: float, kl: float, config: PPOConfig) -> float:
    """Half the target is too timid, twice is too bold (Schulman et al. 2017, section 4, applied to the rate)."""
    if kl > 2 * config.target_kl:
        learning_rate /= 1.5
    elif kl < 0.5 * config.target_kl:
        learning_rate *= 1.5
    return min(max(learning_rate, config.min_learning_rate), config.max_learning_rate)
