"""``gym:ID``: Gymnasium's spaces, ways of resetting, IDs and liberties; the environments are known by heart."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray
from worlds import gym_worlds
from worlds.gym_worlds import ACTIONS, CALLS, GIVEN, LIMIT, OPEN, TOP, UNSUPPORTED

from rustyrl.errors import ContractError, UsageError
from rustyrl.rollout import Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import EnvironmentSpec, read_spec, spec_to_json
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, Weights, weights_layout
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import StepRows, allocate_rows
from rustyrl_actors.evaluate import evaluate
from rustyrl_actors.gym_environment import GymEnvironment
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll
from rustyrl_learner.ingest import admit

SLOTS = 3
BATCH = "gym:tests/LadderBatch-v0"
# The same game in every form, and whether resetting takes an env step.
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "copies": ("gym:tests/Ladder-v0", {}, False),
    "next-step": (BATCH, {"mode": "NEXT_STEP"}, True),
    "next-step-dict": (BATCH, {"mode": "NEXT_STEP", "form": "dict"}, True),
    "next-step-silent": (BATCH, {"mode": "NEXT_STEP", "silent": True}, True),
    "same-step-objects": (BATCH, {"mode": "SAME_STEP"}, False),
    "same-step-stack": (BATCH, {"mode": "SAME_STEP", "final": "stack"}, False),
    "same-step-dict-objects": (BATCH, {"mode": "SAME_STEP", "form": "dict"}, False),
    "same-step-dict-stack": (BATCH, {"mode": "SAME_STEP", "form": "dict", "final": "stack"}, False),
    "same-step-dict-info": (BATCH, {"mode": "SAME_STEP", "form": "dict", "final": "info"}, False),
    "same-step-tuple-objects": (BATCH, {"mode": "SAME_STEP", "form": "tuple"}, False),
    "same-step-tuple-stack": (BATCH, {"mode": "SAME_STEP", "form": "tuple", "final": "stack"}, False),
    "same-step-silent": (BATCH, {"mode": "SAME_STEP", "silent": True}, False),
    "disabled": (BATCH, {"mode": "DISABLED"}, False),
    "disabled-tuple": (BATCH, {"mode": "DISABLED", "form": "tuple"}, False),
}
EVERY = pytest.mark.parametrize("variant", list(VARIANTS))
# What each slot does in each step of each climb: the same whatever the variant, so the climbs are the same.
MOVES = np.random.default_rng(0).choice(4, (SLOTS, 100, LIMIT), p=[0.25, 0.35, 0.25, 0.15])

Made = tuple[GymEnvironment, StepRows]


@pytest.fixture
def make() -> Iterator[Any]:
    """Make environments by ID, reset with a seed; all are closed after the test."""
    made: list[Any] = []

    def begin(env: str, seed: tuple[int, ...] = (1,), **settings: Any) -> Made:
        source = find_environment(env, {"slots": SLOTS, **settings})
        environment, rows = source.make(), allocate_rows(source.spec)
        made.append(environment)
        environment.reset(seed, rows)
        assert isinstance(environment, GymEnvironment)
        return environment, rows

    yield begin
    for environment in made:
        environment.close()


@dataclass(frozen=True)
class Climb:
    """An episode: what it paid, how it ended, and the climb, step and height that were seen last."""

    episode_return: float
    length: int
    terminated: bool
    last: tuple[float, ...]


def literal_climb(slot: int, climb: int) -> Climb:
    """The game, told once more in plain Python."""
    height, total = 0, 0.0
    for step in range(1, LIMIT + 1):
        move = int(MOVES[slot, climb, step - 1])
        height += move
        total += move + step / 4
        if height >= TOP:
            break
    return Climb(total, step, height >= TOP, (climb, step, height))


def places(observation: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Climb, step and height of each row, out of any of the three forms."""
    if "main" in observation:
        return np.array(observation["main"])
    place = observation["_place"] if "_place" in observation else observation["item_0"]
    height = observation["height"] if "height" in observation else observation["item_1"]
    assert height.dtype == bool
    assert (height.sum(axis=1) == 1).all()
    return np.column_stack([place, height.argmax(axis=1)])


