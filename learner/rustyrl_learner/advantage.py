"""From a batch to what the update reads: normalised rows, values, advantages, targets."""

from __future__ import annotations

import torch

from rustyrl_learner.batch import Batch
from rustyrl_learner.gae import gae, next_values
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.normalizer import ObservationNormalizer
from rustyrl_learner.ppo import TrainingBatch

__all__ = ["training_batch"]


@torch.no_grad()
def training_batch(
    network: ActorCritic,
    normalizer: ObservationNormalizer | None,
    batch: Batch,
    gamma: float,
    gae_lambda: float,
    *,
    lagged: bool,
) -> TrainingBatch:
    """Evaluate the critic on every row and on every final observation in one pass, then `gae` (stop 7).

    Rows that held no agent are left out of the result. If the batch is ``lagged``, collected under an older version
    than the network's, the log-probability of its actions now is computed too.
    """
    steps, slots = batch.reward.shape
    width = batch.observation.shape[-1]
    rows = torch.cat([batch.observation.reshape(-1, width), batch.final_observation])
    if normalizer is not None:
        rows = normalizer.apply(rows)
    values = network.value(rows)
    count = (steps + 1) * slots
    value = values[:count].reshape(steps + 1, slots)
    future = next_values(value, batch.terminated, batch.truncated, batch.final_index, values[count:])
    ended = batch.terminated | batch.truncated
    advantage = gae(batch.reward, value[:-1], future, ended, batch.valid, gamma, gae_lambda)
    observation = rows[: steps * slots]
    action = batch.action.reshape(steps * slots, -1)
    mask = None if batch.action_mask is None else batch.action_mask.reshape(steps * slots, -1)
    behavior_log_prob = batch.behavior_log_prob.reshape(-1)
    flat = {
        "observation": observation,
        "action": action,
        "behavior_log_prob": behavior_log_prob,
        "proximal_log_prob": network.log_prob(network.policy(observation), action, mask)
        if lagged
        else behavior_log_prob,
        "advantage": advantage.reshape(-1),
        "value": value[:-1].reshape(-1),
        "value_target": (advantage + value[:-1]).reshape(-1),
    }
    valid = batch.valid.reshape(-1)
    if not bool(valid.all()):
        flat = {name: array[valid] for name, array in flat.items()}
        mask = None if mask is None else mask[valid]
    return TrainingBatch(**flat, action_mask=mask)
