"""V-trace: advantages and value targets of one policy from what an older one did."""

from __future__ import annotations

import torch
from torch import Tensor

from rustyrl_learner.gae import discounted_sum

__all__ = ["vtrace"]


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    ended: Tensor,
    valid: Tensor,
    importance: Tensor,
    gamma: float,
    trace_lambda: float,
    largest_rho: float,
    largest_c: float,
) -> tuple[Tensor, Tensor]:
    """Espeholt et al. 2018, 'IMPALA', equation 1, with the lambda of its remark 2.

    The value target is ``v_t = V_t + rho_t delta_t + gamma c_t (v_{t+1} - V_{t+1})`` with
    ``delta_t = r_t + gamma V_next_t - V_t``, ``rho_t = min(largest_rho, importance_t)`` and
    ``c_t = lambda min(largest_c, importance_t)``. The advantage is ``delta_t + gamma lambda (v_{t+1} - V_{t+1})``. With
    lambda 1 that is the paper's ``r_t + gamma v_{t+1} - V_t``, without its rho_t, which belongs into the policy loss.
    With every importance 1 it is that of `gae`, and ``v_t`` is advantage plus value. No sum crosses the end of an
    episode.

    Args:
        reward: `[T, B]` float.
        value: `[T, B]` float, V of each row that an action was chosen from.
        next_value: `[T, B]` float, see `next_values`.
        ended: `[T, B]` bool, terminated or truncated.
        valid: `[T, B]` bool.
        importance: `[T, B]` float, probability of the action under the policy that learns over that under the one that
            chose it; what stands in rows that are not valid is not read.
        gamma: discount of a step.
        trace_lambda: as in `gae`.
        largest_rho: truncates how much a step's own error counts; decides what the values converge to.
        largest_c: truncates how much later errors count; decides how fast.

    Returns:
        Advantage and value target, both `[T, B]`, 0 in rows that are not valid.
    """
    shapes = [tuple(array.shape) for array in (reward, value, next_value, ended, valid, importance)]
    if len(set(shapes)) != 1 or reward.dim() != 2:
        raise ValueError(f"expected six arrays of one [T, B] shape, got {shapes}")
    value, importance = value.masked_fill(~valid, 0.0), importance.masked_fill(~valid, 1.0)
    delta = torch.where(valid, reward + gamma * next_value - value, 0.0)
    goes_on = valid & ~ended
    carry = torch.where(goes_on, gamma * trace_lambda * importance.clamp(max=largest_c), 0.0)
    correction = discounted_sum(importance.clamp(max=largest_rho) * delta, carry)
    later = torch.cat([correction[1:], torch.zeros_like(correction[:1])])
    advantage = delta + torch.where(goes_on, gamma * trace_lambda * later, 0.0)
    return advantage, value + correction
