"""An esper world in column style behind the environment contract, shown on a world that counts its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import esper
import gymnasium
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl.rollout import POISON, Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import MetricSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import StepRows, allocate_rows, rows_of
from rustyrl_actors.world import WorldInfo, describe_world

SLOTS = 5
LIMIT = 7
NEVER = 1_000_000


class CountingParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """lifetime: the steps after which each slot terminates; 0 in ``cut`` never truncates of itself."""

    lifetime: tuple[int, ...] = (NEVER,) * SLOTS
    cut: int = 0
    ticks: int = 1
    declared: tuple[str, ...] = ("draw",)


@dataclass(slots=True)
class Count:
    """ticks: `[E]` since the reset; episode: `[E]` number; draw: `[E]` what the episode drew at its start."""

    ticks: NDArray[np.int64]
    episode: NDArray[np.int64]
    draw: NDArray[np.float64]


class CountingProcessor(esper.Processor):
    """Counts, pays one unit and the action in each tick, and ends lives."""

    def __init__(self, parameters: CountingParameters) -> None:
        self._parameters = parameters

    def process(self) -> None:
        for _, (count, agent) in esper.get_components(Count, Agent):
            count.ticks += 1
            agent.reward += 1 + agent.action
            agent.terminated |= count.ticks >= np.array(self._parameters.lifetime)
            if self._parameters.cut:
                agent.truncated |= count.ticks >= self._parameters.cut


class CountingWorld:
    """Shows each slot the ticks of its episode, the episode's number, its slot and what the episode drew."""

    name = "counting"
    default_slots = SLOTS
    Parameters = CountingParameters

    def __init__(self, slots: int, parameters: CountingParameters) -> None:
        limit = np.full(4, np.inf, np.float32)
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(-limit, limit, dtype=np.float32),
            action_space=gymnasium.spaces.Discrete(2),
            step_s=1.0,
            max_episode_steps=LIMIT,
            ticks_per_step=parameters.ticks,
            metrics=tuple(MetricSpec(f"{name}_mean", name, "mean") for name in parameters.declared),
        )
        self._parameters = parameters
        self._slots = slots
        self._count = Count(np.zeros(slots, np.int64), np.full(slots, -1), np.zeros(slots))
        self._agent = Agent(episode_metrics={"draw": np.zeros(slots, np.float32)})

    def build(self) -> Agent:
        esper.create_entity(self._count, self._agent)
        esper.add_processor(CountingProcessor(self._parameters))
        return self._agent

    def reset(self, rows: NDArray[np.intp], rng: np.random.Generator) -> None:
        self._count.ticks[rows] = 0
        self._count.episode[rows] += 1
        self._count.draw[rows] = rng.random(len(rows))
        self._agent.episode_metrics["draw"][rows] = self._count.draw[rows]

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        count = self._count
        seen = np.stack([count.ticks, count.episode, np.arange(self._slots), count.draw], axis=1)
        self._agent.observation["main"][rows] = seen[rows]


