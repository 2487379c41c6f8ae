"""Stop 5: what is refused, with its reason, and what stops the run, naming the world."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from rustyrl.errors import ContractError, WireError
from rustyrl.rollout import EpisodeRows, Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec, MetricSpec
from rustyrl_learner.ingest import admit

STEPS = 6
INCARNATION = 3
WORLDS = (2, 5)  # of 2 slots each: columns 0, 1 are world 2, columns 2, 3 are world 5
SPEC = EnvironmentSpec(
    env="maze",
    observation=(ArraySpec("place", (3,), "float32"), ArraySpec("tile", (), "int32")),
    action=(ActionSpec("box", name="push", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),),
    slots=2,
    step_s=0.1,
    max_episode_steps=50,
    metrics=(MetricSpec("success_rate", "success", "mean"),),
)
DISCRETE = msgspec.structs.replace(SPEC, action=(ActionSpec("discrete", name="push", counts=(4,)),))
MASKED = msgspec.structs.replace(
    SPEC, action=(ActionSpec("discrete", name="push", shape=(2,), counts=(4, 3), masked=True),)
)


def valid_rollout(spec: EnvironmentSpec = SPEC) -> Rollout:
    """A death at (1, 0), truncations at (2, 1) and (4, 3), an empty slot 2 after its death at (3, 2)."""
    rng = np.random.default_rng(0)
    origin = RolloutOrigin(
        fingerprint=spec.fingerprint,
        policy_name="main",
        ticket=Ticket(batch=9, policy_version=8, worlds=WORLDS),
        learner_incarnation=INCARNATION,
        actor_index=1,
        actor_incarnation=77,
    )
    rollout = allocate_rollout(spec, STEPS, 4, origin, poison=True)
    rollout.observation["place"][...] = rng.standard_normal((STEPS + 1, 4, 3))
    rollout.observation["tile"][...] = rng.integers(0, 9, (STEPS + 1, 4))
    (part,) = spec.action
    if part.kind == "box":
        rollout.action["push"][...] = rng.standard_normal((STEPS, 4, 2))
    else:
        rollout.action["push"][...] = rng.integers(0, np.reshape(part.counts, part.shape), (STEPS, 4, *part.shape))
    if part.masked:
        rollout.action_mask["push"][...] = True
    rollout.behavior_log_prob[...] = -1
    rollout.reward[...] = rng.standard_normal((STEPS, 4))
    rollout.terminated[...] = rollout.truncated[...] = False
    rollout.valid[...] = True
    rollout.terminated[1, 0] = rollout.terminated[3, 2] = True
    rollout.valid[4:, 2] = False
    rollout.truncated[2, 1] = rollout.truncated[4, 3] = True
    rollout.final_index = np.array([[2, 1], [4, 3]], np.int32)
    rollout.final_observation = {"place": np.ones((2, 3), np.float32), "tile": np.ones(2, np.int32)}
    rollout.episodes = EpisodeRows(
        slot=np.array([0, 1, 2, 3], np.int32),
        episode_return=np.ones(4, np.float32),
        length=np.ones(4, np.int32),
        metrics={"success": np.array([1, 0, math.nan, 1], np.float32)},
    )
    return rollout


def admitted(rollout: Rollout, spec: EnvironmentSpec = SPEC) -> None:
    admit(rollout, spec, STEPS, INCARNATION)


def refused(rollout: Rollout, spec: EnvironmentSpec = SPEC) -> WireError:
    with pytest.raises(WireError) as caught:
        admitted(rollout, spec)
    return caught.value


def broken(rollout: Rollout, spec: EnvironmentSpec = SPEC) -> str:
    with pytest.raises(ContractError) as caught:
        admitted(rollout, spec)
    return str(caught.value)


@pytest.mark.parametrize("spec", [SPEC, DISCRETE, MASKED], ids=["box", "discrete", "masked"])
def test_a_valid_rollout_is_admitted(spec: EnvironmentSpec) -> None:
    admitted(valid_rollout(spec), spec)


def test_a_rollout_in_which_nothing_ended_is_admitted() -> None:
    rollout = valid_rollout()
    rollout.terminated[...] = rollout.truncated[...] = False
    rollout.valid[...] = True
    rollout.final_index = rollout.final_index[:0]
    rollout.final_observation = {name: array[:0] for name, array in rollout.final_observation.items()}
    none = np.empty(0, np.float32)
    rollout.episodes = EpisodeRows(np.empty(0, np.int32), none, np.empty(0, np.int32), {"success": none})
    admitted(rollout)


def test_truncated_steps_may_be_named_in_any_order() -> None:
    rollout = valid_rollout()
    rollout.final_index = rollout.final_index[::-1].copy()
    admitted(rollout)


def test_an_episode_metric_without_meaning_is_no_contract_error() -> None:
    rollout = valid_rollout()
    rollout.episodes.metrics["success"][:] = math.nan
    admitted(rollout)


def test_another_learner_incarnation_is_refused() -> None:
    rollout = valid_rollout()
    for incarnation in (INCARNATION - 1, INCARNATION + 1):
        rollout.origin = msgspec.structs.replace(rollout.origin, learner_incarnation=incarnation)
        assert refused(rollout).reason == "incarnation"


def test_another_environment_is_refused() -> None:
    rollout = valid_rollout()
    rollout.origin = msgspec.structs.replace(rollout.origin, fingerprint="0123456789abcdef")
    error = refused(rollout)
    assert error.reason == "fingerprint"
    assert SPEC.fingerprint in str(error)


@pytest.mark.parametrize("name", ["behavior_log_prob", "reward", "terminated", "truncated", "valid"])
@pytest.mark.parametrize(
    "change",
    [lambda a: a[1:], lambda a: a[:, 1:], lambda a: a[..., None], lambda a: a.T, lambda a: a.astype(np.int64)],
    ids=["short", "narrow", "deep", "turned", "typed"],
)
def test_a_flat_array_of_another_shape_or_type_is_refused(name: str, change: Callable[[Any], Any]) -> None:
    rollout = valid_rollout()
    setattr(rollout, name, change(getattr(rollout, name)))
    error = refused(rollout)
    assert error.reason == "shape"
    assert name in str(error)


@pytest.mark.parametrize(("group", "name"), [("observation", "place"), ("observation", "tile"), ("action", "push")])
@pytest.mark.parametrize(
    "change",
    [lambda a: a[1:], lambda a: a[:, 1:], lambda a: a[..., None], lambda a: a.astype(np.int64)],
    ids=["short", "narrow", "deep", "typed"],
)
def test_a_named_array_of_another_shape_or_type_is_refused(group: str, name: str, change: Callable[[Any], Any]) -> None:
    rollout = valid_rollout()
    getattr(rollout, group)[name] = change(getattr(rollout, group)[name])
    error = refused(rollout)
    assert error.reason == "shape"
    assert f"{group}.{name}" in str(error)


@pytest.mark.parametrize("group", ["observation", "action", "action_mask"])
def test_arrays_that_are_missing_or_unknown_are_refused(group: str) -> None:
    rollout = valid_rollout(MASKED)
    arrays = getattr(rollout, group)
    name, array = arrays.popitem()
    assert refused(rollout, MASKED).reason == "shape"
    arrays[name] = arrays["other"] = array
    assert refused(rollout, MASKED).reason == "shape"


def test_a_mask_of_what_is_not_masked_is_refused() -> None:
    rollout = valid_rollout(DISCRETE)
    rollout.action_mask["push"] = np.ones((STEPS + 1, 4, 4), bool)
    error = refused(rollout, DISCRETE)
    assert error.reason == "shape"
    assert "action_mask.push" in str(error)


def test_a_rollout_of_another_length_than_the_run_is_refused() -> None:
    rollout = valid_rollout()
    with pytest.raises(WireError, match=r"^shape"):
        admit(rollout, SPEC, STEPS + 1, INCARNATION)


def test_a_rollout_of_fewer_worlds_than_its_ticket_is_refused() -> None:
    rollout = valid_rollout()
    rollout.origin = msgspec.structs.replace(rollout.origin, ticket=Ticket(9, 8, (2, 5, 6)))
    assert refused(rollout).reason == "shape"


@pytest.mark.parametrize("choice", [-1, 4, 1 << 40])
def test_a_choice_that_does_not_exist_is_refused(choice: int) -> None:
    rollout = valid_rollout(DISCRETE)
    rollout.action["push"][3, 1] = choice
    error = refused(rollout, DISCRETE)
    assert error.reason == "action"
    assert "a choice of 'push' outside its 4 choices" in str(error)


@pytest.mark.parametrize("choice", [[4, 0], [0, 3], [3, 3], [-1, 0], [0, -1]])
def test_every_choice_is_held_against_its_own_count(choice: list[int]) -> None:
    rollout = valid_rollout(MASKED)
    rollout.action["push"][3, 1] = choice
    error = refused(rollout, MASKED)
    assert error.reason == "action"
    assert "outside its 4 x 3 choices" in str(error)


@pytest.mark.parametrize(("choice", "column"), [(0, 2), (1, 4 + 1)])
def test_a_choice_that_its_mask_forbids_is_refused(choice: int, column: int) -> None:
    rollout = valid_rollout(MASKED)
    rollout.action["push"][3, 1] = (2, 1)
    rollout.action_mask["push"][3, 1, column] = False
    error = refused(rollout, MASKED)
    assert error.reason == "action"
    assert "a choice of 'push' that its mask does not allow" in str(error)
    rollout.action["push"][3, 1, choice] = 0  # another one is allowed
    admitted(rollout, MASKED)


def test_what_a_mask_says_of_the_next_step_or_of_an_empty_slot_forbids_nothing() -> None:
    rollout = valid_rollout(MASKED)
    rollout.action_mask["push"][STEPS] = False  # nobody has chosen there
    rollout.action_mask["push"][5, 2] = False  # nobody is there
    admitted(rollout, MASKED)


@pytest.mark.parametrize(
    "index",
    [
        np.array([[2, 1]], np.int32),
        np.array([[2, 1], [4, 2]], np.int32),
        np.array([[2, 1], [2, 1]], np.int32),
        np.array([[2, 1], [4, 3], [4, 3]], np.int32),
        np.array([[2, 1], [-2, -1]], np.int32),
        np.array([[1, 2], [3, 4]], np.int32),
        np.empty((0, 2), np.int32),
        np.array([[2, 1], [4, 3]], np.int64),
        np.array([2, 1], np.int32),
        np.array([[2, 1, 0], [4, 3, 0]], np.int32),
        np.array(2, np.int32),
    ],
)
def test_a_final_index_that_does_not_match_the_truncated_flags_is_refused(index: Any) -> None:
    rollout = valid_rollout()
    rollout.final_index = index
    rollout.final_observation = {
        "place": np.ones((index.shape[0] if index.ndim else 1, 3), np.float32),
        "tile": np.ones(index.shape[0] if index.ndim else 1, np.int32),
    }
    assert refused(rollout).reason == "final"


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("place", np.ones((1, 3), np.float32)),
        ("place", np.ones((2, 2), np.float32)),
        ("place", np.ones((2, 3), np.float64)),
        ("tile", np.ones((2, 1), np.int32)),
        ("tile", np.ones(2, np.int64)),
        ("stranger", np.ones(2, np.float32)),
        ("stranger", np.array(math.nan, np.float32)),
        ("place", None),
    ],
)
def test_final_observations_of_another_shape_type_or_name_are_refused(name: str, array: Any) -> None:
    rollout = valid_rollout()
    if array is None:
        del rollout.final_observation[name]
    else:
        rollout.final_observation[name] = array
    assert refused(rollout).reason == "final"


@pytest.mark.parametrize(
    ("field", "column"),
    [
        ("slot", np.zeros(3, np.int32)),
        ("slot", np.zeros(4, np.int64)),
        ("slot", np.array([0, 1, 2, 4], np.int32)),
        ("slot", np.array([0, 1, 2, -1], np.int32)),
        ("slot", np.zeros((4, 1), np.int32)),
        ("slot", np.array(0, np.int32)),
        ("episode_return", np.zeros(3, np.float32)),
        ("episode_return", np.zeros((4, 1), np.float32)),
        ("episode_return", np.zeros(4, np.int32)),
        ("episode_return", np.array([0, 1, math.inf, 3], np.float32)),
        ("length", np.zeros(5, np.int32)),
        ("length", np.zeros(4, np.float32)),
        ("metrics", {"success": np.zeros(4, np.int32)}),
        ("metrics", {"success": np.zeros(3, np.float32)}),
        ("metrics", {}),
        ("metrics", {"success": np.zeros(4, np.float32), "stranger": np.zeros(4, np.float32)}),
    ],
)
def test_columns_of_episodes_that_do_not_agree_are_refused(field: str, column: Any) -> None:
    rollout = valid_rollout()
    rollout.episodes = replace(rollout.episodes, **{field: column})
    assert refused(rollout).reason == "episodes"


WHERE_3 = "world 5 of 'maze', slot 1, step 2 of batch 9"  # column 3


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_an_observation_that_is_not_finite_stops_the_run(number: float) -> None:
    rollout = valid_rollout()
    rollout.observation["place"][2, 3, 1] = number
    message = broken(rollout)
    assert WHERE_3 in message
    assert "'place'" in message
    assert str(np.float32(number)) in message


def test_numbers_whose_squares_are_not_finite_are_admitted() -> None:
    rollout = valid_rollout()
    rollout.observation["place"][2, 3, 1] = -3e38
    rollout.final_observation["place"][1, 2] = 3e38
    admit(rollout, SPEC, STEPS, INCARNATION)


def test_the_bootstrap_observation_is_looked_at_too() -> None:
    rollout = valid_rollout()
    rollout.observation["place"][STEPS, 0, 0] = math.nan
    assert f"world 2 of 'maze', slot 0, step {STEPS} of batch 9" in broken(rollout)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_the_run(number: float) -> None:
    rollout = valid_rollout()
    rollout.reward[2, 3] = number
    message = broken(rollout)
    assert WHERE_3 in message
    assert "reward" in message


@pytest.mark.parametrize(("column", "world", "slot"), [(0, 2, 0), (1, 2, 1), (2, 5, 0), (3, 5, 1)])
def test_the_world_and_slot_of_every_column_are_named(column: int, world: int, slot: int) -> None:
    rollout = valid_rollout()
    rollout.reward[0, column] = math.nan
    assert broken(rollout).startswith(f"world {world} of 'maze', slot {slot}, step 0 of batch 9")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_final_observation_that_is_not_finite_stops_the_run(order: list[int]) -> None:
    rollout = valid_rollout()
    rollout.final_observation["place"][1, 2] = math.nan
    rollout.final_index = rollout.final_index[order]
    rollout.final_observation["place"] = rollout.final_observation["place"][order]
    message = broken(rollout)
    assert "world 5 of 'maze', slot 1, step 4 of batch 9" in message
    assert "final observation 'place'" in message


@pytest.mark.parametrize("name", ["action", "behavior_log_prob"])
def test_an_action_that_is_not_finite_stops_the_run(name: str) -> None:
    rollout = valid_rollout()
    array = rollout.action["push"] if name == "action" else rollout.behavior_log_prob
    array[2, 3] = math.nan
    message = broken(rollout)
    assert WHERE_3 in message
    assert name in message


def test_an_agent_that_vanishes_without_a_flag_stops_the_run() -> None:
    rollout = valid_rollout()
    rollout.valid[3, 3] = False  # it was there in step 2
    message = broken(rollout)
    assert WHERE_3 in message
    assert "gone" in message


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_an_agent_may_be_gone_after_an_end(flag: str) -> None:
    rollout = valid_rollout()
    rollout.terminated[3, 2] = flag == "terminated"
    if flag == "truncated":
        rollout.truncated[3, 2] = True
        rollout.final_index = np.array([[2, 1], [3, 2], [4, 3]], np.int32)
        rollout.final_observation = {"place": np.ones((3, 3), np.float32), "tile": np.ones(3, np.int32)}
    admitted(rollout)


def test_an_agent_may_come_into_an_empty_slot() -> None:
    rollout = valid_rollout()
    rollout.valid[:3, 2] = False
    admitted(rollout)


def test_a_step_with_both_flags_stops_the_run() -> None:
    rollout = valid_rollout()
    rollout.terminated[4, 3] = True
    message = broken(rollout)
    assert "world 5 of 'maze', slot 1, step 4 of batch 9" in message
    assert "both terminated and truncated" in message


def test_nothing_is_written_into_the_rollout() -> None:
    rollout = valid_rollout()
    assert rollout.storage is not None
    before = rollout.storage.copy()
    rollout.storage.flags.writeable = False
    admitted(rollout)
    np.testing.assert_array_equal(rollout.storage, before)
