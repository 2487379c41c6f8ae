"""Worlds as Gymnasium environments, one at a time and batched: the numbers are those of the world itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import esper
import gymnasium
import msgspec
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers import vector as vector_wrappers
from numpy.typing import NDArray

from rustyrl.errors import UsageError
from rustyrl_actors import Agent, MetricSpec, SlotDraws, WorldEnv, WorldInfo, WorldVectorEnv
from rustyrl_actors.catalog import BUILT_IN, find_environment
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.spaces import leaf_values, leaves, rebuild

EXAMPLES = Path(__file__).parent.parent / "examples"
CATAPULT = f"{EXAMPLES / 'catapult.py'}:Catapult"
DOORS = f"{EXAMPLES / 'doors.py'}:Doors"
POINT = f"{EXAMPLES / 'point.py'}:Point"
PAIR = f"{__name__}:Pair"
STALL = f"{__name__}:Stall"
SLOTS = 4
LIMIT = 9


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gain: float = 1.0


class StallProcessor(esper.Processor):
    """Sells; who asks for the third fruit on a stamp dies at once."""

    def process(self) -> None:
        for _, (stall, agent) in esper.get_components(Stall, Agent):
            GIVEN.append({name: array.copy() for name, array in agent.action.items()})
            stall.hour += 1
            stall.sold += agent.action["deal.price"].sum(axis=(1, 2)) * stall.gain
            agent.reward[:] = stall.sold
            agent.terminated[:] = (agent.action["fruit"] == 2) & (agent.action["stamps"][:, 0] == 1)
            agent.episode_metrics["sold"][:] = stall.sold


GIVEN: list[dict[str, NDArray[Any]]] = []


class Stall:
    """A world with parts of every kind in observation and action, some of its choices masked."""

    default_slots = 3
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = WorldInfo(
            observation_space=spaces.Dict(
                {
                    "hour": spaces.Box(-100, 100, (), np.float32),
                    "sign": spaces.Tuple((spaces.MultiBinary(4), spaces.Box(0, 255, (2, 3), np.uint8))),
                    "sold": spaces.Box(-10000, 10000, (1,), np.float32),
                }
            ),
            action_space=spaces.Dict(
                {
                    "fruit": spaces.Discrete(3),
                    "deal": spaces.Dict({"price": spaces.Box(-1, np.float32([[1, 2]]), (1, 2), np.float32)}),
                    "stamps": spaces.MultiBinary(2),
                    "shelf": spaces.MultiDiscrete([[2, 3]]),
                }
            ),
            action_mask=True,
            step_s=1.0,
            max_episode_steps=LIMIT,
            metrics=(MetricSpec("sold_mean", "sold", "mean"),),
        )
        self.gain = parameters.gain
        self.hour = np.zeros(slots, np.float32)
        self.sold = np.zeros(slots, np.float32)
        self.agent = Agent(episode_metrics={"sold": np.zeros(slots, np.float32)})

    def build(self) -> Agent:
        esper.create_entity(self, self.agent)
        esper.add_processor(StallProcessor())
        return self.agent

    def reset(self, rows: NDArray[np.intp], rng: SlotDraws) -> None:
        self.hour[rows] = 0
        self.sold[rows] = rng.uniform(-1, 1)

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        seen, hour = self.agent.observation, self.hour[rows]
        seen["hour"][rows] = hour
        seen["sold"][rows, 0] = self.sold[rows]
        seen["sign.item_0"][rows] = hour[:, None] == np.arange(4)
        seen["sign.item_1"][rows] = 200 + hour[:, None, None]
        self.agent.action_mask["fruit"][rows] = np.column_stack([hour >= 0, hour > 0, hour > 1])


SHARED = spaces.Discrete(1000)


class Pair:
    """A game of two agents."""

    style = "object"
    default_slots = 2

    def __init__(self, slots: int, _parameters: Any) -> None:
        self.info = WorldInfo(
            observation_space=spaces.Box(-1, 1, (1,), np.float32),
            action_space=SHARED,
            step_s=1.0,
            max_episode_steps=5,
        )
        self.slots = slots

    def reset(self, rng: np.random.Generator) -> None:
        for _ in range(self.slots):
            esper.create_entity(Agent())

    def observe(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_world_is_left() -> Iterator[None]:
    before = set(esper.list_worlds())
    yield
    assert set(esper.list_worlds()) == before


WORLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cartpole": ("rustyrl/CartPole-v0", {}),
    "cartpole-object": ("rustyrl/CartPoleObject-v0", {}),
    "drone": ("rustyrl/Drone-v0", {}),
    "drone-windy": ("rustyrl/DroneWindy-v0", {}),
    "catapult": ("rustyrl/World-v0", {"env": CATAPULT}),
    "doors": ("rustyrl/World-v0", {"env": DOORS}),
    "point": ("rustyrl/World-v0", {"env": POINT, "thrust": 2.0}),
    "stall": ("rustyrl/World-v0", {"env": STALL}),
}
EVERY = pytest.mark.parametrize("world", list(WORLDS))


def make(world: str) -> gymnasium.Env[Any, Any]:
    env_id, settings = WORLDS[world]
    return gymnasium.make(env_id, **settings)


def make_vec(world: str, slots: int = SLOTS) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    env_id, settings = WORLDS[world]
    return gymnasium.make_vec(env_id, slots, **settings)


def source_of(world: str, **settings: Any) -> Any:
    """The same world without Gymnasium."""
    _, keywords = WORLDS[world]
    rest = {name: value for name, value in keywords.items() if name != "env"}
    return find_environment(keywords.get("env", world), {**rest, **settings})


def assert_same(first: Any, second: Any) -> None:
    """Two values of a space, batched or not: the same form, the same dtypes, the same numbers."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, tuple):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        np.testing.assert_array_equal(first, second)