Make = Callable[..., tuple[ColumnEnvironment, StepRows]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make environments of the counting world, whose esper worlds go at the end of the test."""
    before = esper.list_worlds()

    def make_one(
        *, stagger: bool = False, slots: int = SLOTS, **settings: object
    ) -> tuple[ColumnEnvironment, StepRows]:
        parameters = msgspec.convert(settings, CountingParameters)
        world = CountingWorld(slots, parameters)
        spec = describe_world("counting", world, slots, parameters)
        environment = ColumnEnvironment(world, spec, stagger=stagger)
        rows = allocate_rows(spec)
        environment.reset((1, 2, 3), rows.observation)
        return environment, rows

    yield make_one
    esper.switch_world("default")
    for context in set(esper.list_worlds()) - set(before):
        esper.delete_world(context)


def act(value: int = 0, slots: int = SLOTS) -> NDArray[np.int64]:
    return np.full(slots, value, np.int64)


def ticks_and_episode(rows: StepRows) -> list[list[float]]:
    return rows.observation["main"][:, :2].tolist()


def test_reset_shows_the_first_observation_of_every_slot(make: Make) -> None:
    _, rows = make()
    assert ticks_and_episode(rows) == [[0, 0]] * SLOTS


def test_an_ended_slot_is_reset_in_the_same_step(make: Make) -> None:
    environment, rows = make(lifetime=(2, NEVER, 3, NEVER, 2))
    environment.step(act(), rows)
    assert ticks_and_episode(rows) == [[1, 0]] * SLOTS
    outcome = environment.step(act(), rows)
    assert rows.terminated.tolist() == [True, False, False, False, True]
    assert ticks_and_episode(rows) == [[0, 1], [2, 0], [2, 0], [2, 0], [0, 1]]
    assert outcome.episodes is not None
    assert outcome.episodes.slot.tolist() == [0, 4]
    environment.step(act(), rows)
    assert rows.terminated.tolist() == [False, False, True, False, False]
    assert ticks_and_episode(rows) == [[1, 1], [3, 0], [0, 1], [3, 0], [1, 1]]


def test_truncated_step_shows_the_final_observation_of_the_old_episode(make: Make) -> None:
    environment, rows = make(lifetime=(NEVER, 3, NEVER, NEVER, NEVER))
    for _ in range(LIMIT - 1):
        outcome = environment.step(act(), rows)
        assert outcome.final_slots is None
        assert outcome.final_observation is None
    outcome = environment.step(act(), rows)
    assert rows.truncated.tolist() == [True, False, True, True, True]
    assert outcome.final_slots is not None
    assert outcome.final_observation is not None
    assert outcome.final_slots.tolist() == [0, 2, 3, 4]
    assert outcome.final_observation["main"][:, :3].tolist() == [[LIMIT, 0, slot] for slot in (0, 2, 3, 4)]
    assert ticks_and_episode(rows)[0] == [0, 1]


def test_final_observations_are_copies_that_later_steps_leave_alone(make: Make) -> None:
    environment, rows = make(cut=2)
    environment.step(act(), rows)
    outcome = environment.step(act(), rows)
    assert outcome.final_observation is not None
    before = outcome.final_observation["main"].copy()
    environment.step(act(), rows)
    np.testing.assert_array_equal(outcome.final_observation["main"], before)


def test_terminated_wins_over_truncated(make: Make) -> None:
    environment, rows = make(lifetime=(LIMIT, NEVER, LIMIT, NEVER, NEVER))
    for _ in range(LIMIT):
        outcome = environment.step(act(), rows)
    assert rows.terminated.tolist() == [True, False, True, False, False]
    assert rows.truncated.tolist() == [False, True, False, True, True]
    assert outcome.final_slots is not None
    assert outcome.final_slots.tolist() == [1, 3, 4]


def test_a_world_may_truncate_before_the_limit(make: Make) -> None:
    environment, rows = make(cut=3)
    for step in (1, 2, 3):
        outcome = environment.step(act(), rows)
        assert rows.truncated.all() == (step == 3)
    assert outcome.final_observation is not None
    assert outcome.final_observation["main"][:, 0].tolist() == [3] * SLOTS


def test_the_limit_counts_from_the_start_of_each_slots_episode(make: Make) -> None:
    environment, rows = make(lifetime=(NEVER, NEVER, NEVER, NEVER, 3))
    ends = []
    for step in range(1, 2 * LIMIT + 1):
        environment.step(act(), rows)
        ends += [(step, int(slot)) for slot in np.flatnonzero(rows.truncated)]
    assert ends == [(step, slot) for step in (LIMIT, 2 * LIMIT) for slot in range(4)]


def test_episodes_report_return_length_and_metrics_of_what_ended(make: Make) -> None:
    environment, rows = make(lifetime=(2, NEVER, NEVER, 3, NEVER))
    draws = rows.observation["main"][:, 3].copy()
    environment.step(act(1), rows)
    outcome = environment.step(act(0), rows)
    assert outcome.episodes is not None
    assert outcome.episodes.slot.tolist() == [0]
    assert outcome.episodes.episode_return.tolist() == [2 + 1]
    assert outcome.episodes.length.tolist() == [2]
    assert outcome.episodes.metrics["draw"].tolist() == [draws[0]]
    outcome = environment.step(act(1), rows)
    assert outcome.episodes is not None
    assert outcome.episodes.slot.tolist() == [3]
    assert outcome.episodes.episode_return.tolist() == [2 + 1 + 2]
    assert outcome.episodes.length.tolist() == [3]
    assert outcome.episodes.metrics["draw"].tolist() == [draws[3]]


def test_a_later_episode_counts_from_nothing(make: Make) -> None:
    environment, rows = make(lifetime=(2, NEVER, NEVER, NEVER, NEVER))
    for action in (1, 1, 0):
        environment.step(act(action), rows)
    draw = float(rows.observation["main"][0, 3])
    outcome = environment.step(act(1), rows)
    assert outcome.episodes is not None
    assert outcome.episodes.slot.tolist() == [0]
    assert outcome.episodes.episode_return.tolist() == [1 + 2]
    assert outcome.episodes.length.tolist() == [2]
    assert outcome.episodes.metrics["draw"].tolist() == [draw]


def test_an_action_is_held_for_every_tick_of_a_step(make: Make) -> None:
    environment, rows = make(ticks=4)
    environment.step(act(1), rows)
    assert ticks_and_episode(rows) == [[4, 0]] * SLOTS
    assert rows.reward.tolist() == [4 * 2.0] * SLOTS


def test_stagger_spreads_the_first_ends_and_leaves_the_later_ones_alone(make: Make) -> None:
    slots = 200
    environment, rows = make(stagger=True, slots=slots, lifetime=(NEVER,) * slots)
    assert ticks_and_episode(rows) == [[0, 0]] * slots
    ends: list[list[int]] = [[] for _ in range(slots)]
    for step in range(1, 3 * LIMIT + 1):
        outcome = environment.step(act(slots=slots), rows)
        for slot in np.flatnonzero(rows.truncated):
            ends[slot].append(step)
        if outcome.episodes is not None:
            assert (outcome.episodes.length <= min(step, LIMIT)).all()
    first = [end[0] for end in ends]
    assert set(first) == set(range(1, LIMIT + 1))
    assert {end[1] - end[0] for end in ends} == {LIMIT}


def test_without_stagger_slots_end_together(make: Make) -> None:
    environment, rows = make()
    for step in range(1, LIMIT + 1):
        environment.step(act(), rows)
        assert rows.truncated.tolist() == [step == LIMIT] * SLOTS


def history(environment: ColumnEnvironment, rows: StepRows, seed: tuple[int, ...]) -> NDArray[np.float32]:
    environment.reset(seed, rows.observation)
    seen = [rows.observation["main"].copy()]
    for _ in range(3 * LIMIT):
        environment.step(act(), rows)
        seen.append(rows.observation["main"][:, [0, 2, 3]].copy())
    return np.concatenate([array[:, -1] for array in seen])


def test_one_seed_repeats_and_another_does_not(make: Make) -> None:
    lives = {"lifetime": (2, 3, 4, 5, NEVER), "stagger": True}
    first, second = history(*make(**lives), (1, 2, 3)), history(*make(**lives), (1, 2, 3))
    np.testing.assert_array_equal(first, second)
    for seed in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (history(*make(**lives), seed) != first).any()


def test_reset_seeds_anew_whatever_went_before(make: Make) -> None:
    environment, rows = make(stagger=True)
    first = history(environment, rows, (4,))
    np.testing.assert_array_equal(history(environment, rows, (4,)), first)


def poisoned_rollout(environment: ColumnEnvironment, slots: int) -> Rollout:
    spec = environment.spec
    origin = RolloutOrigin(spec.fingerprint, "main", Ticket(0, 0, (0,)), 0, 0, 0)
    return allocate_rollout(spec, 3, slots, origin, poison=True)


@pytest.mark.parametrize("lifetime", [NEVER, 1], ids=["running", "ending"])
def test_a_step_writes_its_own_rows_whole_and_nothing_else(make: Make, lifetime: int) -> None:
    environment, _ = make(lifetime=(lifetime,) * SLOTS)
    rollout = poisoned_rollout(environment, 3 * SLOTS)
    assert rollout.storage is not None
    columns = slice(SLOTS, 2 * SLOTS)
    untouched = rollout.storage.copy()
    environment.step(act(), rows_of(rollout, columns)[1])

    written = np.zeros(rollout.storage.shape, bool)
    start = rollout.storage.__array_interface__["data"][0]
    parts = [rollout.observation["main"][2, columns], rollout.reward[1, columns]]
    parts += [rollout.terminated[1, columns], rollout.truncated[1, columns], rollout.valid[1, columns]]
    for part in parts:
        offset = part.__array_interface__["data"][0] - start
        written[offset : offset + part.nbytes] = True
    np.testing.assert_array_equal(rollout.storage[~written], untouched[~written])
    for part in parts:
        assert part.tobytes() != bytes([POISON]) * part.nbytes
    assert rollout.reward[1, columns].tolist() == [1.0] * SLOTS
    assert rollout.terminated.view(np.uint8)[1, columns].tolist() == [int(lifetime == 1)] * SLOTS
    assert rollout.truncated.view(np.uint8)[1, columns].tolist() == [0] * SLOTS
    assert rollout.valid.view(np.uint8)[1, columns].tolist() == [1] * SLOTS
    assert np.isfinite(rollout.observation["main"][2, columns]).all()


def test_interleaved_worlds_do_not_disturb_each_other(make: Make) -> None:
    lives = [(2, 3, NEVER, NEVER, 4), (NEVER, 5, 2, 2, NEVER), (1, 1, 1, NEVER, 6)]
    alone = []
    for lifetime in lives:
        environment, rows = make(lifetime=lifetime)
        alone.append([])
        for _ in range(20):
            environment.step(act(), rows)
            alone[-1].append(rows.observation["main"].copy())
    together = [make(lifetime=lifetime) for lifetime in lives]
    rng = np.random.default_rng(0)
    for step in range(20):
        for index in rng.permutation(len(lives)):
            environment, rows = together[index]
            environment.step(act(), rows)
            np.testing.assert_array_equal(rows.observation["main"], alone[index][step])


def test_a_world_survives_the_closing_of_another(make: Make) -> None:
    (kept, rows), (closed, _) = make(), make()
    closed.close()
    kept.step(act(), rows)
    assert ticks_and_episode(rows) == [[1, 0]] * SLOTS


@pytest.mark.parametrize("current", [True, False], ids=["current", "in-the-background"])
def test_closing_removes_the_esper_world(make: Make, current: bool) -> None:
    before = set(esper.list_worlds())
    environment, _ = make()
    (context,) = set(esper.list_worlds()) - before
    esper.switch_world(context if current else "default")
    environment.close()
    assert context not in esper.list_worlds()
    assert esper.current_world == "default"


def test_an_undelivered_metric_is_a_contract_error_that_names_it(make: Make) -> None:
    before = esper.list_worlds()
    with pytest.raises(ContractError, match=r"'counting' declares the episode metrics \['mood'\]"):
        make(declared=("draw", "mood"))
    assert esper.list_worlds() == before


@pytest.mark.parametrize("name", ["reward", "terminated", "truncated", "valid", "observation"])
def test_replacing_an_array_of_the_agent_is_a_contract_error_that_says_to_write_into_it(name: str) -> None:
    source = find_environment("cartpole", {"slots": 2})
    environment, rows = source.make(), allocate_rows(source.spec)
    environment.reset((1,), rows.observation)
    observe = environment._world.observe

    def replace(which: object) -> None:
        observe(which)
        agent = environment._agent
        if name == "observation":
            agent.observation = {"main": agent.observation["main"].copy()}
        else:
            setattr(agent, name, getattr(agent, name).copy())

    environment._world.observe = replace
    with pytest.raises(ContractError, match=f"write into .*agent.{name}"):
        environment.step(np.zeros(2, np.int64), rows)
    environment.close()