@EVERY
def test_a_game_goes_the_same_whatever_way_its_batch_resets(make: Any, variant: str) -> None:
    env, settings, takes_a_step = VARIANTS[variant]
    environment, rows = make(env, **settings)
    climbs: list[list[Climb]] = [[] for _ in range(SLOTS)]
    resetting = np.zeros(SLOTS, bool)
    assert places(rows.observation).tolist() == [[0, 0, 0]] * SLOTS
    for _ in range(120):
        seen = places(rows.observation)
        moves = [MOVES[slot, int(seen[slot, 0]), min(int(seen[slot, 1]), LIMIT - 1)] for slot in range(SLOTS)]
        outcome = environment.step({"main": np.array(moves)}, rows)
        assert rows.valid.tolist() == (~resetting).tolist()
        assert (rows.reward[resetting] == 0).all()
        assert not (rows.terminated & rows.truncated).any()
        ended = rows.terminated | rows.truncated
        assert not (ended & resetting).any()
        if outcome.episodes is None:
            assert outcome.final_observation is None
            assert not ended.any()
        else:
            assert outcome.final_observation is not None
            assert outcome.episodes.slot.tolist() == np.flatnonzero(ended).tolist()
            for i, last in enumerate(places(outcome.final_observation)):
                slot = int(outcome.episodes.slot[i])
                paid, length = float(outcome.episodes.episode_return[i]), int(outcome.episodes.length[i])
                climbs[slot].append(Climb(paid, length, bool(rows.terminated[slot]), tuple(last.tolist())))
        after = places(rows.observation)
        for slot in np.flatnonzero(resetting | (ended & (not takes_a_step))):
            assert after[slot].tolist() == [len(climbs[slot]), 0, 0]
        for slot in np.flatnonzero(~ended & ~resetting):
            assert after[slot, :2].tolist() == [len(climbs[slot]), seen[slot, 1] + 1]
        resetting = ended & takes_a_step
    for slot, found in enumerate(climbs):
        assert found == [literal_climb(slot, climb) for climb in range(len(found))]
        assert len(found) > 10
    assert {climb.terminated for found in climbs for climb in found} == {True, False}
    cut_at_top = [c for found in climbs for c in found if c.length == LIMIT and c.last[2] >= TOP]
    assert cut_at_top  # the last step of the limit was also the top: terminated wins
    assert all(climb.terminated for climb in cut_at_top)


def weights_of(spec: EnvironmentSpec) -> Weights:
    """A policy that does now this, now that."""
    policy = PolicySpec(spec.observation, spec.action, (8,), "tanh", normalize=False)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in weights_layout(policy).items()}
    if "log_std" in arrays:
        arrays["log_std"][:] = 2.0  # wide, so that the bounds are met
    return Weights(policy, arrays)


def record(env: str, settings: dict[str, Any], *, steps: int = 40, batches: int = 2, seed: int = 1) -> list[Rollout]:
    """What an actor records of one world under a random policy, held against what the learner admits."""
    source = find_environment(env, {"slots": SLOTS, **settings})
    spec = source.spec
    assert read_spec(spec_to_json(spec)) == spec
    found = []
    with closing(source.make()) as environment:
        now = allocate_rows(spec)
        environment.reset((seed,), now)
        policy = Policy(weights_of(spec), spec.slots)
        for batch in range(batches):
            origin = RolloutOrigin(spec.fingerprint, "main", Ticket(batch, 0, (0,)), 0, 0, 0)
            noise = allocate_noise(spec, steps, spec.slots)
            fill_noise(noise, spec, slice(0, spec.slots), noise_generator(seed, 0, batch))
            rollout = allocate_rollout(spec, steps, spec.slots, origin, poison=True)
            buffer = UnrollBuffer(rollout, [slice(0, spec.slots)], noise)
            unroll([OwnedWorld(0, environment, batch, now)], policy, buffer, Stages())
            admit(rollout, spec, steps, 0)
            found.append(rollout)
    return found


