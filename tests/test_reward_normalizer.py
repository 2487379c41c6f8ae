"""Rewards are divided by the running deviation of the discounted return so far, against a literal twin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from steps import random_steps
from torch import Tensor

from rustyrl.weights import VARIANCE_FLOOR
from rustyrl_learner.normalizer import RewardNormalizer

CPU = torch.device("cpu")
STEPS, SLOTS = 9, 5
GAMMA = 0.9

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Rewards:
    """What a batch says of its rewards."""

    reward: Tensor
    ended: Tensor
    valid: Tensor
    fresh: Tensor


def batches(count: int, seed: int = 0, scale: float = 1.0) -> list[Rewards]:
    """Batches that go on from one another: a slot is empty after an end only, unless its world began anew."""
    rng = np.random.default_rng(seed)
    alive, result = np.ones(SLOTS, bool), []
    for _ in range(count):
        ended, valid = np.zeros((STEPS, SLOTS), bool), np.zeros((STEPS, SLOTS), bool)
        fresh = rng.random(SLOTS) < 0.3
        alive |= fresh
        for t in range(STEPS):
            valid[t] = alive
            ended[t] = alive & (rng.random(SLOTS) < 0.15)
            alive = np.where(alive, ~ended[t] | (rng.random(SLOTS) < 0.5), rng.random(SLOTS) < 0.3)
        reward = (scale * (0.5 + rng.standard_normal((STEPS, SLOTS)))).astype(np.float32)
        result.append(Rewards(*(torch.from_numpy(array) for array in (reward, ended, valid, fresh))))
    return result


def folded(parts: list[Rewards], clip: float = 10.0) -> RewardNormalizer:
    normalizer = RewardNormalizer(SLOTS, clip, CPU)
    for part in parts:
        normalizer.fold(part.reward, part.ended, part.valid, part.fresh, GAMMA)
    return normalizer


def literal_returns(parts: list[Rewards]) -> tuple[list[float], list[float]]:
    """Every return so far of every valid step, and what is carried on, a slot and a step at a time."""
    seen, carried = [], []
    for b in range(SLOTS):
        running = 0.0
        for part in parts:
            if part.fresh[b]:
                running = 0.0
            for t in range(STEPS):
                if not part.valid[t, b]:
                    continue
                running = GAMMA * running + part.reward[t, b].item()
                seen.append(running)
                if part.ended[t, b]:
                    running = 0.0
        carried.append(running)
    return seen, carried


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(4))
def test_returns_equal_the_literal_twin_over_several_batches(seed: int, scale: float) -> None:
    parts = batches(6, seed, scale)
    assert any((~part.valid).any() for part in parts)
    assert any(part.fresh.any() for part in parts[1:])
    normalizer = folded(parts)
    seen, carried = literal_returns(parts)
    assert normalizer.carried.tolist() == pytest.approx(carried, rel=1e-9)
    assert normalizer.statistics.count == len(seen)
    assert normalizer.statistics.variance.item() == pytest.approx(np.var(seen), rel=1e-5)
    assert normalizer.statistics.mean.item() == pytest.approx(np.mean(seen), rel=1e-5, abs=1e-6 * scale)
    reward = parts[-1].reward
    expected = np.clip(reward.double().numpy() / math.sqrt(np.var(seen) + VARIANCE_FLOOR), -10, 10)
    np.testing.assert_allclose(normalizer.apply(reward).numpy(), expected, rtol=1e-4)


def test_a_return_is_carried_over_the_edge_of_a_batch_and_not_into_a_new_episode() -> None:
    parts = [
        Rewards(torch.ones(2, SLOTS), *(torch.zeros(2, SLOTS).bool(), torch.ones(2, SLOTS).bool()), f)
        for f in (torch.zeros(SLOTS).bool(), torch.arange(SLOTS) == 3)
    ]
    parts[1].ended[0, 1] = True
    once, twice = folded(parts[:1]), folded(parts)
    assert once.carried.tolist() == pytest.approx([1.9] * SLOTS)
    longest = 1 + GAMMA * (1 + GAMMA * 1.9)
    assert twice.carried.tolist() == pytest.approx([longest, 1.0, longest, 1.9, longest])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_rewards_of_rows_without_an_agent_change_nothing(garbage: float) -> None:
    parts = batches(4)
    before = folded(parts)
    for part in parts:
        part.reward[~part.valid] = garbage
    after = folded(parts)
    assert torch.equal(after.carried, before.carried)
    for name, tensor in before.statistics.tensors("x").items():
        assert torch.equal(after.statistics.tensors("x")[name], tensor)


def test_rewards_are_clipped_and_not_shifted() -> None:
    normalizer = folded(batches(5, scale=20.0), clip=1.5)
    deviation = math.sqrt(normalizer.statistics.variance.item())
    assert abs(normalizer.statistics.mean.item()) > 1
    reward = torch.tensor([[0.0, deviation, -deviation], [1e6, -1e6, 0.25 * deviation]])
    expected = torch.tensor([[0.0, 1.0, -1.0], [1.5, -1.5, 0.25]])
    torch.testing.assert_close(normalizer.apply(reward), expected, rtol=1e-5, atol=0)
    assert reward[1, 0] == 1e6


def test_before_the_first_return_rewards_stay_as_they_are() -> None:
    reward = torch.tensor([[0.5, -3.0]])
    torch.testing.assert_close(RewardNormalizer(2, 10.0, CPU).apply(reward), reward)


@pytest.mark.parametrize("constant", [0.0, 1.0, -1e4])
def test_rewards_that_never_change_stay_finite(constant: float) -> None:
    part = batches(1)[0]
    part.reward[:] = constant
    normalizer = folded([part] * 3)
    assert torch.isfinite(normalizer.apply(part.reward)).all()
    assert normalizer.apply(part.reward).abs().max() <= 10


def test_steps_of_other_tests_keep_the_contract_of_these() -> None:
    """A slot that empties has ended, so that nothing is carried for a slot without an agent."""
    for seed in range(12):
        steps = random_steps(seed)
        slots = steps.reward.shape[1]
        normalizer = RewardNormalizer(slots, 10.0, CPU)
        normalizer.fold(steps.reward, steps.ended, steps.valid, torch.ones(slots, dtype=torch.bool), GAMMA)
        assert (normalizer.carried[~steps.valid[-1] | steps.ended[-1]] == 0).all()