def slot_of(space: spaces.Space[Any], batch: Any, slot: int) -> Any:
    """One slot of a batched value."""
    return rebuild(space, (np.asarray(value[slot]) for value in leaf_values(space, batch)))


@EVERY
@pytest.mark.filterwarnings("ignore:.*(infinity|symmetric and normalized|no render modes|not within):UserWarning")
@pytest.mark.filterwarnings("error::UserWarning")  # all other doubts of the checker
def test_a_single_environment_passes_gymnasiums_checker(world: str) -> None:
    with closing(make(world)) as env:
        check_env(env.unwrapped)


@EVERY
def test_what_is_seen_and_sampled_lies_within_the_spaces(world: str) -> None:
    with closing(make_vec(world)) as vector, closing(make(world)) as env:
        for one in (vector, env):
            one.action_space.seed(0)
            seen, _ = one.reset(seed=0)
            assert one.observation_space.contains(seen)
            for _ in range(20):
                seen, _, terminated, truncated, info = one.step(one.action_space.sample())
                assert one.observation_space.contains(seen)
                if one is env and (terminated or truncated):
                    one.reset()
                if one is vector and "final_obs" in info:
                    for last in info["final_obs"][info["_final_obs"]]:
                        assert vector.single_observation_space.contains(last)


class Own:
    """The same world without Gymnasium: as many environments as make up the slots, each stepped by itself."""

    def __init__(self, world: str) -> None:
        alone = world == "cartpole-object"  # a game has one agent, and is not made for more
        sources = [source_of(world) if alone else source_of(world, slots=SLOTS) for _ in range(SLOTS if alone else 1)]
        self.environments = [source.make() for source in sources]
        self.rows = [allocate_rows(source.spec) for source in sources]
        self.width = SLOTS // len(sources)
        self.ends: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # slot to what it saw last, and its metrics

    def reset(self, seed: int) -> None:
        for index, (environment, rows) in enumerate(zip(self.environments, self.rows, strict=True)):
            environment.reset((int(np.random.default_rng(seed).integers(2**62)), index), rows)

    def step(self, action: dict[str, NDArray[Any]]) -> None:
        self.ends = {}
        for index, (environment, rows) in enumerate(zip(self.environments, self.rows, strict=True)):
            first = index * self.width
            step = environment.step({name: a[first : first + self.width] for name, a in action.items()}, rows)
            for row in range(0 if step.episodes is None else len(step.episodes.slot)):
                last = {name: array[row] for name, array in step.final_observation.items()}
                metrics = {name: values[row] for name, values in step.episodes.metrics.items()}
                self.ends[first + int(step.episodes.slot[row])] = last, metrics

    def outcome(self, name: str) -> list[Any]:
        return [value for rows in self.rows for value in getattr(rows, name).tolist()]

    def arrays(self, group: str) -> dict[str, NDArray[Any]]:
        return {
            n: np.concatenate([getattr(rows, group)[n] for rows in self.rows]) for n in getattr(self.rows[0], group)
        }

    def close(self) -> None:
        for environment in self.environments:
            environment.close()