@EVERY
def test_what_is_recorded_is_admitted_and_bootstraps_from_what_was_seen_last(variant: str) -> None:
    env, settings, takes_a_step = VARIANTS[variant]
    before = np.zeros(SLOTS, bool)  # who ended in the step before
    cut = 0
    for rollout in record(env, settings, steps=41):
        ended = rollout.terminated | rollout.truncated
        for t in range(41):
            assert rollout.valid[t].tolist() == (~(before & takes_a_step)).tolist()
            assert (rollout.reward[t][~rollout.valid[t]] == 0).all()
            before = ended[t]
        for flags in (rollout.valid, rollout.terminated, rollout.truncated):
            assert flags.view(np.uint8).max() <= 1  # nothing is left of the poison
        seen = np.stack([places({name: array[t] for name, array in rollout.observation.items()}) for t in range(42)])
        assert rollout.final_index.tolist() == np.argwhere(rollout.truncated).tolist()
        last = places(rollout.final_observation) if len(rollout.final_index) else np.empty((0, 3))
        for (t, slot), (climb, step, height) in zip(rollout.final_index, last, strict=True):
            cut += 1
            assert [climb, step] == [seen[t, slot, 0], LIMIT] == [seen[t, slot, 0], seen[t, slot, 1] + 1]
            assert height == seen[t, slot, 2] + rollout.action["main"][t, slot]
            if takes_a_step:
                assert seen[t + 1, slot].tolist() == [climb, step, height]
    assert cut > 3


def test_a_batch_is_stepped_once_for_each_step(make: Any) -> None:
    environment, rows = make(BATCH, slots=50)
    CALLS.clear()
    for _ in range(5):
        environment.step({"main": np.zeros(50, np.int64)}, rows)
    assert CALLS == ["step"] * 5


def test_a_batch_without_resets_is_reset_once_for_all_that_ended(make: Any) -> None:
    environment, rows = make(BATCH, slots=50, mode="DISABLED")
    CALLS.clear()
    for _ in range(3):
        environment.step({"main": np.full(50, 3)}, rows)
    assert CALLS == ["step"] * 3 + ["reset"]
    assert rows.terminated.all()


def test_a_same_step_reset_without_final_observations_is_a_contract_error(make: Any) -> None:
    environment, rows = make(BATCH, mode="SAME_STEP", final="none")
    for _ in range(2):
        environment.step({"main": np.full(SLOTS, 3)}, rows)
    with pytest.raises(ContractError, match=r"LadderBatch.*same step.*final_obs"):
        environment.step({"main": np.full(SLOTS, 3)}, rows)


def test_a_batch_of_a_size_of_its_own_is_refused_with_the_size_to_set() -> None:
    with pytest.raises(UsageError, match=r"batches of 3; set env.slots"):
        find_environment("gym:tests/Fixed-v0", {"slots": 4})
    with closing(find_environment("gym:tests/Fixed-v0", {"slots": 3}).make()) as environment:
        assert environment.spec.slots == 3


def hot(*choices: tuple[int, int]) -> list[bool]:
    """Choices among so many, one-hot and joined."""
    return [i == choice for choice, count in choices for i in range(count)]


def zoo_arrays(t: int) -> dict[str, Any]:
    """What `Zoo` shows, as it must arrive: literally."""
    return {
        "a_b__": [t, -t],
        "choice": hot((t, 4)),
        "codes": hot((t, 4), (t + 1, 5)),
        "grid": hot((t, 4), (t + 1, 5), (5 - t, 6), (3 - t, 4)),
        "flags": [[t == 0, t == 1], [t == 2, t == 3]],
        "image": [[[200 + t] * 3] * 3] * 4,
        "exact": [[np.float32(t / 3)], [np.float32(-t / 3)]],
        "scalar": t / 2,
        "whole": [-t, t],
        "deep.item_0": hot((t, 5)),
        "deep.item_1.x": [t + 0.25],
    }


ZOO = {
    "copies": ("gym:tests/Zoo-v0", {}, False),
    "next-step": ("gym:tests/ZooBatch-v0", {"mode": "NEXT_STEP"}, True),
    "same-step": ("gym:tests/ZooBatch-v0", {"mode": "SAME_STEP"}, False),
    "disabled": ("gym:tests/ZooBatch-v0", {"mode": "DISABLED"}, False),
}


