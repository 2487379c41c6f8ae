"""V-trace against equation 1 of Espeholt et al. 2018 as it stands, its reductions, and what its truncations do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from steps import Steps, every_mix, literal_next_value, random_steps
from torch import Tensor

from rustyrl_learner.vtrace import vtrace

SEEDS = range(12)
# gamma, lambda, and what rho and c are truncated at
SETTINGS = [
    (0.99, 1.0, 1.0, 1.0),
    (0.97, 0.9, 1.5, 0.7),
    (0.9, 0.5, 0.6, 1.3),
    (1.0, 0.95, 3.0, 2.0),
    (0.97, 0.0, 1.0, 1.0),
    (0.0, 0.9, 1.0, 1.0),
]
ONES = (1.0, 1.0)
UNTRUNCATED = (math.inf, math.inf)

pytestmark = pytest.mark.usefixtures("one_thread")


def random_importance(steps: Steps, seed: int = 0) -> Tensor:
    """Ratios well below and well above what they are truncated at."""
    return torch.randn(steps.reward.shape, generator=torch.Generator().manual_seed(seed)).mul(0.8).exp()


def traced(steps: Steps, importance: Tensor, *settings: float) -> tuple[Tensor, Tensor]:
    arrays = (steps.reward, steps.value[:-1], steps.future(), steps.ended, steps.valid)
    return vtrace(*arrays, importance, *settings)


def end_of_trace(steps: Steps, t: int, b: int) -> int:
    """The last step that belongs to what step t began: the end of its episode or of the rollout."""
    for later in range(t, len(steps.reward)):
        if steps.ended[later, b]:
            return later
    return len(steps.reward) - 1


def literal_target(
    steps: Steps, importance: Tensor, t: int, b: int, gamma: float, trace_lambda: float, rho: float, c: float
) -> float:
    """Equation 1: V(x_s) + sum over t of gamma^(t-s) (c_s ... c_(t-1)) rho_t (r_t + gamma V(x_(t+1)) - V(x_t))."""
    if not steps.valid[t, b]:
        return 0.0
    total = steps.value[t, b].item()
    for later in range(t, end_of_trace(steps, t, b) + 1):
        ratios = importance[t : later + 1, b].double().numpy()
        traces = trace_lambda * np.minimum(c, ratios[:-1])
        future = literal_next_value(steps, later, b)
        error = steps.reward[later, b].item() + gamma * future - steps.value[later, b].item()
        total += gamma ** (later - t) * float(np.prod(traces)) * min(rho, ratios[-1]) * error
    return total


def literal_advantage(
    steps: Steps, importance: Tensor, t: int, b: int, gamma: float, trace_lambda: float, rho: float, c: float
) -> float:
    """``r_s + gamma v_(s+1) - V(x_s)`` of section 4.2; of ``v_(s+1) - V(x_(s+1))`` the part lambda."""
    if not steps.valid[t, b]:
        return 0.0
    future = literal_next_value(steps, t, b)
    if t < end_of_trace(steps, t, b):
        later = literal_target(steps, importance, t + 1, b, gamma, trace_lambda, rho, c)
        future += trace_lambda * (later - future)
    return steps.reward[t, b].item() + gamma * future - steps.value[t, b].item()


def assert_is_the_twin(steps: Steps, importance: Tensor, *settings: float) -> None:
    advantage, target = traced(steps, importance, *settings)
    assert advantage.shape == target.shape == steps.reward.shape
    for t, b in np.ndindex(*steps.reward.shape):
        expected = literal_target(steps, importance, t, b, *settings)
        assert target[t, b].item() == pytest.approx(expected, rel=1e-5, abs=2e-5)
        expected = literal_advantage(steps, importance, t, b, *settings)
        assert advantage[t, b].item() == pytest.approx(expected, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_targets_and_advantages_equal_the_literal_twin(seed: int, settings: tuple[float, ...]) -> None:
    steps = random_steps(seed)
    assert_is_the_twin(steps, random_importance(steps, seed), *settings)


def test_every_mix_of_ends_and_empty_rows_equals_the_literal_twin() -> None:
    steps = every_mix(3)
    assert_is_the_twin(steps, random_importance(steps), 0.97, 0.9, 1.2, 0.8)


# Reductions


@pytest.mark.parametrize("trace_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_the_advantage_is_that_of_gae_and_the_target_advantage_plus_value(
    seed: int, trace_lambda: float
) -> None:
    steps = random_steps(seed)
    advantage, target = traced(steps, torch.ones_like(steps.reward), 0.97, trace_lambda, *ONES)
    torch.testing.assert_close(advantage, steps.advantage(0.97, trace_lambda), rtol=1e-6, atol=1e-6)
    known = torch.where(steps.valid, advantage + steps.value[:-1], 0.0)
    torch.testing.assert_close(target, known, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_with_lambda_1_targets_are_n_step_returns(seed: int) -> None:
    """Equation 2: rewards to the end of the episode or of the rollout, then V of what comes, discounted."""
    steps = random_steps(seed)
    _, target = traced(steps, torch.ones_like(steps.reward), 0.9, 1.0, *ONES)
    for t, b in steps.valid.nonzero().tolist():
        last = end_of_trace(steps, t, b)
        rewards = [0.9 ** (k - t) * steps.reward[k, b].item() for k in range(t, last + 1)]
        expected = sum(rewards) + 0.9 ** (last + 1 - t) * literal_next_value(steps, last, b)
        assert target[t, b].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_without_truncation_targets_are_importance_sampled_returns() -> None:
    """With a critic that says 0, each reward counts by the product of all ratios up to it."""
    steps = random_steps(4)
    steps.value.zero_()
    steps.final_value.zero_()
    importance = random_importance(steps)
    _, target = traced(steps, importance, 0.9, 1.0, *UNTRUNCATED)
    assert len(steps.reward) > 3
    for t, b in steps.valid.nonzero().tolist():
        stretch = range(t, end_of_trace(steps, t, b) + 1)
        terms = [
            0.9 ** (k - t) * importance[t : k + 1, b].double().prod().item() * steps.reward[k, b].item()
            for k in stretch
        ]
        assert target[t, b].item() == pytest.approx(sum(terms), rel=1e-4, abs=1e-5)


# Truncation


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ratio_above_its_limit_acts_as_the_limit_and_one_below_as_itself(seed: int) -> None:
    steps = random_steps(seed)
    importance = random_importance(steps, seed)
    far = torch.where(importance > 1, importance * 1e6, importance)
    for given, same in ((far, importance), (importance.clamp(max=1.0), importance)):
        for one, other in zip(
            traced(steps, given, 0.97, 0.9, *ONES), traced(steps, same, 0.97, 0.9, *ONES), strict=True
        ):
            assert torch.equal(one, other)
    beyond = float(importance.max()) * 1.01  # nothing reaches this
    free = traced(steps, importance, 0.97, 0.9, *UNTRUNCATED)
    for one, other in zip(traced(steps, importance, 0.97, 0.9, beyond, beyond), free, strict=True):
        assert torch.equal(one, other)


def two_steps(first: float, second: float) -> tuple[Steps, Tensor]:
    """Errors of 1 and of 10 in two steps with these ratios, gamma 1, then the future that the critic expected."""
    none = torch.zeros(2, 1, dtype=torch.bool)
    steps = Steps(
        reward=torch.tensor([[1.0], [10.0]]),
        value=torch.zeros(3, 1),
        terminated=none,
        truncated=none,
        valid=~none,
        final_index=torch.empty((0, 2), dtype=torch.int64),
        final_value=torch.empty(0),
    )
    return steps, torch.tensor([[first], [second]])


@pytest.mark.parametrize(
    ("first", "second", "rho", "c", "expected"),
    [
        (1.0, 1.0, 1.0, 1.0, [11.0, 10.0]),
        (0.5, 1.0, 1.0, 1.0, [0.5 + 0.5 * 10, 10.0]),
        (8.0, 1.0, 1.0, 1.0, [11.0, 10.0]),
        (8.0, 1.0, 3.0, 1.0, [3.0 + 10.0, 10.0]),
        (8.0, 1.0, 1.0, 3.0, [1.0 + 3 * 10.0, 10.0]),
        (1.0, 0.25, 1.0, 1.0, [1 + 2.5, 2.5]),
        (1.0, 8.0, 2.0, 1.0, [1 + 20.0, 20.0]),
        (1.0, 8.0, 1.0, 2.0, [11.0, 10.0]),
    ],
)
def test_rho_truncates_the_weight_of_an_error_and_c_how_much_later_errors_count(
    first: float, second: float, rho: float, c: float, expected: list[float]
) -> None:
    steps, importance = two_steps(first, second)
    advantage, target = traced(steps, importance, 1.0, 1.0, rho, c)
    assert target[:, 0].tolist() == pytest.approx(expected)
    # The advantage counts the step's own error whole: its ratio belongs into the policy loss.
    assert advantage[:, 0].tolist() == pytest.approx([1 + expected[1], 10.0])


@pytest.mark.parametrize("rho", [1.0, 1.5, 4.0])
def test_c_does_not_move_what_values_converge_to_and_rho_does(rho: float) -> None:
    """Equation 3: the fixed point is the value of the policy in proportion to min(rho mu, pi).

    One state, three actions, two steps: a slot for each pair of them, weighed by how likely the behaviour takes it,
    makes the expectation a sum. Where the critic says the value of that policy, targets expect nothing else.
    """
    gamma, reward = 0.9, np.array([1.0, -2.0, 0.5])
    behavior, learned = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    ratio = learned / behavior
    assert ratio.max() < 4.0  # which truncates nothing
    between = np.minimum(rho * behavior, learned)
    worth = float(between @ reward / between.sum() / (1 - gamma))
    pairs = np.array(list(itertools.product(range(3), repeat=2))).T
    likely = torch.from_numpy(behavior[pairs].prod(0))
    value = torch.full((2, 9), worth, dtype=torch.float64)
    none = torch.zeros(2, 9, dtype=torch.bool)
    arrays = (torch.from_numpy(reward[pairs]), value, value, none, ~none, torch.from_numpy(ratio[pairs]))

    def expected_change(largest_rho: float, largest_c: float) -> float:
        _, target = vtrace(*arrays, gamma, 1.0, largest_rho, largest_c)
        return float(likely @ (target[0] - worth))

    for c in (0.1, 0.7, 1.0, 5.0):
        assert expected_change(rho, c) == pytest.approx(0.0, abs=1e-12)
    assert abs(expected_change(0.5, 1.0)) > 0.01


# What is not read


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e30])
@pytest.mark.parametrize("steps", [*map(random_steps, SEEDS), every_mix(3)], ids=lambda s: str(tuple(s.reward.shape)))
def test_numbers_of_rows_without_an_agent_change_nothing(steps: Steps, garbage: float) -> None:
    importance, future = random_importance(steps), steps.future()
    reward, value = steps.reward.clone(), steps.value[:-1].clone()
    settings = (0.97, 0.9, 1.2, 0.8)
    before = vtrace(reward, value, future, steps.ended, steps.valid, importance, *settings)
    empty = ~steps.valid
    for array in (reward, value, future, importance):
        array[empty] = garbage
    after = vtrace(reward, value, future, steps.ended, steps.valid, importance, *settings)
    for one, other in zip(after, before, strict=True):
        assert torch.equal(one, other)
        assert (one[empty] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_crosses_an_end(seed: int) -> None:
    """What happens after an end changes no number before it, and no slot changes another."""
    steps = random_steps(seed)
    importance, settings = random_importance(steps), (0.97, 0.9, 1.2, 0.8)
    before = traced(steps, importance, *settings)
    for t, b in steps.ended.nonzero().tolist():
        reward, ratios = steps.reward.clone(), importance.clone()
        reward[t + 1 :, b] = ratios[t + 1 :, b] = 1e6
        after = vtrace(reward, steps.value[:-1], steps.future(), steps.ended, steps.valid, ratios, *settings)
        others = torch.arange(reward.shape[1]) != b
        for one, other in zip(after, before, strict=True):
            assert torch.equal(one[: t + 1], other[: t + 1])
            assert torch.equal(one[:, others], other[:, others])


def test_arguments_stay_as_they_are() -> None:
    steps = random_steps(3)
    importance = random_importance(steps)
    arrays = [steps.reward, steps.value[:-1], steps.future(), steps.ended, steps.valid, importance]
    copies = [array.clone() for array in arrays]
    vtrace(*arrays, 0.97, 0.9, 1.2, 0.8)
    assert all(torch.equal(array, copy) for array, copy in zip(arrays, copies, strict=True))


@pytest.mark.parametrize("argument", range(6))
def test_arrays_of_other_shapes_are_refused(argument: int) -> None:
    number, flag = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    arrays = [number, number, number, flag, flag, number]
    vtrace(*arrays, 0.9, 0.9, *ONES)
    arrays[argument] = arrays[argument][:, :1]  # would broadcast
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        vtrace(*arrays, 0.9, 0.9, *ONES)


def test_arrays_that_are_not_time_by_slots_are_refused() -> None:
    number, flag = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[T, B\]"):
        vtrace(number, number, number, flag, flag, number, 0.9, 0.9, *ONES)
