"""Stop 7 as a whole: what V-trace, the scales of rewards and values, and empty rows make of what the update reads."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from rustyrl.config import PPOConfig, build_config
from rustyrl.rollout import no_episodes
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec
from rustyrl.weights import PolicySpec
from rustyrl_learner import learner as learner_module
from rustyrl_learner.advantage import batch_figures, training_batch, uses_vtrace
from rustyrl_learner.batch import Batch
from rustyrl_learner.gae import gae, next_values
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.normalizer import RewardNormalizer, ValueNormalizer
from rustyrl_learner.rows import TrainingBatch
from rustyrl_learner.vtrace import vtrace

CPU = torch.device("cpu")
STEPS, COLUMNS, WIDTH = 7, 6, 4
ACTIONS = {
    "box": (ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),),
    "masked": (ActionSpec("discrete", shape=(2,), counts=(3, 2), masked=True),),
}
KINDS = pytest.mark.parametrize("kind", ACTIONS)
TRUNKS = pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
PPO = PPOConfig(gamma=0.97, gae_lambda=0.9, vtrace_rho=1.3, vtrace_c=0.8)

pytestmark = pytest.mark.usefixtures("one_thread")


def spec_of(kind: str = "box") -> EnvironmentSpec:
    observation = (ArraySpec("main", (WIDTH,), "float32"),)
    return EnvironmentSpec("test", observation, ACTIONS[kind], slots=COLUMNS, step_s=0.1, max_episode_steps=50)


def network_of(kind: str = "box", *, shared: bool = False) -> ActorCritic:
    spec = PolicySpec(spec_of(kind).observation, ACTIONS[kind], (16, 8), "tanh", normalize=False)
    torch.manual_seed(0)
    return ActorCritic(spec, shared=shared, initial_log_std=-0.2)


def batch_of(kind: str = "box", seed: int = 0, scale: float = 1.0) -> Batch:
    """Random steps of a policy that is some way off, with ends of both kinds and slots that empty and fill."""
    g = torch.Generator().manual_seed(seed)
    shape = (STEPS, COLUMNS)
    terminated = torch.rand(shape, generator=g) < 0.15
    truncated = (torch.rand(shape, generator=g) < 0.2) & ~terminated
    valid = torch.ones(shape, dtype=torch.bool)
    terminated[2, 1] = valid[3, 1] = True
    terminated[3, 1] = truncated[2, 1] = truncated[3, 1] = False
    valid[3:5, 1] = False
    terminated[3:5, 1] = truncated[3:5, 1] = False
    valid[:2, 4] = False
    terminated[:2, 4] = truncated[:2, 4] = False
    mask = None
    if kind == "masked":
        action = torch.stack([torch.randint(0, n, shape, generator=g) for n in (3, 2)], -1)
        mask = torch.rand((*shape, 5), generator=g) < 0.5
        mask = mask.scatter(-1, action + torch.tensor([0, 3]), value=True)
        action = action.float()
    else:
        action = torch.randn((*shape, 2), generator=g)
    index = truncated.nonzero()
    return Batch(
        observation=torch.randn((STEPS + 1, COLUMNS, WIDTH), generator=g),
        action=action,
        action_mask=mask,
        behavior_log_prob=-2 + torch.randn(shape, generator=g),
        reward=scale * (1 + torch.randn(shape, generator=g)),
        terminated=terminated,
        truncated=truncated,
        valid=valid,
        final_index=index,
        final_observation=torch.randn((len(index), WIDTH), generator=g),
        fresh=torch.zeros(COLUMNS, dtype=torch.bool),
    )


def values_and_future(network: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        value, final_value = network.value(batch.observation.reshape(-1, WIDTH)), network.value(batch.final_observation)
    value = value.reshape(STEPS + 1, COLUMNS)
    return value, next_values(value, batch.terminated, batch.truncated, batch.final_index, final_value)


# V-trace


@KINDS
@TRUNKS
def test_a_corrected_batch_has_the_advantages_and_targets_of_vtrace(kind: str, shared: bool) -> None:
    network, batch = network_of(kind, shared=shared), batch_of(kind)
    rows = training_batch(network, batch, PPO, lagged=True, corrected=True)
    value, future = values_and_future(network, batch)
    with torch.no_grad():
        outputs = network(batch.observation[:-1].reshape(-1, WIDTH))[0]
        mask = None if batch.action_mask is None else batch.action_mask.flatten(0, 1)
        now = network.log_prob(outputs, batch.action.flatten(0, 1), mask).reshape(STEPS, COLUMNS)
    importance = (now - batch.behavior_log_prob).exp()
    assert importance[batch.valid].max() > PPO.vtrace_rho
    assert importance[batch.valid].min() < PPO.vtrace_c
    ended = batch.terminated | batch.truncated
    advantage, target = vtrace(
        batch.reward, value[:-1], future, ended, batch.valid, importance, 0.97, 0.9, largest_rho=1.3, largest_c=0.8
    )
    torch.testing.assert_close(rows.advantage, advantage[batch.valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.value_target, target[batch.valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.proximal_log_prob, now[batch.valid], rtol=1e-5, atol=1e-5)
    plain = training_batch(network, batch, PPO, lagged=True)
    expected = gae(batch.reward, value[:-1], future, ended, batch.valid, 0.97, 0.9)[batch.valid]
    torch.testing.assert_close(plain.advantage, expected, rtol=1e-5, atol=1e-5)
    assert (plain.value_target - rows.value_target).abs().max() > 0.1


def test_a_corrected_batch_without_lag_is_that_of_gae() -> None:
    network, batch = network_of(), batch_of()
    corrected = training_batch(
        network, batch, msgspec.structs.replace(PPO, vtrace_rho=1.0, vtrace_c=1.0), corrected=True
    )
    plain = training_batch(network, batch, PPO)
    for name in ("advantage", "value_target"):
        torch.testing.assert_close(getattr(corrected, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lag", [0, 1, 2, 8])
@pytest.mark.parametrize("setting", ["auto", "on", "off"])
def test_the_learner_corrects_for_lag_above_1_or_as_it_is_told(setting: str, lag: int, tmp_path: Path) -> None:
    """Asked of a whole learner, whose first batch is handed to it."""
    expected = {"auto": lag > 1, "on": True, "off": False}[setting]
    config = build_config(
        {
            "policy": {"hidden": [4], "normalize": False},
            "batch": {"max_policy_lag": lag, "worlds": 1, "unroll_length": STEPS},
            "ppo": {"vtrace": setting},
            "run": {"device": "cpu", "threads": 1},
        }
    )
    assert uses_vtrace(config.ppo, lag) == expected
    given: dict[str, Any] = {}

    class EnoughError(Exception):
        pass

    def watched(*arguments: Any, **settings: Any) -> None:
        given.update(settings)
        raise EnoughError

    spec = spec_of()
    buffer = SimpleNamespace(
        number=0, policy_version=0, to_device=lambda device: batch_of(), episodes=lambda: no_episodes(spec)
    )
    learner = learner_module.Learner(
        tmp_path,
        config,
        spec,
        None,
        f"ipc://{tmp_path}/link",
        0,
        1,
        resume=False,  # type: ignore[arg-type]
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner, "_next_batch", lambda: buffer)
            patch.setattr(learner_module, "training_batch", watched)
            with pytest.raises(EnoughError):
                learner._update_once()
    finally:
        learner.close()
    assert given["corrected"] == expected
    assert given["lagged"] == (lag > 0)


# Empty rows


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("corrected", [False, True])
@KINDS
def test_numbers_of_rows_without_an_agent_reach_neither_update_nor_statistics(
    kind: str, corrected: bool, garbage: float
) -> None:
    def prepared(batch: Batch) -> tuple[TrainingBatch, dict[str, Tensor]]:
        network = network_of(kind)
        rewards, values = RewardNormalizer(COLUMNS, 10.0, CPU), ValueNormalizer(1e9, CPU)
        rows = training_batch(network, batch, PPO, rewards=rewards, values=values, lagged=True, corrected=corrected)
        state = {**rewards.statistics.tensors("rewards"), **values.statistics.tensors("values")}
        return rows, {**state, "carried": rewards.carried, **network.state_dict()}

    (before, kept), batch = prepared(batch_of(kind)), batch_of(kind)
    empty = ~batch.valid
    assert empty.any()
    batch.observation[:-1][empty] = garbage
    batch.reward[empty] = garbage
    batch.behavior_log_prob[empty] = garbage
    if batch.action_mask is None:
        batch.action[empty] = garbage
    else:
        batch.action[empty] = 1.0  # any choice there is; others are refused before
        batch.action_mask[empty] = False
    after, left = prepared(batch)
    for field in fields(TrainingBatch):
        one, other = getattr(after, field.name), getattr(before, field.name)
        assert (one is None and other is None) or torch.equal(one, other), field.name
    for name, tensor in kept.items():
        assert torch.equal(left[name], tensor), name
        assert torch.isfinite(tensor).all(), name


# Scales of rewards and values


@pytest.mark.parametrize("corrected", [False, True])
@TRUNKS
def test_normalized_values_change_no_advantage_and_only_the_units_of_targets(shared: bool, corrected: bool) -> None:
    """Over several batches: with PopArt each one finds the values that the one before left."""
    plain, scaled = network_of(shared=shared), network_of(shared=shared)
    values = ValueNormalizer(3 * STEPS * COLUMNS, CPU)
    for seed in range(5):
        batch = batch_of(seed=seed, scale=100.0)
        expected = training_batch(plain, batch, PPO, lagged=True, corrected=corrected)
        rows = training_batch(scaled, batch, PPO, values=values, lagged=True, corrected=corrected)
        tolerance = {"rtol": 1e-4, "atol": 1e-3}  # of rewards of about 100
        torch.testing.assert_close(rows.advantage, expected.advantage, **tolerance)
        torch.testing.assert_close(values.to_reward_units(rows.value), expected.value, **tolerance)
        torch.testing.assert_close(values.to_reward_units(rows.value_target), expected.value_target, **tolerance)
        if not corrected:  # in the units of the critic, too
            torch.testing.assert_close(
                rows.value_target - rows.value, rows.advantage / values.deviation, rtol=1e-4, atol=1e-4
            )
        assert torch.equal(rows.proximal_log_prob, expected.proximal_log_prob)
        with torch.no_grad():
            torch.testing.assert_close(scaled.value(rows.observation), rows.value, rtol=1e-4, atol=1e-4)
        if seed == 0:
            assert rows.value_target.mean().item() == pytest.approx(0.0, abs=1e-5)
            assert rows.value_target.std(correction=0).item() == pytest.approx(1.0, rel=1e-5)


def test_normalized_rewards_are_learned_from_divided_by_the_deviation_of_this_very_batch() -> None:
    network, batch, rewards = network_of(), batch_of(scale=50.0), RewardNormalizer(COLUMNS, 0.7, CPU)
    rows = training_batch(network, batch, PPO, rewards=rewards)
    twin = RewardNormalizer(COLUMNS, 0.7, CPU)
    twin.fold(batch.reward, batch.terminated | batch.truncated, batch.valid, batch.fresh, PPO.gamma)
    scaled = replace(batch, reward=twin.apply(batch.reward))
    assert scaled.reward[batch.valid].abs().max() == pytest.approx(0.7)
    assert torch.equal(rows.advantage, training_batch(network, scaled, PPO).advantage)
    assert torch.equal(rewards.carried, twin.carried)
    batch.fresh[::2] = True  # what these carry is forgotten, what the others do goes into what comes
    assert (rewards.carried[::2] != 0).any()
    training_batch(network, batch, PPO, rewards=rewards)
    twin.fold(batch.reward, batch.terminated | batch.truncated, batch.valid, batch.fresh, PPO.gamma)
    assert torch.equal(rewards.carried, twin.carried)
    assert torch.equal(rewards.statistics.variance, twin.statistics.variance)


# Figures


def rows_of(value: Any, target: Any) -> TrainingBatch:
    rng = np.random.default_rng(0)
    numbers = (torch.from_numpy(np.array(a, np.float32)) for a in (value, target))
    value, target = (torch.broadcast_to(a, (200,)).clone() for a in numbers)
    behavior, proximal = torch.from_numpy(rng.normal(-1, 0.5, (2, 200)).astype(np.float32))
    none = torch.empty(200, 0)
    return TrainingBatch(none, none, None, behavior, proximal, target - value, value, target)


@pytest.mark.parametrize("scaled", [False, True])
def test_figures_of_a_batch_equal_those_of_numpy(scaled: bool) -> None:
    rng = np.random.default_rng(1)
    target = (300 + 20 * rng.standard_normal(200)).astype(np.float32)
    value = (0.7 * target + 80 + 5 * rng.standard_normal(200)).astype(np.float32)
    network, rows, values = network_of(), rows_of(value, target), None
    if scaled:  # what is told is in the units of the rewards all the same
        values = ValueNormalizer(1e9, CPU)
        values.fold(torch.from_numpy(target) + 7, *network.value_head)
        units = {name: values.to_critic_units(getattr(rows, name)) for name in ("value", "value_target")}
        assert units["value"].abs().max() < 10
        rows = replace(rows, **units)
    target, value = target.astype(np.float64), value.astype(np.float64)
    importance = np.exp((rows.proximal_log_prob - rows.behavior_log_prob).double().numpy())
    assert network.log_std is not None
    assert batch_figures(rows, network, values) == pytest.approx(
        {
            "explained_variance": 1 - np.var(target - value) / np.var(target),
            "value_mean": value.mean(),
            "value_target_mean": target.mean(),
            "value_target_std": target.std(),
            "advantage_std": (target - value).std(),
            "importance_mean": importance.mean(),
            "importance_max": importance.max(),
            "action_std": math.exp(-0.2),
        },
        rel=1e-5,
    )
    assert "action_std" not in batch_figures(rows, network_of("masked"), values)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_explained_variance_is_1_of_a_critic_that_knows_0_of_a_constant_and_less_of_a_worse_one(scale: float) -> None:
    target = scale * np.random.default_rng(0).standard_normal(200)

    def explained(value: Any) -> float:
        return batch_figures(rows_of(value, target), network_of())["explained_variance"]

    assert explained(target) == 1.0
    assert explained(target + 3 * scale) == pytest.approx(1.0, abs=1e-6)  # a shift is no variance
    assert explained(0.5 * target) == pytest.approx(0.75, abs=1e-6)
    assert explained(0.0) == explained(7 * scale) == pytest.approx(0.0, abs=1e-6)
    assert explained(-target) == pytest.approx(-3.0, abs=1e-5)


@pytest.mark.parametrize("target", [0.0, 0.1, -1000.1, 1e7])
@pytest.mark.parametrize("value", ["the same", "another", "any"])
def test_a_constant_target_gives_figures_that_json_can_hold(target: float, value: str) -> None:
    said = {"the same": target, "another": target + 1, "any": np.random.default_rng(0).standard_normal(200)}[value]
    figures = batch_figures(rows_of(said, target), network_of())
    assert all(math.isfinite(number) for number in figures.values())
    assert figures["explained_variance"] == 0.0
    assert figures["value_target_std"] == 0.0


def test_targets_that_hardly_vary_give_figures_that_json_can_hold() -> None:
    target = np.where(np.arange(200) == 0, 1e-30, 0.0)
    figures = batch_figures(rows_of(np.linspace(-1e3, 1e3, 200), target), network_of())
    assert all(math.isfinite(number) for number in figures.values())
    assert figures["explained_variance"] < -1e30