@pytest.mark.parametrize("variant", list(ZOO))
def test_every_kind_of_observation_arrives_as_a_flat_named_array(make: Any, variant: str) -> None:
    env, settings, takes_a_step = ZOO[variant]
    environment, rows = make(env, **settings)
    dtypes = {array.name: array.dtype for array in environment.spec.observation}
    assert sorted(dtypes) == sorted(zoo_arrays(0))
    bools = {"choice", "codes", "grid", "flags", "deep.item_0"}
    assert {name for name, dtype in dtypes.items() if dtype == "bool"} == bools
    assert {name for name, dtype in dtypes.items() if dtype == "uint8"} == {"image"}

    def check(arrays: dict[str, NDArray[Any]], row: int, t: int) -> None:
        for name, expected in zoo_arrays(t).items():
            assert arrays[name].dtype == dtypes[name]
            assert arrays[name][row].tolist() == np.array(expected, dtypes[name]).tolist(), name

    clock = [0] * SLOTS
    ends = set()
    moves = np.random.default_rng(3)
    for _ in range(30):
        outcome = environment.step({"main": moves.integers(0, 2, SLOTS)}, rows)
        for slot in range(SLOTS):
            clock[slot] = clock[slot] + 1 if rows.valid[slot] else 0
        if outcome.episodes is not None:
            assert outcome.final_observation is not None
            for row, slot in enumerate(outcome.episodes.slot):
                ends.add((clock[slot], bool(rows.terminated[slot])))
                check(outcome.final_observation, row, clock[slot])
                if not takes_a_step:
                    clock[slot] = 0
        for slot in range(SLOTS):
            check(rows.observation, slot, clock[slot])
    assert ends == {(2, True), (3, False)}


@pytest.mark.parametrize("variant", list(ZOO))
def test_every_kind_of_observation_is_recorded_and_admitted(variant: str) -> None:
    env, settings, _ = ZOO[variant]
    rollouts = record(env, settings)
    assert any(rollout.terminated.any() for rollout in rollouts)
    assert any(rollout.truncated.any() for rollout in rollouts)


@pytest.mark.parametrize("kind", list(ACTIONS))
@pytest.mark.parametrize("env", ["gym:tests/Actor-v0", "gym:tests/ActorBatch-v0"], ids=["copies", "batch"])
def test_every_kind_of_action_arrives_within_its_space(env: str, kind: str) -> None:
    GIVEN.clear()
    (rollout,) = record(env, {"kind": kind}, batches=1, steps=60)  # the environments hold it against their spaces
    copies = env == "gym:tests/Actor-v0"
    assert len(GIVEN) == (60 * SLOTS if copies else 60)
    assert rollout.valid.all()
    if copies and kind != "box-endless":
        extremes(ACTIONS[kind], GIVEN)