def assert_leaves(space: spaces.Space[Any], value: Any, arrays: dict[str, NDArray[Any]]) -> None:
    for (name, leaf), found in zip(leaves(space), leaf_values(space, value), strict=True):
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(found, arrays[name])


def assert_masks(info: dict[str, Any], masks: dict[str, NDArray[Any]]) -> None:
    assert ("action_mask" in info) == bool(masks)
    given = info.get("action_mask", {})
    for name, mask in (given if isinstance(given, dict) else {"main": given}).items():
        assert mask.dtype == np.int8
        assert mask.tolist() == masks[name].tolist()


def by_name(space: spaces.Space[Any], action: Any) -> dict[str, NDArray[Any]]:
    """A batched action as the world itself is given it: choices from 0."""
    named = {}
    for (name, leaf), value in zip(leaves(space), leaf_values(space, action), strict=True):
        named[name] = value - leaf.start if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete) else value
    return named


@EVERY
def test_a_batch_has_the_numbers_of_the_world_itself(world: str) -> None:
    steps = 410 if world == "point" else 120
    ends = {"terminated": 0, "truncated": 0}
    with closing(make_vec(world)) as vector, closing(Own(world)) as own:
        assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        space = vector.single_observation_space
        vector.action_space.seed(1)
        seen, info = vector.reset(seed=5)
        own.reset(5)
        for _ in range(steps):
            assert_leaves(space, seen, own.arrays("observation"))
            assert_masks(info, own.arrays("action_mask"))
            action = vector.action_space.sample()
            seen, reward, terminated, truncated, info = vector.step(action)
            own.step(by_name(vector.single_action_space, action))
            for name, found in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
                assert found.tolist() == own.outcome(name)
            assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, bool, bool)
            assert ("final_obs" in info) == ("_final_obs" in info) == bool(own.ends)
            for slot in range(SLOTS if own.ends else 0):
                assert info["_final_obs"][slot] == info["_final_info"][slot] == (slot in own.ends)
                if slot not in own.ends:
                    assert info["final_obs"][slot] is None
                    continue
                last, metrics = own.ends[slot]
                ends["terminated" if terminated[slot] else "truncated"] += 1
                assert_leaves(space, info["final_obs"][slot], last)
                for name, value in metrics.items():
                    np.testing.assert_equal(info["final_info"]["episode_metrics"][name][slot], value)
    assert sum(ends.values()) > 0
    assert world != "stall" or min(ends.values()) > 3


@EVERY
def test_the_first_slot_of_a_batch_lives_the_life_of_a_single_environment(world: str) -> None:
    """Up to its first end, whose observation the one returns and the other hands out as final."""
    with closing(make_vec(world)) as vector, closing(make(world)) as env:
        vector.action_space.seed(3)
        many, vector_info = vector.reset(seed=11)
        one, info = env.reset(seed=11)
        space, acted = env.observation_space, env.action_space
        for _ in range(600):
            assert_same(slot_of(space, many, 0), rebuild(space, map(np.asarray, leaf_values(space, one))))
            if "action_mask" in info:
                masks = vector_info["action_mask"]
                first = {name: mask[0] for name, mask in masks.items()} if isinstance(masks, dict) else masks[0]
                assert_same(first, info["action_mask"])
            actions = vector.action_space.sample()
            many, rewards, terminated, truncated, vector_info = vector.step(actions)
            one, reward, dead, cut, info = env.step(slot_of(acted, actions, 0))
            assert (type(reward), type(dead), type(cut)) == (float, bool, bool)
            assert (rewards[0], bool(terminated[0]), bool(truncated[0])) == (reward, dead, cut)
            if dead or cut:
                break
        assert dead or cut
        assert_same(vector_info["final_obs"][0], one)
        if source_of(world).spec.episode_metrics:
            metrics = vector_info["final_info"]["episode_metrics"]
            np.testing.assert_equal(
                {name: metrics[name][0] for name in info["episode_metrics"]}, info["episode_metrics"]
            )


