"""The critic's targets have mean 0 and deviation 1, and moving its units changes nothing that it says (PopArt)."""

from __future__ import annotations

import pytest
import torch

from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl.weights import PolicySpec
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.normalizer import SMALLEST_DEVIATION, ValueNormalizer

CPU = torch.device("cpu")
TRUNKS = pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
OBSERVATION = torch.randn(50, 3, generator=torch.Generator().manual_seed(3))

pytestmark = pytest.mark.usefixtures("one_thread")


def network_of(*, shared: bool, hidden: tuple[int, ...] = (8, 8)) -> ActorCritic:
    action = (ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),)
    torch.manual_seed(0)
    spec = PolicySpec((ArraySpec("main", (3,), "float32"),), action, hidden, "tanh", normalize=False)
    return ActorCritic(spec, shared=shared, initial_log_std=0.0)


def targets(mean: float, deviation: float, seed: int = 0, count: int = 400) -> torch.Tensor:
    return mean + deviation * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def said(network: ActorCritic, values: ValueNormalizer) -> torch.Tensor:
    with torch.no_grad():
        return values.to_reward_units(network.value(OBSERVATION))


@pytest.mark.parametrize("hidden", [(8, 8), ()], ids=["hidden", "linear"])
@TRUNKS
def test_a_fold_leaves_every_value_and_the_policy_what_they_were(shared: bool, hidden: tuple[int, ...]) -> None:
    network, values = network_of(shared=shared, hidden=hidden), ValueNormalizer(1000, CPU)
    with torch.no_grad():
        policy = network.policy(OBSERVATION)
    for seed, (mean, deviation) in enumerate([(0.0, 1.0), (500.0, 20.0), (-30.0, 0.1), (1e4, 300.0), (2.0, 2.0)]):
        before, raw = said(network, values), network.value(OBSERVATION).detach()
        values.fold(targets(mean, deviation, seed), *network.value_head)
        scale = max(float(values.deviation), abs(mean), float(before.abs().max()))
        torch.testing.assert_close(said(network, values), before, rtol=1e-5, atol=2e-6 * scale)
        assert not torch.equal(network.value(OBSERVATION), raw)  # it is the units that moved
    with torch.no_grad():
        assert torch.equal(network.policy(OBSERVATION), policy)


def test_targets_in_the_units_of_the_critic_have_mean_0_and_deviation_1() -> None:
    network, values, given = network_of(shared=False), ValueNormalizer(1000, CPU), targets(300.0, 7.0)
    values.fold(given, *network.value_head)
    unit = values.to_critic_units(given)
    assert unit.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert unit.std(correction=0).item() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(values.to_reward_units(unit), given, rtol=1e-6, atol=0)


def test_before_the_first_targets_the_units_are_those_of_the_rewards() -> None:
    values = ValueNormalizer(1000, CPU)
    value = torch.tensor([3.0, -0.5])
    assert torch.equal(values.to_reward_units(value), value)
    assert torch.equal(values.to_critic_units(value), value)


def test_units_follow_targets_that_move() -> None:
    network, values = network_of(shared=False), ValueNormalizer(1000, CPU)
    for seed in range(40):
        values.fold(targets(0.0 if seed < 10 else 100.0, 5.0, seed), *network.value_head)
    assert values.mean.item() == pytest.approx(100.0, abs=1.0)
    assert values.deviation.item() == pytest.approx(5.0, rel=0.1)


@TRUNKS
def test_a_critic_that_is_left_says_the_same_by_itself(shared: bool) -> None:
    network, values = network_of(shared=shared), ValueNormalizer(1000, CPU)
    values.fold(targets(300.0, 7.0), *network.value_head)
    before = said(network, values)
    values.leave(*network.value_head)
    with torch.no_grad():
        torch.testing.assert_close(network.value(OBSERVATION), before, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4])
def test_targets_that_are_all_alike_stay_finite(constant: float) -> None:
    network, values = network_of(shared=False), ValueNormalizer(1000, CPU)
    given = torch.full((400,), constant)
    for _ in range(3):
        before = said(network, values)
        values.fold(given, *network.value_head)
        assert values.deviation.item() == pytest.approx(SMALLEST_DEVIATION)
        assert torch.isfinite(values.to_critic_units(given)).all()
        assert all(torch.isfinite(tensor).all() for tensor in network.value_head)
        torch.testing.assert_close(said(network, values), before, rtol=1e-5, atol=1e-6 * (1 + abs(constant)))
    values.fold(targets(constant, 3.0), *network.value_head)  # and come back from there
    torch.testing.assert_close(said(network, values), before, rtol=1e-5, atol=1e-5 * (1 + abs(constant)))


def test_no_targets_change_nothing() -> None:
    network, values = network_of(shared=False), ValueNormalizer(1000, CPU)
    before = [tensor.detach().clone() for tensor in network.value_head]
    values.fold(torch.empty(0), *network.value_head)
    assert values.statistics.count == 0
    assert all(torch.equal(a, b) for a, b in zip(network.value_head, before, strict=True))
