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
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.environment import StepRows, allocate_rows, rows_of
from rustyrl_actors.world import NoParameters, WorldInfo, describe_world

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

    def reset(self, rows: NDArray[np.intp], rng: SlotDraws) -> None:
        self._count.ticks[rows] = 0
        self._count.episode[rows] += 1
        self._count.draw[rows] = rng.random()
        self._agent.episode_metrics["draw"][rows] = self._count.draw[rows]

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        count = self._count
        seen = np.stack([count.ticks, count.episode, np.arange(self._slots), count.draw], axis=1)
        self._agent.observation[rows] = seen[rows]


class MaskedProcessor(CountingProcessor):
    """Counts; what is done it leaves to the test."""

    def process(self) -> None:
        for _, (count, agent) in esper.get_components(Count, Agent):
            count.ticks += 1
            agent.terminated |= count.ticks >= np.array(self._parameters.lifetime)


class MaskedWorld(CountingWorld):
    """Of two observations and two parts of an action; allows less and less, and never says what is allowed again."""

    def __init__(self, slots: int, parameters: CountingParameters) -> None:
        super().__init__(slots, parameters)
        line, spaces = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces
        self.info = msgspec.structs.replace(
            self.info,
            observation_space=spaces.Dict({"ticks": spaces.Box(0, 1e9, ()), "slot": spaces.Box(0, 1e9, ())}),
            action_space=spaces.Dict({"push": line, "gait": spaces.MultiDiscrete([2, 3]), "call": spaces.Discrete(4)}),
            action_mask=True,
        )

    def build(self) -> Agent:
        esper.create_entity(self._count, self._agent)
        esper.add_processor(MaskedProcessor(self._parameters))
        return self._agent

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        self._agent.observation["ticks"][rows] = self._count.ticks[rows]
        self._agent.observation["slot"][rows] = np.arange(self._slots)[rows]
        for row in np.arange(self._slots)[rows]:
            self._agent.action_mask["call"][row, : self._count.ticks[row]] = False