def history(env: Any, seed: Any, steps: int = 25) -> list[float]:
    seen, _ = env.reset(seed=seed)
    numbers: list[float] = []
    rng = np.random.default_rng(0)
    space = getattr(env, "single_observation_space", env.observation_space)
    for _ in range(steps):
        numbers += [float(x) for value in leaf_values(space, seen) for x in np.ravel(value)]
        env.action_space.seed(int(rng.integers(1000)))
        seen, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        numbers += np.ravel(reward).tolist()
        if not isinstance(env, gymnasium.vector.VectorEnv) and (terminated or truncated):
            seen, _ = env.reset()
    return numbers


@EVERY
@pytest.mark.parametrize("seeds", [(4, 5), ([1, 2, 3, 4], [1, 2, 3, 5]), (np.int64(4), 5)], ids=["int", "list", "np"])
def test_a_seed_repeats_and_another_does_not(world: str, seeds: tuple[Any, Any]) -> None:
    with closing(make_vec(world)) as vector:
        first = history(vector, seeds[0])
        assert history(vector, seeds[1]) != first
        assert history(vector, seeds[0]) == first


@pytest.mark.parametrize("seed", [3, [5, 6, 7, 8]], ids=["int", "list"])
def test_what_comes_after_a_seed_repeats_too(seed: Any) -> None:
    def two_resets() -> list[Any]:
        with closing(make_vec("cartpole")) as vector:
            return [vector.reset(seed=seed)[0].tolist(), vector.reset()[0].tolist(), vector.reset()[0].tolist()]

    first, second, third = two_resets()
    assert first != second != third
    assert two_resets() == [first, second, third]


def test_a_single_environment_repeats_under_a_seed_and_goes_on_without() -> None:
    with closing(make("cartpole")) as env, closing(make("cartpole")) as twin:
        assert history(env, 3) == history(twin, 3)
        assert history(env, 3) != history(env, 4)
        env.reset(seed=3)
        assert env.reset()[0].tolist() != env.reset()[0].tolist()


def test_slots_start_differently() -> None:
    with closing(make_vec("cartpole", 30)) as vector:
        assert len(set(vector.reset(seed=[1] * 30)[0][:, 0].tolist())) == 30


def test_as_many_seeds_as_environments() -> None:
    with closing(make_vec("cartpole")) as vector:
        with pytest.raises(ValueError, match="2 seeds for 4 environments"):
            vector.reset(seed=[1, 2])
        first, _ = vector.reset(seed=[None] * SLOTS)
        second, _ = vector.reset(seed=[None] * SLOTS)
        assert (first != second).any()


