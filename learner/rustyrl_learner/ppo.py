"""Proximal policy optimization: the loss as a pure function, and one update on one batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rustyrl.config import PPOConfig
from rustyrl_learner.adam import Optimizer
from rustyrl_learner.network import ActorCritic

__all__ = ["Losses", "TrainingBatch", "kl_estimate", "policy_loss", "ppo_update", "value_loss"]


MAX_IMPORTANCE = 2.0  # truncates the weight of what the version that collected it found unlikely


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """The valid steps of one batch, flattened: N rows, everything on the learner's device.

    observation: `[N, width]` float32, normalised
    action: `[N, A]` float32 raw samples, choices as whole numbers
    action_mask: `[N, M]` bool, what the masked parts of the action could be, or None
    behavior_log_prob: `[N]` float32, of the action under the version that chose it
    proximal_log_prob: `[N]` float32, of the action under the version that this update starts from
    advantage, value, value_target: `[N]` float32
    """

    observation: Tensor
    action: Tensor
    action_mask: Tensor | None
    behavior_log_prob: Tensor
    proximal_log_prob: Tensor
    advantage: Tensor
    value: Tensor
    value_target: Tensor

    def select(self, rows: Tensor) -> TrainingBatch:
        """The rows `[n]` int64 of the batch, copied."""
        return self._each(lambda array: array.index_select(0, rows))

    def slice(self, start: int, stop: int) -> TrainingBatch:
        """Rows ``start`` to ``stop`` of the batch, as views."""
        return self._each(lambda array: array[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> TrainingBatch:
        return TrainingBatch(
            change(self.observation),
            change(self.action),
            None if self.action_mask is None else change(self.action_mask),
            change(self.behavior_log_prob),
            change(self.proximal_log_prob),
            change(self.advantage),
            change(self.value),
            change(self.value_target),
        )


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


def ppo_update(
    network: ActorCritic,
    optimizer: Optimizer,
    batch: TrainingBatch,
    config: PPOConfig,
    learning_rate: float,
    generator: torch.Generator,
    on_minibatch: Callable[[], None] = lambda: None,
) -> Losses:
    """Run all epochs over one batch; returns the learning rate to go on with among the `Losses`.

    Args:
        network: changed in place.
        optimizer: over the network's parameters.
        batch: N valid steps.
        config: epochs, minibatch size, coefficients.
        learning_rate: the rate of the first epoch.
        generator: of the shuffles, on the CPU so that every device trains in the same order.
        on_minibatch: called after each optimiser step; may raise to abandon the update.

    Raises:
        FloatingPointError: naming the first loss or gradient that is not finite. The parameters are then
            what they were before that optimiser step.
    """
    count = batch.observation.shape[0]
    minibatches = max(1, round(count / config.minibatch_size))
    gradient = network.gradient()
    sums = torch.zeros(6, device=batch.observation.device)
    edges = [count * i // minibatches for i in range(minibatches + 1)]
    steps = epochs = 0
    first_ratio_error: Tensor | None = None
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=generator).to(batch.observation.device)
        epoch_kl = torch.zeros((), device=batch.observation.device)
        shuffled = batch.select(order)
        for start, stop in itertools.pairwise(edges):
            rows = shuffled.slice(start, stop)
            losses, log_prob = _take_gradient(network, gradient, rows, config)
            optimizer.step(learning_rate)
            if first_ratio_error is None:
                first_ratio_error = (log_prob - rows.behavior_log_prob).exp().sub(1).abs().max()
            sums += losses
            epoch_kl += losses[3]
            steps += 1
            on_minibatch()
        epochs += 1
        kl = epoch_kl.item() / minibatches
        if config.schedule == "kl":
            learning_rate = _adapt(learning_rate, kl, config)
        if config.stop_kl and kl > config.stop_kl:
            break
    policy, value, entropy, approx_kl, clipped, norm = (sums / steps).tolist()
    assert first_ratio_error is not None  # noqa: S101 - there is at least one minibatch
    error = float(first_ratio_error)
    return Losses(policy, value, entropy, approx_kl, clipped, norm, error, epochs, learning_rate)


def _take_gradient(
    network: ActorCritic, gradient: Tensor, batch: TrainingBatch, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Have the gradient of one minibatch, clipped; its losses and figures, and the log-probabilities."""
    outputs, value, traces = network.trace(batch.observation)
    leaves = [outputs.requires_grad_(), value.requires_grad_()]  # autograd is for the losses, networks have their own
    if network.log_std is not None:
        leaves.append(network.log_std)
    advantage = batch.advantage
    if config.normalize_advantage and len(advantage) > 1:
        deviation, mean = torch.std_mean(advantage)
        advantage = (advantage - mean) / (deviation + 1e-8)
    log_prob = network.log_prob(outputs, batch.action, batch.action_mask)
    log_ratio = log_prob - batch.proximal_log_prob
    ratio = log_ratio.exp()
    importance = (batch.proximal_log_prob - batch.behavior_log_prob).exp().clamp(max=MAX_IMPORTANCE)
    policy = policy_loss(ratio, importance, advantage, config.clip)
    critic = value_loss(value, batch.value, batch.value_target, config.value_clip)
    with torch.set_grad_enabled(config.entropy > 0):  # else it is a figure to look at only
        entropy = network.entropy(outputs, batch.action_mask).mean()
    loss = policy + config.value_coefficient * critic - config.entropy * entropy
    doutputs, dvalue, *dlog_std = torch.autograd.grad(loss, leaves)
    network.backward(traces, doutputs, dvalue)
    if network.log_std is not None and network.log_std.grad is not None:
        network.log_std.grad.copy_(dlog_std[0])
    norm = torch.linalg.vector_norm(gradient)
    with torch.no_grad():
        figures = torch.stack(
            [policy, critic, entropy, kl_estimate(log_ratio), clip_fraction(ratio, config.clip), norm]
        )
    _check_finite(network, norm, policy, critic, entropy)
    gradient.mul_((config.max_gradient_norm / (norm + 1e-6)).clamp_(max=1.0))
    return figures, log_prob.detach()


def _check_finite(network: ActorCritic, norm: Tensor, policy: Tensor, critic: Tensor, entropy: Tensor) -> None:
    if math.isfinite((norm + policy + critic + entropy).item()):  # a clipped row hides its loss from the gradients
        return
    for name, loss in (("policy loss", policy), ("value loss", critic), ("entropy", entropy)):
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the {name} is {loss.item()}")
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise FloatingPointError(f"the gradient of {name} is not finite")
    raise FloatingPointError(f"the gradient norm is {norm.item()}")


def _adapt(learning_rate: float, kl: float, config: PPOConfig) -> float:
    """Half the target is too timid, twice is too bold (Schulman et al. 2017, section 4, applied to the rate)."""
    if kl > 2 * config.target_kl:
        learning_rate /= 1.5
    elif kl < 0.5 * config.target_kl:
        learning_rate *= 1.5
    return min(max(learning_rate, config.min_learning_rate), config.max_learning_rate)
