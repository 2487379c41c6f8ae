"""Generalized advantage estimation over steps that end, are cut, or hold no agent."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["discounted_sum", "gae", "next_values"]


def next_values(
    value: Tensor, terminated: Tensor, truncated: Tensor, final_index: Tensor, final_value: Tensor
) -> Tensor:
    """What the future was worth after each step, as the value function sees it.

    0 after a terminated step, V(final_observation) after a truncated one, V of the next row otherwise.

    Args:
        value: `[T+1, B]` float, V of every row.
        terminated: `[T, B]` bool.
        truncated: `[T, B]` bool; where both are set, terminated wins.
        final_index: `[K, 2]` int64, the (t, b) of each truncated step.
        final_value: `[K]` float, V of the observation before the reset.

    Returns:
        `[T, B]` float.
    """
    _check_steps(value, terminated, truncated)
    result = value[1:].clone()
    result[final_index[:, 0], final_index[:, 1]] = final_value
    return result.masked_fill_(terminated, 0.0)


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    ended: Tensor,
    valid: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Advantages by Schulman et al. 2015, 'High-Dimensional Continuous Control Using GAE', equation 16.

    ``A_t = delta_t + gamma lambda A_{t+1}`` with ``delta_t = r_t + gamma V_next_t - V_t``; the sum does not cross
    the end of an episode, and rows without an agent have advantage 0.

    Args:
        reward: `[T, B]` float.
        value: `[T, B]` float, V of each row that an action was chosen from.
        next_value: `[T, B]` float, see `next_values`.
        ended: `[T, B]` bool, terminated or truncated.
        valid: `[T, B]` bool.
        gamma: discount of a step.
        gae_lambda: 0 trusts the value function, 1 the rewards.

    Returns:
        `[T, B]` float.
    """
    shapes = [tuple(array.shape) for array in (reward, value, next_value, ended, valid)]
    if len(set(shapes)) != 1 or reward.dim() != 2:
        raise ValueError(f"expected five arrays of one [T, B] shape, got {shapes}")
    delta = torch.where(valid, reward + gamma * next_value - value, 0.0)
    carry = torch.where(ended | ~valid, 0.0, gamma * gae_lambda)
    return discounted_sum(delta, carry)


def discounted_sum(term: Tensor, carry: Tensor) -> Tensor:
    """``S_t = term_t + carry_t S_{t+1}``, backward from 0, over `[T, B]`.

    By doubling (Hillis and Steele 1986): after n rounds each sum reaches 2^n steps ahead, so that T steps take log2(T)
    rounds over all of them and not T over one each.
    """
    total, carried, reach = term.clone(), carry.clone(), 1
    while reach < term.shape[0]:
        ahead = term.shape[0] - reach
        total[:ahead] += carried[:ahead] * total[reach:]
        carried = carried[:-reach] * carried[reach:]  # of rows that look beyond the end nothing is asked again
        reach *= 2
    return total


def _check_steps(value: Tensor, terminated: Tensor, truncated: Tensor) -> None:
    steps, slots = terminated.shape
    if value.shape != (steps + 1, slots) or truncated.shape != terminated.shape:
        raise ValueError(
            f"expected value [T+1, B] and flags [T, B], got {tuple(value.shape)}, {tuple(terminated.shape)}, "
            f"{tuple(truncated.shape)}"
        )
