"""Stops 6 and 7: one batch from rollouts of any ownership in any order, and what the update reads of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rustyrl.config import PPOConfig
from rustyrl.rollout import EpisodeRows, Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec, MetricSpec
from rustyrl.weights import PolicySpec
from rustyrl_learner.advantage import training_batch
from rustyrl_learner.batch import Batch, BatchBuffer
from rustyrl_learner.gae import gae, next_values
from rustyrl_learner.ingest import admit
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.normalizer import ObservationNormalizer

CPU = torch.device("cpu")
STEPS = 5
WORLDS = 4
SLOTS = 3
COLUMNS = WORLDS * SLOTS
SPEC = EnvironmentSpec(
    env="maze",
    observation=(
        ArraySpec("place", (2, 2), "float32"),
        ArraySpec("tile", (), "int32"),
        ArraySpec("eyes", (3,), "uint8"),
    ),
    action=(ActionSpec("box", name="push", shape=(2, 1), low=(-1.0, -1.0), high=(1.0, 1.0)),),
    slots=SLOTS,
    step_s=0.1,
    max_episode_steps=50,
    metrics=(MetricSpec("success_rate", "success", "mean"), MetricSpec("fall_rate", "fall", "mean")),
)
DISCRETE = msgspec.structs.replace(SPEC, action=(ActionSpec("discrete", name="push", counts=(4,)),))
MASKED = msgspec.structs.replace(
    SPEC,
    action=(
        ActionSpec("discrete", name="gait", shape=(2,), counts=(3, 2), masked=True),
        ActionSpec("box", name="push", shape=(2, 1), low=(-1.0, -1.0), high=(1.0, 1.0)),
        ActionSpec("discrete", name="call", counts=(4,), masked=True),
    ),
)
SPECS = pytest.mark.parametrize("spec", [SPEC, DISCRETE, MASKED], ids=["box", "discrete", "masked"])
OWNERSHIPS = {
    "one actor": [(0, 1, 2, 3)],
    "two actors": [(0, 1), (2, 3)],
    "two actors, interleaved": [(0, 2), (1, 3)],
    "unequal shares": [(3,), (0, 1, 2)],
    "four actors": [(0,), (1,), (2,), (3,)],
}


pytestmark = pytest.mark.usefixtures("one_thread")


def rollout_of(
    worlds: tuple[int, ...], spec: EnvironmentSpec = SPEC, seed: int = 0, *, ends: bool = True, batch: int = 1
) -> Rollout:
    """What these worlds do in a batch, whoever owns them: each draws from a generator of its own."""
    origin = RolloutOrigin(spec.fingerprint, "main", Ticket(batch, 0, worlds), 0, 0, 0, {"act": 1.0, "step": 2.0})
    rollout = allocate_rollout(spec, STEPS, SLOTS * len(worlds), origin, poison=True)
    finals: list[tuple[int, int, dict[str, NDArray[np.generic]]]] = []
    episodes: list[tuple[int, int, float]] = []
    for position, world in enumerate(worlds):
        rng = np.random.default_rng([seed, world])
        here = slice(position * SLOTS, (position + 1) * SLOTS)
        write_numbers(rollout, here, rng)
        for slot in range(SLOTS):
            column = position * SLOTS + slot
            for t in range(STEPS):
                end = rng.random() if ends else 1.0
                mark = float(rng.random())
                if end < 0.4:
                    rollout.truncated[t, column] = end < 0.2
                    rollout.terminated[t, column] = end >= 0.2
                    episodes.append((t, column, mark))
                if end < 0.2:
                    finals.append((t, column, seen_by(spec, rng)))
            if rollout.terminated[2, column]:
                rollout.valid[3, column] = False  # comes back in row 4
                episodes = [e for e in episodes if e[:2] != (3, column)]
                finals = [f for f in finals if f[:2] != (3, column)]
                rollout.terminated[3, column] = rollout.truncated[3, column] = False
    episodes.sort(key=lambda e: e[:2])  # as an actor writes them: in time order
    finals.sort(key=lambda f: f[:2])
    rollout.final_index = np.array([f[:2] for f in finals], np.int32).reshape(-1, 2)
    rollout.final_observation = {
        a.name: np.array([f[2][a.name] for f in finals], a.dtype).reshape(len(finals), *a.shape)
        for a in spec.observation
    }
    marks = np.array([e[2] for e in episodes], np.float32)
    rollout.episodes = EpisodeRows(
        slot=np.array([e[1] for e in episodes], np.int32),
        episode_return=10 * marks,
        length=np.array([e[0] for e in episodes], np.int32),
        metrics={"success": marks + 1, "fall": marks + 2},
    )
    return rollout


def seen_by(spec: EnvironmentSpec, rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    return {a.name: (100 * rng.random(a.shape)).astype(a.dtype) for a in spec.observation}


def write_numbers(rollout: Rollout, here: slice, rng: np.random.Generator) -> None:
    for array in rollout.observation.values():
        array[:, here] = (100 * rng.random(array[:, here].shape)).astype(array.dtype)
    for name, action in rollout.action.items():
        if action.dtype == np.int64:
            action[:, here] = rng.integers(0, 4 if name != "gait" else (3, 2), action[:, here].shape)
        else:
            action[:, here] = rng.standard_normal(action[:, here].shape)
    for name, mask in rollout.action_mask.items():
        mask[:, here] = rng.random(mask[:, here].shape) < 0.5
        taken, first = rollout.action[name][:, here].reshape(STEPS, SLOTS, -1), (0, 3)[: 1 + (name == "gait")]
        np.put_along_axis(mask[:-1, here], taken + np.array(first), True, axis=2)
    rollout.behavior_log_prob[:, here] = -rng.random((STEPS, SLOTS))
    rollout.reward[:, here] = rng.standard_normal((STEPS, SLOTS))
    rollout.terminated[:, here] = rollout.truncated[:, here] = False
    rollout.valid[:, here] = True


def buffer_of(spec: EnvironmentSpec = SPEC) -> BatchBuffer:
    buffer = BatchBuffer(0, spec, STEPS, WORLDS)
    for array in buffer._arrays.values():
        array.view(torch.uint8)[...] = 0xCB if array.dtype != torch.bool else 1  # what is not placed shows
    return buffer


def filled(rollouts: list[Rollout], spec: EnvironmentSpec = SPEC) -> BatchBuffer:
    buffer = buffer_of(spec)
    buffer.begin(1)
    for rollout in rollouts:
        buffer.place(rollout)
    return buffer


def assert_same_batch(first: Batch, second: Batch) -> None:
    for field in fields(Batch):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if one is None or other is None:
            assert one is other is None, field.name
            continue
        assert one.dtype == other.dtype, field.name
        assert torch.equal(one, other), field.name


def assert_same_episodes(first: EpisodeRows, second: EpisodeRows) -> None:
    assert first.metrics.keys() == second.metrics.keys()
    for name in ("slot", "episode_return", "length"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in first.metrics:
        np.testing.assert_array_equal(first.metrics[name], second.metrics[name])


def test_the_rollouts_of_these_tests_would_be_admitted() -> None:
    for spec in (SPEC, DISCRETE, MASKED):
        rollout = rollout_of((0, 1, 2, 3), spec)
        admit(rollout, spec, STEPS, 0)
        assert rollout.terminated.any()
        assert len(rollout.final_index) > 3
        assert not rollout.valid.all()


@SPECS
@pytest.mark.parametrize("owners", OWNERSHIPS.values(), ids=OWNERSHIPS.keys())
def test_ownership_and_order_of_arrival_cannot_change_a_batch(
    owners: list[tuple[int, ...]], spec: EnvironmentSpec
) -> None:
    reference = filled([rollout_of((0, 1, 2, 3), spec)], spec)
    batch, episodes = reference.to_device(CPU), reference.episodes()
    for order in itertools.permutations(owners):
        buffer = filled([rollout_of(worlds, spec) for worlds in order], spec)
        assert_same_batch(buffer.to_device(CPU), batch)
        assert_same_episodes(buffer.episodes(), episodes)


@SPECS
def test_columns_are_the_slots_of_the_worlds_in_order(spec: EnvironmentSpec) -> None:
    rollout = rollout_of((0, 1, 2, 3), spec)
    batch = filled([rollout_of((2, 3), spec), rollout_of((0, 1), spec)], spec).to_device(CPU)
    for name in ("behavior_log_prob", "reward", "terminated", "truncated", "valid"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(rollout, name))
    joined = [rollout.action[part.name].reshape(STEPS, COLUMNS, -1) for part in spec.action]
    np.testing.assert_array_equal(batch.action.numpy(), np.concatenate(joined, axis=2))
    assert batch.action.shape == (STEPS, COLUMNS, {id(SPEC): 2, id(DISCRETE): 1, id(MASKED): 5}[id(spec)])
    assert batch.action.dtype == torch.float32
    if spec is not MASKED:
        assert batch.action_mask is None
        return
    assert batch.action_mask is not None
    assert batch.action_mask.shape == (STEPS, COLUMNS, 9)
    assert batch.action_mask.dtype == torch.bool
    masks = np.concatenate([rollout.action_mask[name][:-1] for name in ("gait", "call")], axis=2)
    np.testing.assert_array_equal(batch.action_mask.numpy(), masks)


def test_observation_arrays_are_flattened_and_joined_in_the_order_of_the_spec() -> None:
    rollout = rollout_of((0, 1, 2, 3))
    batch = filled([rollout_of((1, 3)), rollout_of((0, 2))]).to_device(CPU)
    assert batch.observation.shape == (STEPS + 1, COLUMNS, 8)
    assert batch.observation.dtype == torch.float32
    for t, column in np.ndindex(STEPS + 1, COLUMNS):
        seen = {name: array[t, column] for name, array in rollout.observation.items()}
        expected = [*seen["place"].ravel().tolist(), float(seen["tile"]), *seen["eyes"].astype(float).tolist()]
        assert batch.observation[t, column].tolist() == expected


def test_final_observations_stand_with_their_steps_by_time_and_column() -> None:
    rollout = rollout_of((0, 1, 2, 3))
    batch = filled([rollout_of((3, 1)), rollout_of((2, 0))]).to_device(CPU)
    index = batch.final_index.tolist()
    assert index == sorted(index) == np.argwhere(rollout.truncated).tolist()
    for row, (t, column) in enumerate(index):
        (place,) = [k for k, at in enumerate(rollout.final_index.tolist()) if at == [t, column]]
        seen = [rollout.final_observation[a.name][place].ravel().astype(float) for a in SPEC.observation]
        assert batch.final_observation[row].tolist() == np.concatenate(seen).tolist()


def test_finals_that_an_actor_names_out_of_order_are_sorted() -> None:
    straight, turned = rollout_of((0, 1, 2, 3)), rollout_of((0, 1, 2, 3))
    turned.final_index = turned.final_index[::-1]
    turned.final_observation = {name: array[::-1] for name, array in turned.final_observation.items()}
    assert_same_batch(filled([turned]).to_device(CPU), filled([straight]).to_device(CPU))


def test_episodes_stand_by_column_and_in_time_order_within() -> None:
    episodes = filled([rollout_of((2,)), rollout_of((3, 0)), rollout_of((1,))]).episodes()
    keys = list(zip(episodes.slot.tolist(), episodes.length.tolist(), strict=True))  # the length holds t here
    assert keys == sorted(keys)
    ended = rollout_of((0, 1, 2, 3))
    expected = np.argwhere((ended.terminated | ended.truncated).T)
    assert [list(key) for key in keys] == expected.tolist()
    np.testing.assert_allclose(episodes.metrics["success"], episodes.episode_return / 10 + 1, rtol=1e-6)
    np.testing.assert_allclose(episodes.metrics["fall"], episodes.episode_return / 10 + 2, rtol=1e-6)


def test_a_batch_in_which_nothing_ended_has_empty_columns() -> None:
    buffer = filled([rollout_of((0, 1), ends=False), rollout_of((2, 3), ends=False)])
    batch, episodes = buffer.to_device(CPU), buffer.episodes()
    assert batch.final_index.shape == (0, 2)
    assert batch.final_index.dtype == torch.int64
    assert batch.final_observation.shape == (0, 8)
    assert len(episodes.slot) == 0
    assert set(episodes.metrics) == {"success", "fall"}


def test_a_buffer_used_again_keeps_nothing_of_the_batch_before() -> None:
    buffer = filled([rollout_of((0, 1, 2, 3), seed=1)])
    buffer.begin(2)
    assert buffer.number == 2
    for worlds in ((2, 3), (0, 1)):
        buffer.place(rollout_of(worlds, seed=2))
    fresh = filled([rollout_of((0, 1, 2, 3), seed=2)])
    assert_same_batch(buffer.to_device(CPU), fresh.to_device(CPU))
    assert_same_episodes(buffer.episodes(), fresh.episodes())
    assert buffer.actor_stage_s() == {"act": 2.0, "step": 4.0}


def test_a_placed_rollout_may_be_overwritten_by_the_next_message() -> None:
    """Its arrays are views of a network frame."""
    rollout = rollout_of((0, 1, 2, 3))
    buffer = filled([rollout])
    assert rollout.storage is not None
    rollout.storage[:] = 0
    for array in (rollout.final_index, *rollout.final_observation.values()):
        array[...] = 0
    episodes = rollout.episodes
    for column in (episodes.slot, episodes.episode_return, episodes.length, *episodes.metrics.values()):
        column[...] = 0
    fresh = filled([rollout_of((0, 1, 2, 3))])
    assert_same_batch(buffer.to_device(CPU), fresh.to_device(CPU))
    assert_same_episodes(buffer.episodes(), fresh.episodes())


def test_seconds_of_actors_are_summed_by_stage() -> None:
    buffer = filled([rollout_of(worlds) for worlds in OWNERSHIPS["four actors"]])
    assert buffer.actor_stage_s() == {"act": 4.0, "step": 8.0}


@pytest.mark.parametrize("owners", OWNERSHIPS.values(), ids=OWNERSHIPS.keys())
def test_slots_of_worlds_that_began_anew_are_marked(owners: list[tuple[int, ...]]) -> None:
    began = {0, 3}
    for order in itertools.permutations(owners):
        rollouts = [rollout_of(worlds) for worlds in order]
        for worlds, rollout in zip(order, rollouts, strict=True):
            rollout.origin = msgspec.structs.replace(rollout.origin, fresh=tuple(began.intersection(worlds)))
        batch = filled(rollouts).to_device(CPU)
        assert batch.fresh.tolist() == [True] * SLOTS + [False] * 2 * SLOTS + [True] * SLOTS


def network_of(spec: EnvironmentSpec = SPEC, *, shared: bool = False) -> ActorCritic:
    policy = PolicySpec(spec.observation, spec.action, (16, 8), "tanh", normalize=True, observation_clip=5.0)
    torch.manual_seed(0)
    return ActorCritic(policy, shared=shared, initial_log_std=0.0)


def normalizer_of(seed: int = 0) -> ObservationNormalizer:
    normalizer = ObservationNormalizer(8, 5.0, CPU)
    normalizer.fold(30 + 20 * torch.randn(100, 8, generator=torch.Generator().manual_seed(seed)))
    return normalizer


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@SPECS
def test_the_update_reads_exactly_the_valid_rows(spec: EnvironmentSpec, shared: bool, lagged: bool) -> None:
    network, normalizer = network_of(spec, shared=shared), normalizer_of()
    batch = filled([rollout_of((0, 1, 2, 3), spec)], spec).to_device(CPU)
    result = training_batch(network, batch, PPOConfig(gamma=0.97, gae_lambda=0.9), normalizer=normalizer, lagged=lagged)
    rows = batch.valid.nonzero()
    assert len(rows) < STEPS * COLUMNS
    assert len(result.advantage) == len(rows)
    with torch.no_grad():
        value = torch.stack([network.value(normalizer.apply(row)) for row in batch.observation])
        final_value = network.value(normalizer.apply(batch.final_observation))
    future = next_values(value, batch.terminated, batch.truncated, batch.final_index, final_value)
    ended = batch.terminated | batch.truncated
    advantage = gae(batch.reward, value[:-1], future, ended, batch.valid, 0.97, 0.9)
    for n, (t, b) in enumerate(rows.tolist()):
        assert torch.equal(result.observation[n], normalizer.apply(batch.observation[t, b]))
        assert torch.equal(result.action[n], batch.action[t, b])
        if batch.action_mask is not None:
            assert result.action_mask is not None
            assert torch.equal(result.action_mask[n], batch.action_mask[t, b])
        assert result.behavior_log_prob[n] == batch.behavior_log_prob[t, b]
        torch.testing.assert_close(result.value[n], value[t, b], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.advantage[n], advantage[t, b], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.value_target[n], advantage[t, b] + value[t, b], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        now = network.log_prob(network(result.observation)[0], result.action, result.action_mask)
    expected = now if lagged else result.behavior_log_prob
    torch.testing.assert_close(result.proximal_log_prob, expected, rtol=1e-5, atol=1e-5)
    assert (result.action_mask is None) == (spec is not MASKED)
    kept = [getattr(result, field.name) for field in fields(result)]
    assert not any(tensor.requires_grad for tensor in kept if tensor is not None)


def test_numbers_of_rows_without_an_agent_do_not_reach_the_update() -> None:
    network, normalizer = network_of(), normalizer_of()
    buffer = filled([rollout_of((0, 1, 2, 3))])
    before = training_batch(network, buffer.to_device(CPU), PPOConfig(), normalizer=normalizer, lagged=True)
    batch = buffer.to_device(CPU)
    empty = ~batch.valid
    assert empty.any()
    batch.observation[:-1][empty] = math.nan
    batch.reward[empty] = math.nan
    batch.behavior_log_prob[empty] = math.nan
    batch.action[empty] = math.nan
    after = training_batch(network, batch, PPOConfig(), normalizer=normalizer, lagged=True)
    for field in fields(before):
        if field.name != "action_mask":
            assert torch.equal(getattr(after, field.name), getattr(before, field.name)), field.name


def test_without_a_normalizer_the_update_reads_raw_observations() -> None:
    batch = filled([rollout_of((0, 1, 2, 3), ends=False)]).to_device(CPU)
    result = training_batch(network_of(), batch, PPOConfig())
    assert torch.equal(result.observation, batch.observation[:-1].reshape(-1, 8))


def test_preparing_the_update_changes_neither_batch_nor_statistics() -> None:
    network, normalizer = network_of(), normalizer_of()
    buffer = filled([rollout_of((0, 1, 2, 3))])
    before = filled([rollout_of((0, 1, 2, 3))]).to_device(CPU)
    training_batch(network, buffer.to_device(CPU), PPOConfig(), normalizer=normalizer, lagged=True)
    assert_same_batch(buffer.to_device(CPU), before)
    assert torch.equal(normalizer.statistics.mean, normalizer_of().statistics.mean)
    assert normalizer.statistics.count == 100


class Copies:
    """What `CopyStream` does, in this machine's memory, where a copy is seen by who has waited for it alone."""

    def room(self, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.empty_like(array) for name, array in arrays.items()}

    def copy(self, arrays: dict[str, torch.Tensor], room: dict[str, torch.Tensor]) -> list[Any]:
        return [(room[name], array.clone()) for name, array in arrays.items()]

    def wait(self, copied: list[Any]) -> None:
        for room, array in copied:
            room.copy_(array)


def test_a_batch_goes_to_the_device_when_it_is_complete_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = [rollout_of((0, 1)), rollout_of((2, 3))]
    expected = filled(rollouts).to_device(CPU)
    monkeypatch.setattr(BatchBuffer, "_empty", lambda _, shape, dtype: torch.empty(shape, dtype=dtype))
    buffer = BatchBuffer(0, SPEC, STEPS, WORLDS, Copies())  # type: ignore[arg-type]
    for number in range(2):  # the memory is used again for another batch
        buffer.begin(number)
        for rollout in rollouts:
            buffer.place(rollout)
        buffer.complete()
        for array in buffer._arrays.values():
            array.zero_()  # what comes after the copy is another batch's
        batch = buffer.to_device(CPU)
        assert_same_batch(batch, expected)
        assert batch.reward.data_ptr() == buffer._room["reward"].data_ptr()
        for array in buffer._room.values():
            array.zero_()
