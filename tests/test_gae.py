"""Stop 7: what a step's future is worth, and generalized advantage estimation, against slow literal twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from steps import Steps, every_mix, literal_next_value, random_steps

from rustyrl_learner.gae import gae, next_values

SEEDS = range(12)
DISCOUNTS = [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0), (0.0, 0.9)]


pytestmark = pytest.mark.usefixtures("one_thread")


def literal_advantage(steps: Steps, t: int, b: int, gamma: float, gae_lambda: float) -> float:
    """Equation 16 of the paper as it stands: a discounted sum of one-step errors to the end of the episode."""
    total, weight = 0.0, 1.0
    if not steps.valid[t, b]:
        return total
    for later in range(t, steps.reward.shape[0]):
        future = literal_next_value(steps, later, b)
        total += weight * (steps.reward[later, b].item() + gamma * future - steps.value[later, b].item())
        weight *= gamma * gae_lambda
        if steps.terminated[later, b] or steps.truncated[later, b]:
            break
    return total


def test_random_steps_cover_every_kind_of_end() -> None:
    kinds = [random_steps(seed) for seed in SEEDS]
    assert any((s.terminated & s.truncated).any() for s in kinds)
    assert any((s.terminated & ~s.truncated).any() for s in kinds)
    assert any((s.truncated & ~s.terminated).any() for s in kinds)
    assert any((~s.valid).any() for s in kinds)
    assert any((s.valid[-1] & ~s.ended[-1]).any() for s in kinds)


@pytest.mark.parametrize("seed", SEEDS)
def test_next_values_equal_the_literal_twin(seed: int) -> None:
    steps = random_steps(seed)
    future = steps.future()
    assert future.shape == steps.reward.shape
    for t, b in np.ndindex(*steps.reward.shape):
        assert future[t, b].item() == literal_next_value(steps, t, b)


@pytest.mark.parametrize(("gamma", "gae_lambda"), DISCOUNTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_equal_the_literal_twin(seed: int, gamma: float, gae_lambda: float) -> None:
    steps = random_steps(seed)
    advantage = steps.advantage(gamma, gae_lambda)
    for t, b in np.ndindex(*steps.reward.shape):
        expected = literal_advantage(steps, t, b, gamma, gae_lambda)
        assert advantage[t, b].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_every_mix_of_ends_and_empty_rows_equals_the_literal_twin() -> None:
    steps = every_mix(3)
    advantage, future = steps.advantage(0.97, 0.9), steps.future()
    assert advantage.shape == (3, 115)
    for t, b in np.ndindex(*steps.reward.shape):
        assert advantage[t, b].item() == pytest.approx(literal_advantage(steps, t, b, 0.97, 0.9), rel=1e-5, abs=1e-5)
        if steps.valid[t, b]:
            assert future[t, b].item() == literal_next_value(steps, t, b)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_of_rows_without_an_agent_change_nothing(seed: int, garbage: float) -> None:
    steps = random_steps(seed)
    before = steps.advantage(0.99, 0.95)
    empty = ~steps.valid
    steps.reward[empty] = garbage
    steps.value[:-1][empty] = garbage
    # The bootstrap row of a slot that is empty, or has just ended, is not read either.
    steps.value[-1][empty[-1] | steps.ended[-1]] = garbage
    after = steps.advantage(0.99, 0.95)
    assert torch.equal(after, before)
    assert (after[empty] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_value_of_the_row_after_an_end_does_not_reach_back(seed: int) -> None:
    steps = random_steps(seed)
    expected = steps.future()
    scrambled = steps.value.clone()
    scrambled[1:][steps.ended] = math.nan
    future = next_values(scrambled, steps.terminated, steps.truncated, steps.final_index, steps.final_value)
    assert torch.equal(future, expected)


def test_next_values_leave_their_arguments_as_they_are() -> None:
    steps = random_steps(3)
    value, final_value = steps.value.clone(), steps.final_value.clone()
    steps.future()
    assert torch.equal(steps.value, value)
    assert torch.equal(steps.final_value, final_value)


def one_slot(reward: list[float], value: list[float], end: str | None = None, final_value: float = 7.0) -> Steps:
    """One slot in which the middle of three steps ends, or none does."""
    flags = torch.tensor([[False], [True], [False]])
    truncated = end in ("truncated", "both")
    return Steps(
        reward=torch.tensor(reward)[:, None],
        value=torch.tensor(value)[:, None],
        terminated=flags if end in ("terminated", "both") else torch.zeros_like(flags),
        truncated=flags if truncated else torch.zeros_like(flags),
        valid=torch.ones_like(flags),
        final_index=torch.tensor([[1, 0]]) if truncated else torch.empty((0, 2), dtype=torch.int64),
        final_value=torch.tensor([final_value]) if truncated else torch.empty(0),
    )


def test_truncated_step_bootstraps_from_final_observation() -> None:
    steps = one_slot([1.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0], "truncated", final_value=7.0)
    assert steps.future().tolist() == [[20.0], [7.0], [40.0]]
    # gamma 0.5, lambda 1: 3 + 20 - 30 | 2 + 3.5 - 20 | 1 + 10 - 10 + 0.5 * (-14.5)
    assert steps.advantage(0.5, 1.0).tolist() == [[-6.25], [-14.5], [-7.0]]


def test_terminated_step_has_no_future() -> None:
    steps = one_slot([1.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0], "terminated")
    assert steps.future().tolist() == [[20.0], [0.0], [40.0]]
    assert steps.advantage(0.5, 1.0).tolist() == [[-8.0], [-18.0], [-7.0]]


def test_terminated_wins_where_both_flags_are_set() -> None:
    both = one_slot([1.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0], "both")
    alone = one_slot([1.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0], "terminated")
    assert torch.equal(both.future(), alone.future())
    assert torch.equal(both.advantage(0.9, 0.9), alone.advantage(0.9, 0.9))


def test_lambda_1_gives_discounted_returns() -> None:
    steps = one_slot([1.0, 2.0, 4.0], [0.3, -0.7, 0.2, 8.0])
    target = steps.advantage(0.5, 1.0) + steps.value[:-1]
    returns = [1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 8, 2 + 0.5 * 4 + 0.25 * 8, 4 + 0.5 * 8]
    torch.testing.assert_close(target, torch.tensor(returns)[:, None])


def test_lambda_0_gives_the_one_step_error() -> None:
    steps = one_slot([1.0, 2.0, 4.0], [0.3, -0.7, 0.2, 8.0])
    expected = steps.reward + 0.5 * steps.value[1:] - steps.value[:-1]
    torch.testing.assert_close(steps.advantage(0.5, 0.0), expected)


@pytest.mark.parametrize("argument", range(5))
def test_gae_refuses_arrays_of_other_shapes(argument: int) -> None:
    number, flag = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    arrays = [number, number, number, flag, flag]
    gae(*arrays, 0.9, 0.9)
    arrays[argument] = arrays[argument][:, :1]  # would broadcast
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        gae(*arrays, 0.9, 0.9)


def test_gae_refuses_arrays_that_are_not_time_by_slots() -> None:
    number, flag = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[T, B\]"):
        gae(number, number, number, flag, flag, 0.9, 0.9)


@pytest.mark.parametrize("rows", [3, 5])
def test_next_values_refuse_values_without_a_bootstrap_row(rows: int) -> None:
    flag = torch.zeros(3, 2, dtype=torch.bool)
    none = torch.empty((0, 2), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[T\+1, B\]"):
        next_values(torch.zeros(rows, 2), flag, flag, none, torch.empty(0))


def test_next_values_refuse_flags_of_two_shapes() -> None:
    flag = torch.zeros(3, 2, dtype=torch.bool)
    none = torch.empty((0, 2), dtype=torch.int64)
    with pytest.raises(ValueError, match="flags"):
        next_values(torch.zeros(4, 2), flag, flag[:, :1], none, torch.empty(0))