def extremes(space: spaces.Space[Any], given: list[Any]) -> None:
    """Every choice was made at some time, every finite bound was met."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            extremes(part, [one[key] for one in given])
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            extremes(part, [one[index] for one in given])
    elif isinstance(space, spaces.Box):
        assert all(isinstance(one, np.ndarray) and one.dtype == space.dtype for one in given)
        low, high = np.min(given, axis=0), np.max(given, axis=0)
        for met, bound in ((low, space.low), (high, space.high)):
            np.testing.assert_allclose(met[np.isfinite(bound)], bound[np.isfinite(bound)], rtol=1e-6)
        assert (low < high).all()
    else:
        low = np.asarray(getattr(space, "start", 0))
        count = getattr(space, "nvec", getattr(space, "n", 2))
        count = 2 if isinstance(space, spaces.MultiBinary) else np.asarray(count)
        assert (np.min(given, axis=0) == low).all()
        assert (np.max(given, axis=0) == low + count - 1).all()


@pytest.mark.parametrize("kind", ["box-endless", "box-half-endless"])
def test_endless_bounds_survive_the_spec_file(kind: str) -> None:
    spec = find_environment("gym:tests/Actor-v0", {"kind": kind}).spec
    (part,) = read_spec(spec_to_json(spec)).action
    assert np.isfinite([*part.low, *part.high]).all()
    assert max(part.high) > 1e38


@pytest.mark.parametrize("kind", sorted(set(UNSUPPORTED) - {"whole-box"}))
def test_an_observation_that_no_policy_is_for_is_refused_in_words(kind: str) -> None:
    with pytest.raises(UsageError, match=r"tests/Odd-v0': observation .*expected Box, Discrete"):
        find_environment("gym:tests/Odd-v0", {"observation": kind})


@pytest.mark.parametrize("kind", sorted(set(UNSUPPORTED) - {"huge", "whole-box"}))
def test_an_action_that_no_policy_is_for_is_refused_in_words(kind: str) -> None:
    with pytest.raises(UsageError, match=r"tests/Odd-v0': action .*expected Discrete"):
        find_environment("gym:tests/Odd-v0", {"action": kind})


LIBERTIES = [{"reward": reward} for reward in gym_worlds.LOOSE_REWARDS]
LIBERTIES += [{"observation": observation} for observation in gym_worlds.LOOSE_OBSERVATIONS]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's checker says what is not right, and goes on
@pytest.mark.parametrize("settings", LIBERTIES, ids=lambda s: "-".join(*s.items()))
def test_liberties_that_mean_something_are_taken(make: Any, settings: dict[str, str]) -> None:
    environment, rows = make("gym:tests/Loose-v0", **settings)
    ends = 0
    for _ in range(20):
        ends += environment.step({"main": np.zeros(SLOTS, np.int64)}, rows).episodes is not None
        assert rows.reward.tolist() == [1.0] * SLOTS
        fresh = rows.terminated
        assert rows.observation["main"].tolist() == [[0.0 if new else 1.0, 2.0] for new in fresh]
    assert ends >= 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("spoil", list(gym_worlds.SPOILT_OBSERVATIONS))
def test_an_observation_that_means_nothing_is_a_contract_error(make: Any, spoil: str) -> None:
    environment, rows = make("gym:tests/Loose-v0", spoil=spoil, disable_env_checker=True)
    with pytest.raises(ContractError, match=r"tests/Loose-v0': an observation is not what its space Box"):
        environment.step({"main": np.zeros(SLOTS, np.int64)}, rows)


def test_an_observation_that_lies_on_its_side_is_a_contract_error() -> None:
    with closing(find_environment("gym:tests/Turned-v0", {"disable_env_checker": True}).make()) as environment:
        with pytest.raises(ContractError, match=r"expected shape \(16, 2, 3\), got \(16, 3, 2\)"):
            environment.reset((1,), allocate_rows(environment.spec))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_reward_that_is_no_number_is_a_contract_error(make: Any) -> None:
    environment, rows = make("gym:tests/Loose-v0", reward="none", disable_env_checker=True)
    with pytest.raises(ContractError, match=r"tests/Loose-v0': expected a number as reward, got None"):
        environment.step({"main": np.zeros(SLOTS, np.int64)}, rows)


@pytest.mark.parametrize("choice", [-1, 2])
def test_a_choice_outside_the_declared_ones_is_a_contract_error(make: Any, choice: int) -> None:
    environment, rows = make("gym:tests/SpoiltChoice-v0", choice=choice, disable_env_checker=True)
    with pytest.raises(ContractError, match="outside MultiDiscrete"):
        environment.step({"main": np.zeros(SLOTS, np.int64)}, rows)


def test_keyword_arguments_reach_the_environment_and_its_spec(make: Any) -> None:
    environment, rows = make("gym:tests/Sized-v0", size=5, gain=2.5, render_mode="rgb_array")
    assert environment.spec.observation[0].shape == (5,)
    assert environment.spec.parameters == {"size": 5, "gain": 2.5, "render_mode": "rgb_array"}
    environment.step({"main": np.zeros(SLOTS, np.int64)}, rows)
    assert rows.reward.tolist() == [2.5] * SLOTS
    other = find_environment("gym:tests/Sized-v0", {"slots": SLOTS, "size": 5, "render_mode": "rgb_array"})
    assert other.spec.fingerprint != environment.spec.fingerprint


@pytest.mark.parametrize(
    ("env", "settings", "said"),
    [
        ("gym:tests/Nope-v0", {}, "Nope"),
        ("gym:CartPoe-v1", {}, "Did you mean: `CartPole`"),
        ("gym:CartPole", {}, "say which version, CartPole-v0 or CartPole-v1"),
        ("gym:CartPole-v77", {}, "CartPole-v77"),
        ("gym:", {}, "gym:"),
        ("gym:no_such_module_of_tests:X-v0", {}, "No module named 'no_such_module_of_tests'"),
        ("gym:tests/Nowhere-v0", {}, "No module named 'no_such_module_of_tests'"),
        ("gym:tests/Sized-v0", {}, "missing 1 required positional argument: 'size'"),
        ("gym:tests/Sized-v0", {"size": 0}, "does not take env.size=0: ValueError: a size of 0"),
        ("gym:tests/Sized-v0", {"size": 2, "colour": "red"}, "unexpected keyword argument 'colour'"),
        ("gym:CartPole-v1", {"gravity": 3}, "unexpected keyword argument 'gravity'"),
        ("gym:FrozenLake-v1", {"map_name": "5x5"}, "env.map_name='5x5': KeyError"),
        ("gym:tests/Ladder-v0", {"slots": 0}, "env.slots is 0"),
    ],
)
def test_what_leads_nowhere_or_does_not_fit_is_a_usage_error(env: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_environment(env, settings)
    assert said in str(caught.value)
    assert env in str(caught.value) or "slots" in settings


def test_a_bug_in_a_constructor_keeps_its_own_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug of its own"):
        find_environment("gym:tests/Fragile-v0", {})


def test_a_module_is_imported_for_its_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shelf_of_the_tests.py").write_text(
        "import gymnasium\ngymnasium.register('shelf/Ladder-v0', 'worlds.gym_worlds:Ladder')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError):
        find_environment("gym:shelf/Ladder-v0", {})
    with closing(find_environment("gym:shelf_of_the_tests:shelf/Ladder-v0", {"slots": 2}).make()) as environment:
        assert environment.spec.env == "gym:shelf_of_the_tests:shelf/Ladder-v0"
        rows = allocate_rows(environment.spec)
        environment.reset((1,), rows)
        environment.step({"main": np.array([1, 2])}, rows)
        assert rows.observation["main"].tolist() == [[0, 1, 1], [0, 1, 2]]


def test_every_copy_is_closed_also_when_making_them_fails() -> None:
    source = find_environment("gym:tests/Counted-v0", {"slots": 5})
    assert not OPEN
    with closing(source.make()):
        assert len(OPEN) == 5
    assert not OPEN
    source = find_environment("gym:tests/Counted-v0", {"slots": 5, "break_third": True})
    with pytest.raises(UsageError, match="no third one"):
        source.make()
    assert not OPEN


def flat(rollouts: list[Rollout]) -> NDArray[np.float64]:
    arrays = [[*r.observation.values(), r.reward, r.terminated, r.valid] for r in rollouts]
    return np.concatenate([array.ravel().astype(np.float64) for group in arrays for array in group])


@pytest.mark.parametrize(
    ("env", "settings"),
    [("gym:CartPole-v1", {}), ("gym:MountainCar-v0", {}), ("gym:tests/Sized-v0", {"size": 2}), ("gym:Taxi-v4", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_seed_repeats_and_another_does_not(env: str, settings: dict[str, Any]) -> None:
    first, again, other = (flat(record(env, settings, batches=1, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


def test_copies_start_differently(make: Any) -> None:
    _, rows = make("gym:tests/Sized-v0", size=1, slots=20)
    assert len(set(rows.observation["main"].ravel().tolist())) == 20


def test_reset_begins_anew_whatever_went_before(make: Any) -> None:
    environment, rows = make("gym:tests/Ladder-v0")
    for _ in range(2):
        environment.step({"main": np.array([3, 1, 0])}, rows)
    environment.reset((1,), rows)
    assert rows.observation["main"].tolist() == [[0, 0, 0]] * SLOTS
    for _ in range(2):
        environment.step({"main": np.full(SLOTS, 3)}, rows)
    outcome = environment.step({"main": np.full(SLOTS, 3)}, rows)
    assert outcome.episodes is not None
    assert outcome.episodes.length.tolist() == [3] * SLOTS
    assert outcome.episodes.episode_return.tolist() == [9 + 6 / 4] * SLOTS


def test_threshold_limit_and_speed_come_from_the_registration() -> None:
    cartpole = find_environment("gym:CartPole-v1", {}).spec
    assert (cartpole.goal, cartpole.max_episode_steps, cartpole.step_s) == (("return_mean>=484.5",), 500, 0.02)
    ladder = find_environment("gym:tests/Ladder-v0", {}).spec
    assert ladder.goal == ("return_mean>=12.592592478",)  # 2 % above 12.3456789
    assert find_environment("gym:Acrobot-v1", {}).spec.goal == ("return_mean>=-98",)
    assert (ladder.max_episode_steps, ladder.step_s) == (2**31 - 1, 0.25)  # its own limit nobody is told of
    assert find_environment("gym:tests/Zoo-v0", {}).spec.goal == ()


@pytest.mark.parametrize("env", ["gym:CartPole-v1", "gym:MountainCar-v0"])  # a batch, and copies
def test_the_step_limit_can_be_set(make: Any, env: str) -> None:
    environment, rows = make(env, max_episode_steps=4)
    assert environment.spec.max_episode_steps == 4
    for step in range(1, 5):
        environment.step({"main": np.array([0, 1, 0])}, rows)
        assert rows.truncated.tolist() == [step == 4] * SLOTS


def test_first_episodes_of_copies_end_at_different_times_and_are_truncated() -> None:
    """MountainCar rolls to and fro in the valley until its limit."""
    source = find_environment("gym:MountainCar-v0", {"slots": 8, "max_episode_steps": 40})
    rows = allocate_rows(source.spec)
    ends: dict[int, list[int]] = {slot: [] for slot in range(8)}
    with closing(source.make(stagger=True)) as environment:
        environment.reset((3, 0, 0), rows)
        for step in range(1, 101):
            before = {name: array.copy() for name, array in rows.observation.items()}
            said = environment.step({"main": np.ones(8, np.int64)}, rows)
            assert not rows.terminated.any()
            cut = np.flatnonzero(rows.truncated)
            for slot in cut:
                ends[slot].append(step)
            if cut.size:
                assert said.episodes is not None
                assert said.final_observation is not None
                assert said.episodes.slot.tolist() == cut.tolist()
                moved = said.final_observation["main"][:, 0] - before["main"][cut, 0]
                np.testing.assert_allclose(moved, said.final_observation["main"][:, 1], atol=1e-6)  # by its velocity
    firsts = [steps[0] for steps in ends.values()]
    assert len(set(firsts)) > 4
    assert max(firsts) <= 40
    assert all((np.diff(steps) == 40).all() for steps in ends.values())


@pytest.mark.parametrize("env", ["gym:CartPole-v1", "gym:MountainCar-v0"])
def test_the_step_limit_can_be_taken_away(make: Any, env: str) -> None:
    environment, rows = make(env, max_episode_steps=-1)
    assert environment.spec.max_episode_steps == 2**31 - 1
    for _ in range(3):
        environment.step({"main": np.array([0, 1, 0])}, rows)
        assert not rows.truncated.any()


def test_an_environment_without_a_limit_is_recorded() -> None:
    (rollout,) = record("gym:tests/Sized-v0", {"size": 1}, batches=1)
    assert not rollout.truncated.any()
    assert rollout.episodes.slot.size == 0


def test_wrappers_of_the_registration_stay_on(make: Any) -> None:
    environment, rows = make("gym:tests/Stacked-v0")  # CartPole, three observations stacked, 20 steps
    assert environment.spec.observation[0].shape == (3, 4)
    assert environment.spec.max_episode_steps == 20
    before = rows.observation["main"].copy()
    environment.step({"main": np.array([0, 1, 0])}, rows)
    np.testing.assert_array_equal(rows.observation["main"][:, :2], before[:, 1:])
    assert (rows.observation["main"][:, 2] != before[:, 2]).any()


def test_one_hot_observations_are_not_normalized() -> None:
    assert find_environment("gym:Taxi-v4", {}).spec.defaults == {"policy": {"normalize": False}}
    assert find_environment("gym:CartPole-v1", {}).spec.defaults == {}


def test_rustyrls_own_worlds_work_through_gymnasium_and_back(make: Any) -> None:
    through, rows = make("gym:rustyrl_actors:rustyrl/CartPole-v0")
    assert through.spec.observation == find_environment("cartpole", {}).spec.observation
    ends = 0
    for _ in range(60):
        outcome = through.step({"main": np.zeros(SLOTS, np.int64)}, rows)
        if outcome.episodes is not None:
            assert outcome.final_observation is not None
            ends += 1
            assert (np.abs(outcome.final_observation["main"][:, 2]) > 0.2).all()
            assert (np.abs(rows.observation["main"][outcome.episodes.slot]) <= 0.05).all()
        assert rows.valid.all()
    assert ends > 2


DEPENDENCIES = {  # what the environments of a part of Gymnasium need beside Gymnasium
    "gymnasium.envs.box2d": "Box2D",
    "gymnasium.envs.classic_control": "",
    "gymnasium.envs.mujoco": "mujoco",
    "gymnasium.envs.phys2d": "jax",
    "gymnasium.envs.tabular": "jax",
    "gymnasium.envs.toy_text": "",
}


def gymnasiums_own() -> list[tuple[str, str]]:
    """The IDs that Gymnasium registers itself, each with what it depends on."""
    found = []
    for env_id, spec in gymnasium.registry.items():
        if isinstance(spec.entry_point, str) and not env_id.startswith("tests/"):
            part = ".".join(spec.entry_point.split(".")[:3])
            if part in DEPENDENCIES:
                found.append((env_id, DEPENDENCIES[part]))
    return found


@pytest.mark.parametrize(("env_id", "needs"), gymnasiums_own(), ids=lambda value: value or "nothing")
def test_every_environment_that_gymnasium_comes_with(env_id: str, needs: str) -> None:
    if needs and importlib.util.find_spec(needs) is None:
        with pytest.raises(UsageError, match=r"is not installed|No module named"):
            find_environment(f"gym:{env_id}", {})
        return
    if env_id == "Pusher-v4":  # kept by Gymnasium for a version of its engine that is gone
        with pytest.raises(UsageError, match="only supported on"):
            find_environment(f"gym:{env_id}", {})
        return
    (rollout,) = record(f"gym:{env_id}", {}, steps=30, batches=1)
    assert rollout.valid.any()
    assert (rollout.reward != 0).any() or env_id.startswith(("Frozen", "MountainCarC", "Blackjack"))


def test_the_environments_that_need_nothing_are_there() -> None:
    own = {env_id for env_id, needs in gymnasiums_own() if not needs}
    assert {"CartPole-v1", "Pendulum-v1", "Blackjack-v1", "Taxi-v4", "FrozenLake-v1", "Acrobot-v1"} <= own


def test_evaluation_plays_cartpole() -> None:
    spec = find_environment("gym:CartPole-v1", {}).spec
    policy = PolicySpec(spec.observation, spec.action, (), "tanh", normalize=False)
    always_left = {"policy.0.weight": np.zeros((4, 2), np.float32), "policy.0.bias": np.array([1, 0], np.float32)}
    result = evaluate("gym:CartPole-v1", {}, Weights(policy, always_left), 70, 0)
    assert result["episodes"] == 70
    assert result["return_mean"] == result["length_mean"]
    assert 8 <= result["return_mean"] <= 10.5  # Gymnasium's own environment: 9.3
    upright = {"policy.0.weight": np.array([[0, 0], [0, 0.1], [0, 1], [0, 1]], np.float32)}
    upright["policy.0.bias"] = np.zeros(2, np.float32)
    assert evaluate("gym:CartPole-v1", {}, Weights(policy, upright), 20, 0)["return_mean"] > 150