def test_boxes_are_clipped_and_choices_are_whole_numbers() -> None:
    GIVEN.clear()
    with closing(make("stall")) as env:
        env.reset(seed=1)
        action = {
            "deal": {"price": np.array([[-7.0, 1e30]])},
            "fruit": 1,
            "shelf": np.array([[1, 1]]),
            "stamps": np.array([0, 1], np.int8),
        }
        env.unwrapped.step(action)
    (given,) = GIVEN
    assert given["deal.price"].tolist() == [[[-1, 2]]]
    assert given["fruit"].tolist() == [1]
    assert given["shelf"].tolist() == [[[1, 1]]]
    assert given["stamps"].tolist() == [[0, 1]]
    assert (given["deal.price"].dtype, given["fruit"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("fruit", [-1, 3])
def test_a_choice_that_there_is_not_is_an_error(fruit: int) -> None:
    with closing(make("stall")) as env:
        env.reset(seed=1)
        action = {**env.action_space.sample(), "fruit": fruit}
        with pytest.raises(ValueError, match=f"action 'fruit' is .*{fruit}.*expected Dict"):
            env.unwrapped.step(action)


def test_what_is_handed_out_is_not_written_to_later() -> None:
    with closing(make_vec("stall")) as vector:
        vector.action_space.seed(0)
        seen, info = vector.reset(seed=1)
        kept = [[value.copy() for value in leaf_values(vector.single_observation_space, seen)]]
        handed = [seen]
        masks = [info["action_mask"]["fruit"], info["action_mask"]["fruit"].copy()]
        outcomes: list[Any] = []
        copied: list[Any] = []
        for _ in range(30):
            seen, *outcome, _ = vector.step(vector.action_space.sample())
            outcomes.append(outcome)
            copied.append([array.copy() for array in outcome])
            handed.append(seen)
            kept.append([value.copy() for value in leaf_values(vector.single_observation_space, seen)])
        for one, copies in zip(handed, kept, strict=True):
            for value, copy in zip(leaf_values(vector.single_observation_space, one), copies, strict=True):
                np.testing.assert_array_equal(value, copy)
        np.testing.assert_array_equal(*masks)
        np.testing.assert_equal(outcomes, copied)


def test_a_mask_fits_gymnasiums_sampling() -> None:
    with closing(make("doors")) as env:
        _, info = env.reset(seed=1)
        for _ in range(16):
            action = env.action_space.sample(mask=info["action_mask"])
            assert info["action_mask"][action] == 1
            _, reward, *_, info = env.step(action)
            assert reward >= 0  # a closed door costs


def test_parameters_are_keyword_arguments() -> None:
    def sold(**settings: Any) -> float:
        with closing(gymnasium.make("rustyrl/World-v0", env=STALL, **settings)) as env:
            env.reset(seed=1)
            price = {"price": np.ones((1, 2), np.float32)}
            action = {"deal": price, "fruit": np.int64(0), "shelf": np.array([[0, 0]]), "stamps": np.zeros(2, np.int8)}
            return env.step(action)[1] - env.step(action)[1]

    assert sold() == pytest.approx(-2)
    assert sold(gain=3.0) == pytest.approx(-6)


@pytest.mark.parametrize(
    ("env", "settings", "said"),
    [
        (PAIR, {}, r"2 agents in one world; .*slots=1"),
        (POINT, {"trust": 2}, r"no parameter 'trust'"),
        (POINT, {"thrust": "much"}, r"env.thrust"),
        (POINT, {"slots": 3}, r"num_envs says how many"),
        ("gym:CartPole-v1", {}, r"a Gymnasium environment already"),
        ("nowhere", {}, r"unknown environment 'nowhere'"),
    ],
)
@pytest.mark.parametrize("kind", [WorldEnv, WorldVectorEnv])
def test_what_cannot_be_is_refused_in_words(kind: Any, env: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        kind(env=env, **settings)


def test_a_game_for_one_or_many_can_be_played_by_one() -> None:
    with closing(gymnasium.make_vec("rustyrl/World-v0", 3, env=PAIR, slots=1)) as vector:
        vector.reset(seed=1)
        assert vector.step(vector.action_space.sample())[0].shape == (3, 1)


def test_every_built_in_world_is_registered() -> None:
    names = {env_id for env_id in gymnasium.registry if env_id.startswith("rustyrl/")}
    assert {"rustyrl/CartPole-v0", "rustyrl/Drone-v0", "rustyrl/DroneWindy-v0", "rustyrl/World-v0"} <= names
    assert len(names) == len(BUILT_IN) + 1
    with closing(gymnasium.make("rustyrl_actors:rustyrl/Drone-v0")) as env:
        assert env.action_space.shape == (4,)
    with closing(gymnasium.make_vec("rustyrl_actors:rustyrl/Drone-v0", 5)) as vector:
        assert vector.observation_space.shape[0] == 5
        assert isinstance(vector.unwrapped, WorldVectorEnv)


def test_two_environments_do_not_disturb_each_other() -> None:
    with closing(make_vec("drone", 2)) as first, closing(make("cartpole-object")) as second:
        alone = history(first, 3)
        seen, _ = first.reset(seed=3)
        second.reset(seed=1)
        rng = np.random.default_rng(0)
        numbers: list[float] = []
        for _ in range(25):
            numbers += seen.ravel().tolist()
            first.action_space.seed(int(rng.integers(1000)))
            seen, reward, *_ = first.step(first.action_space.sample())
            numbers += reward.tolist()
            if any(second.step(random.Random(0).randrange(2))[2:4]):
                second.reset()
        assert numbers == alone


def test_sampling_in_one_environment_does_not_reseed_another() -> None:
    both = [gymnasium.make("rustyrl/World-v0", env=PAIR, slots=1) for _ in range(2)]  # `Pair` shares its space
    with closing(both[0]) as first, closing(both[1]) as second:
        first.action_space.seed(1)
        alone = [first.action_space.sample() for _ in range(20)]
        first.action_space.seed(1)
        second.action_space.seed(2)
        assert [first.action_space.sample() for _ in range(20)] == alone


def test_gymnasiums_statistics_go_around_a_single_environment() -> None:
    with closing(RecordEpisodeStatistics(make("stall"))) as env:
        env.reset(seed=1)
        total = 0.0
        for _ in range(LIMIT):
            action = {**env.action_space.sample(), "fruit": np.int64(0)}
            _, reward, terminated, truncated, info = env.step(action)
            total += float(reward)
        assert (terminated, truncated) == (False, True)
        assert info["episode"]["l"] == LIMIT
        assert info["episode"]["r"] == pytest.approx(total)
        assert info["episode_metrics"].keys() == {"sold"}


def test_gymnasiums_statistics_and_lists_go_around_a_batch() -> None:
    with closing(vector_wrappers.RecordEpisodeStatistics(make_vec("cartpole"))) as vector:
        vector.reset(seed=1)
        lengths = np.zeros(SLOTS, int)
        ends = 0
        for _ in range(60):
            _, _, terminated, truncated, info = vector.step(np.zeros(SLOTS, np.int64))
            lengths += 1
            for slot in np.flatnonzero(terminated | truncated):
                assert info["episode"]["l"][slot] == lengths[slot] == info["episode"]["r"][slot]
                lengths[slot] = 0
                ends += 1
        assert ends >= 4 * SLOTS
    with closing(vector_wrappers.DictInfoToList(make_vec("stall"))) as listed:
        _, infos = listed.reset(seed=1)
        assert [info["action_mask"]["fruit"].tolist() for info in infos] == [[1, 0, 0]] * SLOTS
        ends = 0
        for _ in range(LIMIT):  # by then every slot has ended at least once
            _, _, terminated, truncated, infos = listed.step(listed.action_space.sample())
            assert ["final_info" in info for info in infos] == (terminated | truncated).tolist()
            ends += int((terminated | truncated).sum())
        assert ends >= SLOTS


def test_a_time_limit_of_gymnasiums_cuts_earlier() -> None:
    with closing(gymnasium.make("rustyrl/CartPole-v0", max_episode_steps=3)) as env:
        env.reset(seed=1)
        ends = [env.step(step % 2)[2:4] for step in range(3)]
        assert ends == [(False, False), (False, False), (False, True)]
        assert env.reset()[0].shape == (4,)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_gymnasiums_own_batches_hold_worlds(mode: str) -> None:
    with closing(gymnasium.make_vec("rustyrl/CartPole-v0", 2, vectorization_mode=mode)) as vector:
        seen, _ = vector.reset(seed=7)
        with closing(make("cartpole")) as env:
            assert seen[0].tolist() == env.reset(seed=7)[0].tolist()
            assert seen[1].tolist() == env.reset(seed=8)[0].tolist()
        assert vector.step(np.array([0, 1]))[1].tolist() == [1, 1]


def test_stable_baselines_trains_on_a_world_as_it_is(one_thread: None) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_checker import check_env as check_env_for_baselines
    from stable_baselines3.common.env_util import make_vec_env

    with closing(gymnasium.make("rustyrl/CartPole-v0")) as env:
        check_env_for_baselines(env)
    model = PPO("MlpPolicy", "rustyrl/CartPole-v0", n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(128)
    assert model.num_timesteps == 128
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert lengths
    assert [episode["r"] for episode in model.ep_info_buffer] == lengths  # CartPole pays 1 a step
    assert any((old != new).any() for old, new in zip(before, model.policy.parameters(), strict=True))
    model.env.close()

    several = make_vec_env("rustyrl/Drone-v0", n_envs=3, seed=0)
    model = PPO("MlpPolicy", several, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(96)
    assert model.num_timesteps == 96
    several.close()
