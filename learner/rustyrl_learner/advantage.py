"""From a batch to what the update reads: normalised rows, values, advantages, targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rustyrl.config import PPOConfig
from rustyrl_learner.batch import Batch
from rustyrl_learner.gae import gae, next_values
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.normalizer import ObservationNormalizer, RewardNormalizer, ValueNormalizer
from rustyrl_learner.rows import TrainingBatch
from rustyrl_learner.vtrace import vtrace

__all__ = ["batch_figures", "training_batch", "uses_vtrace"]


def uses_vtrace(ppo: PPOConfig, max_policy_lag: int) -> bool:
    """Whether batches of such a lag are corrected for it."""
    return ppo.vtrace == "on" or (ppo.vtrace == "auto" and max_policy_lag > 1)


@torch.no_grad()
def training_batch(
    network: ActorCritic,
    batch: Batch,
    ppo: PPOConfig,
    *,
    normalizer: ObservationNormalizer | None = None,
    rewards: RewardNormalizer | None = None,
    values: ValueNormalizer | None = None,
    lagged: bool = False,
    corrected: bool = False,
) -> TrainingBatch:
    """Evaluate the critic on every row and on every final observation in one pass, then `gae` or `vtrace` (stop 7).

    Rows that held no agent are left out of the result.

    Args:
        network: its critic's last layer is changed if ``values`` learn, so that it says the same as before.
        batch: as collected.
        ppo: discounts and truncations.
        normalizer: of observations; only read.
        rewards: learn the batch's rewards first.
        values: learn the batch's value targets; ``value`` and ``value_target`` are then in the critic's units.
        lagged: the batch was collected under an older version than the network's, so that the log-probability of its
            actions now is to be computed too.
        corrected: use `vtrace`, for which it must be ``lagged``.
    """
    steps, slots = batch.reward.shape
    width = batch.observation.shape[-1]
    rows = torch.cat([batch.observation.reshape(-1, width), batch.final_observation])
    if normalizer is not None:
        rows = normalizer.apply(rows)
    action = batch.action.reshape(steps * slots, -1)
    mask = None if batch.action_mask is None else batch.action_mask.reshape(steps * slots, -1)
    behavior = batch.behavior_log_prob.reshape(-1)
    said, proximal = network.evaluate(rows, action, mask) if lagged else (network.value(rows), behavior)
    if values is not None:
        said = values.to_reward_units(said)
    count = (steps + 1) * slots
    value = said[:count].reshape(steps + 1, slots)
    future = next_values(value, batch.terminated, batch.truncated, batch.final_index, said[count:])
    ended = batch.terminated | batch.truncated
    reward = batch.reward
    if rewards is not None:
        rewards.fold(reward, ended, batch.valid, batch.fresh, ppo.gamma)
        reward = rewards.apply(reward)
    observation = rows[: steps * slots]
    if corrected:
        importance = (proximal - behavior).exp().reshape(steps, slots)
        discounts, limits = (ppo.gamma, ppo.gae_lambda), (ppo.vtrace_rho, ppo.vtrace_c)
        advantage, target = vtrace(reward, value[:-1], future, ended, batch.valid, importance, *discounts, *limits)
    else:
        advantage = gae(reward, value[:-1], future, ended, batch.valid, ppo.gamma, ppo.gae_lambda)
        target = advantage + value[:-1]
    flat = {
        "observation": observation,
        "action": action,
        "behavior_log_prob": behavior,
        "proximal_log_prob": proximal,
        "advantage": advantage.reshape(-1),
        "value": value[:-1].reshape(-1),
        "value_target": target.reshape(-1),
    }
    valid = batch.valid.reshape(-1)
    if not bool(valid.all()):
        flat = {name: array[valid] for name, array in flat.items()}
        mask = None if mask is None else mask[valid]
    if values is not None:
        values.fold(flat["value_target"], *network.value_head)
        flat |= {name: values.to_critic_units(flat[name]) for name in ("value", "value_target")}
    return TrainingBatch(**flat, action_mask=mask)


@torch.no_grad()
def batch_figures(rows: TrainingBatch, network: ActorCritic, values: ValueNormalizer | None = None) -> dict[str, float]:
    """What an update starts from, by the names in docs/metrics.md.

    Raises:
        FloatingPointError: naming the first tensor of the rows that is not finite.
    """
    target, value = rows.value_target.double(), rows.value.double()
    spread = target.var(correction=0)
    unexplained = (target - value).var(correction=0)
    importance = (rows.proximal_log_prob - rows.behavior_log_prob).double().exp()
    figures: dict[str, Tensor] = {
        "explained_variance": torch.where(spread > 0, 1 - unexplained / spread, 0.0),  # of nothing, nothing
        "value_mean": value.mean(),
        "value_target_mean": target.mean(),
        "value_target_std": spread.sqrt(),
        "advantage_std": rows.advantage.std(correction=0),
        "importance_mean": importance.mean(),
        "importance_max": importance.max(),
    }
    if values is not None:
        for name in ("value_mean", "value_target_mean"):
            figures[name] = values.to_reward_units(figures[name])
        figures["value_target_std"] = figures["value_target_std"] * values.deviation
    if network.log_std is not None:
        figures["action_std"] = network.log_std.exp().mean()
    numbers = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
    if not all(math.isfinite(number) for name, number in numbers.items() if name != "explained_variance"):
        _name_not_finite(rows)  # or finite numbers whose squares are not
    return numbers


def _name_not_finite(rows: TrainingBatch) -> None:
    for name in ("observation", "value", "value_target", "advantage", "proximal_log_prob", "behavior_log_prob"):
        wrong = getattr(rows, name).isfinite().logical_not_()
        if wrong.any():
            first = getattr(rows, name)[wrong][0].item()
            raise FloatingPointError(
                f"tensor {name} of the batch holds {first} ({int(wrong.sum())} of {wrong.numel()})"
            )