Make = Callable[..., tuple[ColumnEnvironment, StepRows]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make environments of the counting world, whose esper worlds go at the end of the test."""
    before = esper.list_worlds()

    def make_one(
        kind: type[CountingWorld] = CountingWorld, *, stagger: bool = False, slots: int = SLOTS, **settings: object
    ) -> tuple[ColumnEnvironment, StepRows]:
        parameters = msgspec.convert(settings, CountingParameters)
        world = kind(slots, parameters)
        spec = describe_world("counting", world.info, slots, NoParameters(), {})
        environment = ColumnEnvironment(world, spec, stagger=stagger)
        rows = allocate_rows(spec)
        environment.reset((1, 2, 3), rows)
        return environment, rows

    yield make_one
    esper.switch_world("default")
    for context in set(esper.list_worlds()) - set(before):
        esper.delete_world(context)


def act(value: int = 0, slots: int = SLOTS) -> dict[str, NDArray[np.generic]]:
    return {"main": np.full(slots, value, np.int64)}


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


def test_an_ended_slot_shows_the_final_observation_of_the_old_episode(make: Make) -> None:
    environment, rows = make(lifetime=(NEVER, 3, NEVER, NEVER, NEVER))
    for step in range(1, LIMIT):
        outcome = environment.step(act(), rows)
        assert not rows.truncated.any()
        if step % 3:
            assert outcome.episodes is None
            assert outcome.final_observation is None
            continue
        assert outcome.episodes is not None
        assert outcome.final_observation is not None
        assert outcome.episodes.slot.tolist() == [1]
        assert outcome.final_observation["main"][:, :3].tolist() == [[3, step // 3 - 1, 1]]
    outcome = environment.step(act(), rows)
    assert rows.truncated.tolist() == [True, False, True, True, True]
    assert outcome.episodes is not None
    assert outcome.final_observation is not None
    assert outcome.episodes.slot.tolist() == [0, 2, 3, 4]
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
    assert outcome.episodes is not None
    assert outcome.episodes.slot.tolist() == [0, 1, 2, 3, 4]


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
    environment.reset(seed, rows)
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
    with pytest.raises(ContractError, match=r"'counting' declares the episode metric 'mood'.*5 slots.*got None"):
        make(declared=("draw", "mood"))
    assert esper.list_worlds() == before


@pytest.mark.parametrize("name", ["reward", "terminated", "truncated", "valid", "observation"])
def test_replacing_an_array_of_the_agent_is_a_contract_error_that_says_to_write_into_it(name: str) -> None:
    source = find_environment("cartpole", {"slots": 2})
    environment, rows = source.make(), allocate_rows(source.spec)
    environment.reset((1,), rows)
    observe = environment._world.observe

    def replace(which: object) -> None:
        observe(which)
        agent = environment._agent
        if name == "observation":
            agent.observation = agent.observation.copy()
        else:
            setattr(agent, name, getattr(agent, name).copy())

    environment._world.observe = replace
    with pytest.raises(ContractError, match=f"write into .*agent.{name}"):
        environment.step(act(slots=2), rows)
    environment.close()


def hybrid_action() -> dict[str, NDArray[np.generic]]:
    return {
        "call": np.arange(SLOTS) % 4,
        "gait": np.zeros((SLOTS, 2), np.int64),
        "push": np.zeros((SLOTS, 1), np.float32),
    }


def test_parts_of_a_dict_are_dicts_of_arrays_and_a_box_is_an_array(make: Make) -> None:
    environment, rows = make(MaskedWorld)
    action = hybrid_action()
    environment.step(action, rows)
    agent = environment._agent
    assert agent.action.keys() == action.keys()
    assert all(np.array_equal(agent.action[name], action[name]) for name in action)
    assert agent.action is not action
    assert {name: array.shape for name, array in agent.observation.items()} == {"ticks": (SLOTS,), "slot": (SLOTS,)}
    assert {name: mask.shape for name, mask in agent.action_mask.items()} == {"gait": (SLOTS, 5), "call": (SLOTS, 4)}
    plain, rows = make()
    plain.step(act(1), rows)
    assert plain._agent.action.tolist() == [1] * SLOTS
    assert plain._agent.observation.shape == (SLOTS, 4)
    assert plain._agent.action_mask is None


def test_every_choice_is_allowed_but_those_that_the_world_forbids_in_this_step(make: Make) -> None:
    environment, rows = make(MaskedWorld)
    assert rows.action_mask["call"].all()
    for step in (1, 2, 3):
        for mask in rows.action_mask.values():
            mask[...] = False  # what stood there before, in rows that are used again
        environment.step(hybrid_action(), rows)
        assert rows.action_mask["gait"].all()
        assert rows.action_mask["call"].tolist() == [[choice >= step for choice in range(4)]] * SLOTS


def test_what_was_forbidden_at_the_end_of_an_episode_is_allowed_in_the_next(make: Make) -> None:
    environment, rows = make(MaskedWorld, lifetime=(2, NEVER, 3, NEVER, NEVER))
    for _ in range(2):
        environment.step(hybrid_action(), rows)
    assert rows.terminated.tolist() == [True, False, False, False, False]
    assert rows.action_mask["call"].sum(axis=1).tolist() == [4, 2, 2, 2, 2]
    environment.reset((1,), rows)
    assert rows.action_mask["call"].all()


def test_a_mask_that_allows_nothing_is_a_contract_error_that_names_slot_and_step(make: Make) -> None:
    environment, rows = make(MaskedWorld, lifetime=(3, NEVER, 3, NEVER, NEVER))
    for _ in range(3):
        environment.step(hybrid_action(), rows)
    with pytest.raises(ContractError, match=r"slot 1, tick 4 \(env step 4\).*action_mask\['call'\].*at least one"):
        environment.step(hybrid_action(), rows)


@pytest.mark.parametrize("field", ["observation", "action_mask"])
def test_replacing_one_array_of_a_dict_is_a_contract_error_that_names_it(make: Make, field: str) -> None:
    environment, rows = make(MaskedWorld)
    observe = environment._world.observe

    def replace(which: object) -> None:
        observe(which)
        arrays = getattr(environment._agent, field)
        name = "ticks" if field == "observation" else "call"
        arrays[name] = arrays[name].copy()

    environment._world.observe = replace  # type: ignore[method-assign]
    name = "ticks" if field == "observation" else "call"
    with pytest.raises(ContractError, match=rf"write into it: agent\.{field}\['{name}'\]\[rows\] = "):
        environment.step(hybrid_action(), rows)


def test_rows_of_a_slot_are_the_same_whenever_the_slots_beside_it_ended(make: Make) -> None:
    """Each draws from a generator of its own."""
    histories = []
    for lifetime in ((2, 3, 4, 1, NEVER), (2, NEVER, 1, 3, NEVER)):
        environment, rows = make(lifetime=lifetime)
        seen = [rows.observation["main"][[0, 4]].copy()]
        for _ in range(20):
            environment.step(act(), rows)
            seen.append(rows.observation["main"][[0, 4]].copy())
        histories.append(np.array(seen))
    np.testing.assert_array_equal(histories[0], histories[1])
    assert len(np.unique(histories[0][:, 0, 3])) > 9  # and every episode draws anew


class MortalWorld:
    """Two lives of two ticks; what its mask says comes from the test."""

    def __init__(self, space: gymnasium.Space, mask: Callable[[MortalWorld, NDArray[np.intp] | slice], None]) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(-1, 1, (1,), np.float32),
            action_space=space,
            action_mask=True,
            step_s=1.0,
            max_episode_steps=NEVER,
        )
        self.agent = Agent()
        self.lives = np.zeros(2)
        self._mask = mask

    def build(self) -> Agent:
        world = self

        class Wear(esper.Processor):
            def process(self) -> None:
                world.lives -= 1
                world.agent.terminated[:] = world.lives <= 0

        esper.create_entity(self.agent)
        esper.add_processor(Wear())
        return self.agent

    def reset(self, rows: NDArray[np.intp], rng: SlotDraws) -> None:
        self.lives[rows] = 2

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        self.agent.observation[rows] = 0
        self._mask(self, rows)


def run_mortals(world: MortalWorld) -> None:
    spec = describe_world("mortal", world.info, 2, NoParameters(), {})
    environment, rows = ColumnEnvironment(world, spec), allocate_rows(spec)
    try:
        environment.reset((1,), rows)
        for _ in range(4):
            environment.step({"main": np.zeros((2, *spec.action[0].shape), np.int64)}, rows)
    finally:
        environment.close()


def test_the_mask_of_an_agent_that_has_just_died_may_allow_nothing() -> None:
    def only_the_living(world: MortalWorld, rows: NDArray[np.intp] | slice) -> None:
        world.agent.action_mask[rows] = (world.lives[rows] > 0)[:, None]

    run_mortals(MortalWorld(gymnasium.spaces.Discrete(3), only_the_living))


def test_a_mask_that_allows_nothing_for_one_number_of_several_is_a_contract_error() -> None:
    def none_for_the_first(world: MortalWorld, rows: NDArray[np.intp] | slice) -> None:
        world.agent.action_mask[rows, :2] = False

    with pytest.raises(ContractError, match="at least one choice that is allowed for its number 0"):
        run_mortals(MortalWorld(gymnasium.spaces.MultiDiscrete([2, 3]), none_for_the_first))
