"""An ordinary esper game behind the environment contract, shown on fighters whose fate a test plans."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import esper
import gymnasium
import numpy as np
import pytest
from clusters import WORLDS
from worlds.arena import CHOICES, Act, Arena, Parameters, both, cut, die, join, respawn, vanish

from rustyrl.errors import ContractError
from rustyrl.rollout import Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, Weights, weights_layout
from rustyrl_actors.agent import Agent
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.draws import slot_generator
from rustyrl_actors.environment import StepRows, TimeStep, allocate_rows, rows_of
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.object import ObjectEnvironment
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll
from rustyrl_actors.world import NoParameters, ObjectWorld, WorldInfo, describe_world
from rustyrl_learner.ingest import admit

SEED = (1, 2, 3)
POISON = 77
ARENA = f"{WORLDS}/arena.py:Arena"

Plan = Mapping[int, Sequence[Act]]


class Played:
    """A world in its environment, and the rows that its last reset or step wrote."""

    def __init__(self, world: Any, slots: int, *, stagger: bool = False, name: str = "arena") -> None:
        self.world = world
        spec = describe_world(name, world.info, slots, NoParameters(), {})
        self.environment = ObjectEnvironment(world, spec, stagger=stagger)
        self.rows = allocate_rows(spec)

    def reset(self, seed: tuple[int, ...] = SEED) -> None:
        self._poison()
        self.environment.reset(seed, self.rows)

    def step(self, *action: int) -> TimeStep:
        """One step; every slot without an action of its own takes 0."""
        slots = self.environment.spec.slots
        self._poison()
        return self.environment.step({"main": np.array([*action, *[0] * slots][:slots], np.int64)}, self.rows)

    def steps(self, count: int) -> TimeStep:
        """So many steps; the outcome of the last one."""
        outcomes = [self.step() for _ in range(count)]
        return outcomes[-1]

    def numbers(self) -> list[int]:
        """Of the fighters in the slots, 0 where there is none."""
        return self.rows.observation["body"][:, 0].astype(int).tolist()

    def ages(self) -> list[int]:
        return self.rows.observation["body"][:, 1].astype(int).tolist()

    def flags(self, name: str) -> list[int]:
        """The slots in which a flag is up."""
        return np.flatnonzero(getattr(self.rows, name)).tolist()

    def _poison(self) -> None:
        """What was there before is not to be taken for what is written."""
        rows = self.rows
        for array in (*rows.observation.values(), rows.reward):
            array[...] = POISON
        for mask in rows.action_mask.values():
            mask[...] = False
        rows.terminated[...] = rows.truncated[...] = rows.valid[...] = True


Make = Callable[..., Played]


@pytest.fixture
def play() -> Iterator[Callable[..., Played]]:
    """Begin a game of any world; at the end of the test they all are closed and leave nothing of esper behind."""
    before, played = esper.list_worlds(), list[Played]()

    def begin(
        world: ObjectWorld, slots: int = 1, seed: tuple[int, ...] | None = SEED, *, stagger: bool = False
    ) -> Played:
        played.append(Played(world, slots, stagger=stagger))
        if seed is not None:
            played[-1].reset(seed)
        return played[-1]

    yield begin
    for each in played:
        each.environment.close()
    esper.switch_world("default")
    assert esper.list_worlds() == before


@pytest.fixture
def arena(play: Make) -> Make:
    """Begin a game of the arena in which this happens in these ticks of every game."""

    def begin(plan: Plan | None = None, slots: int = 4, *, seed=SEED, stagger: bool = False, **settings: Any) -> Played:
        return play(Arena(slots, Parameters(**settings), plan), slots, seed, stagger=stagger)

    return begin


def ended(step: TimeStep) -> list[int]:
    assert (step.episodes is None) == (step.final_observation is None)
    return [] if step.episodes is None else step.episodes.slot.tolist()


def seen_last(step: TimeStep) -> list[list[int]]:
    """Number and age in the final observations."""
    assert step.final_observation is not None
    return step.final_observation["body"][:, :2].astype(int).tolist()


# Slots.


def test_every_agent_has_a_slot_of_its_own_and_empty_slots_are_not_valid(arena: Make) -> None:
    game = arena(fighters=2)
    assert game.numbers() == [1, 2, 0, 0]
    game.step()
    assert game.numbers() == [1, 2, 0, 0]
    assert game.ages() == [1, 1, 0, 0]
    assert game.flags("valid") == [0, 1]
    assert game.flags("terminated") == game.flags("truncated") == []
    assert game.rows.reward.tolist() == [1, 1, 0, 0]


def test_slots_are_given_in_the_order_of_the_entities_whatever_the_order_in_which_esper_lists_them(play: Make) -> None:
    class Scenery(Arena):
        def reset(self, rng: np.random.Generator) -> None:
            super().reset(rng)
            while esper.create_entity() < 7:
                pass
            self.join()  # entity 8, which a set of small numbers lists before 1

    game = play(Scenery(2, Parameters(fighters=1)), 2)
    assert [entity for entity, _ in esper.get_component(Agent)] == [8, 1]
    assert game.numbers() == [1, 2]


def test_a_late_joiner_takes_the_lowest_free_slot(arena: Make) -> None:
    game = arena({1: [die(1, gone=True), die(3, gone=True)], 2: [join], 3: [join, join]}, slots=5, fighters=4)
    game.step()
    assert game.numbers() == [0, 2, 0, 4, 0]
    game.step()
    assert game.numbers() == [5, 2, 0, 4, 0]
    assert game.flags("valid") == [1, 3]  # it was not there when the actions were given
    assert game.rows.reward[0] == 0
    game.step()
    assert game.numbers() == [5, 2, 6, 4, 7]
    assert game.flags("valid") == [0, 1, 3]
    game.step()
    assert game.flags("valid") == [0, 1, 2, 3, 4]
    assert game.ages() == [2, 4, 1, 4, 1]


def test_an_agent_keeps_its_slot_while_others_come_and_go(arena: Make) -> None:
    game = arena({2: [die(1), join], 4: [die(4, gone=False)], 5: [join, respawn(3)]}, fighters=3)
    for _ in range(8):
        game.step()
        assert game.numbers()[1] == 2
        assert 1 in game.flags("valid")


# Rewards, ticks, actions.


def test_rewards_add_up_over_the_ticks_of_a_step_and_start_at_nothing(arena: Make) -> None:
    game = arena(ticks=3, fighters=3)
    game.step(2, 0, 1)
    assert game.rows.reward.tolist() == [3 * 21, 3, 3 * 11, 0]
    assert game.ages() == [3, 3, 3, 0]
    game.step(0, 1, 0)
    assert game.rows.reward.tolist() == [3, 3 * 11, 3, 0]
    assert game.environment.place.tick == 6


def test_ticks_stop_when_everybody_has_ended(arena: Make) -> None:
    game = arena({2: [die(1), cut(2)]}, slots=2, ticks=4)
    outcome = game.step()
    assert game.environment.place.tick == 2
    assert game.rows.reward.tolist() == [2, 2]
    assert seen_last(outcome) == [[1, 2], [2, 2]]
    assert game.world.games == 2


def test_ticks_go_on_while_one_lives(arena: Make) -> None:
    game = arena({2: [die(1)]}, slots=2, ticks=4)
    game.step()
    assert game.environment.place.tick == 4
    assert game.ages() == [0, 4]


class Recorder:
    """Keeps what its one agent is given, in spaces of any form."""

    def __init__(self, observation: Any = None, action: Any = None, *, masked: bool = False) -> None:
        self.info = WorldInfo(
            observation_space=observation or gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            action_space=action or gymnasium.spaces.Discrete(3),
            action_mask=masked,
            step_s=1.0,
            max_episode_steps=5,
        )
        self.given: list[Any] = []
        self.answer: Callable[[Agent], None] = lambda agent: None

    def reset(self, rng: np.random.Generator) -> None:
        self.agent = Agent()
        esper.create_entity(self.agent)

    def tick(self) -> None:
        self.given.append(self.agent.action)

    def observe(self) -> None:
        self.answer(self.agent)


def test_a_discrete_action_is_an_int_and_other_actions_are_the_rows_of_their_slots(play: Make) -> None:
    game = play(Recorder())
    game.step(2)
    assert game.world.given == [2]
    assert type(game.world.given[0]) is int
    box = play(Recorder(action=gymnasium.spaces.Box(-1, 1, (2,), np.float32)))
    box.environment.step({"main": np.array([[0.5, -1]], np.float32)}, box.rows)
    assert box.world.given[0].tolist() == [0.5, -1]
    several = play(
        Recorder(
            action=gymnasium.spaces.Dict(
                {"aim": gymnasium.spaces.Box(-1, 1, (2,), np.float32), "fire": gymnasium.spaces.Discrete(2)}
            )
        )
    )
    action = {"aim": np.array([[0.5, -1]], np.float32), "fire": np.array([1], np.int64)}
    several.environment.step(action, several.rows)
    assert several.world.given[0]["aim"].tolist() == [0.5, -1]
    assert several.world.given[0]["fire"] == 1
    assert type(several.world.given[0]["fire"]) is int


def test_reward_and_flags_are_clean_when_a_step_begins_whatever_was_left_in_them(play: Make) -> None:
    game = play(Recorder())
    found: list[Any] = []

    def answer(agent: Agent) -> None:
        found.append((agent.reward, agent.terminated, agent.truncated))
        agent.reward, agent.terminated, agent.truncated = 3.0, True, True

    game.world.answer = answer
    for _ in range(3):
        assert ended(game.step()) == []
        assert game.rows.reward.tolist() == [0]
    assert found == [(0.0, False, False)] * 3


def test_a_world_with_a_tick_of_its_own_is_ticked_by_it(play: Make) -> None:
    class Slow(Arena):
        def tick(self) -> None:
            esper.process()
            esper.process()

    game = play(Slow(1, Parameters(ticks=2)))
    game.step()
    assert game.ages() == [4]


# Ends.


def test_an_agent_that_dies_is_not_valid_from_the_next_step_on_and_its_rows_are_empty(arena: Make) -> None:
    game = arena({2: [die(2)]}, slots=3)
    game.step()
    outcome = game.step()
    assert ended(outcome) == [1]
    assert game.flags("terminated") == [1]
    assert game.flags("truncated") == []
    assert game.flags("valid") == [0, 1, 2]
    assert game.rows.reward.tolist() == [1, 1, 1]
    for _ in range(3):
        assert not game.rows.observation["body"][1].any()
        assert not game.rows.observation["crowd"][1].any()
        assert game.rows.action_mask["main"].sum(axis=1).tolist() == [CHOICES - 1, CHOICES, CHOICES - 1]
        assert game.numbers() == [1, 0, 3]
        outcome = game.step()
        assert ended(outcome) == []
        assert game.flags("terminated") == game.flags("truncated") == []
        assert game.flags("valid") == [0, 2]
        assert game.rows.reward.tolist() == [1, 0, 1]


@pytest.mark.parametrize("gone", [None, False, True], ids=["stays", "deleted", "deleted at once"])
def test_an_agent_may_be_deleted_in_the_step_in_which_it_dies(gone: bool | None, arena: Make) -> None:
    game = arena({2: [die(1, gone=gone)]}, slots=2, ticks=3)
    outcome = game.step()
    assert ended(outcome) == [0]
    assert game.rows.reward[1] == 3
    game.step()
    assert game.numbers() == [0, 2]
    assert game.flags("valid") == [1]


@pytest.mark.parametrize("gone", [None, False], ids=["stays", "deleted"])
def test_what_a_truncated_agent_sees_last_is_observed_even_if_it_is_about_to_be_deleted(
    gone: bool | None, arena: Make
) -> None:
    game = arena({2: [cut(1, gone=gone)], 3: [cut(2, gone=gone)]}, slots=3)
    game.step()
    outcome = game.step()
    assert game.flags("truncated") == [0]
    assert game.flags("terminated") == []
    assert seen_last(outcome) == [[1, 2]]
    outcome = game.step()
    assert seen_last(outcome) == [[2, 3]]
    assert game.numbers() == [0, 0, 3]


def test_terminated_wins_over_truncated_and_over_the_limit(arena: Make) -> None:
    game = arena({1: [both(1)], 3: [die(2)]}, slots=3, limit=3)
    game.step()
    assert game.flags("terminated") == [0]
    assert game.flags("truncated") == []
    game.steps(2)
    assert game.flags("terminated") == [1]
    assert game.flags("truncated") == [2]


def test_the_step_limit_truncates_everybody_and_the_game_begins_anew_in_the_same_step(arena: Make) -> None:
    game = arena(slots=3, limit=4)
    first = game.rows.observation["body"][:, 2].copy()
    for _ in range(3):
        assert ended(game.step()) == []
        assert game.world.games == 1
    outcome = game.step()
    assert ended(outcome) == game.flags("truncated") == [0, 1, 2]
    assert game.flags("terminated") == []
    assert seen_last(outcome) == [[1, 4], [2, 4], [3, 4]]
    assert outcome.final_observation is not None
    assert outcome.final_observation["body"][:, 2].tolist() == first.tolist()
    assert outcome.final_observation["crowd"].tolist() == [[3], [3], [3]]
    assert game.world.games == 2
    assert game.numbers() == [1, 2, 3]
    assert game.ages() == [0, 0, 0]
    assert not np.isin(game.rows.observation["body"][:, 2], first).any()
    assert game.flags("valid") == [0, 1, 2]  # in this step they were there
    assert ended(game.steps(3)) == []
    assert ended(game.step()) == [0, 1, 2]


def test_the_last_one_standing_is_truncated_at_the_limit_and_everybody_is_back(arena: Make) -> None:
    game = arena({1: [die(1, gone=True), die(2)], 2: [cut(4)]}, limit=5)
    game.steps(4)
    assert game.numbers() == [0, 0, 3, 0]
    outcome = game.step()
    assert ended(outcome) == game.flags("truncated") == [2]
    assert seen_last(outcome) == [[3, 5]]
    assert game.flags("valid") == [2]
    assert game.numbers() == [1, 2, 3, 4]
    game.step()
    assert game.flags("valid") == [0, 1, 2, 3]


def test_the_game_begins_anew_when_the_last_one_dies_before_the_limit(arena: Make) -> None:
    game = arena({1: [die(1)], 3: [die(2)]}, slots=2, limit=5)
    outcome = game.steps(3)
    assert ended(outcome) == [1]
    assert game.numbers() == [1, 2]
    assert game.ages() == [0, 0]
    assert game.world.games == 2
    game.step()
    assert ended(game.steps(2)) == [1]  # the limit counts from the new beginning: it dies before it
    assert game.flags("truncated") == []


def test_the_dead_of_a_game_are_not_taken_for_newcomers(arena: Make) -> None:
    """Their entities and Agents stay in the game for long, while others join."""
    game = arena({1: [die(1), cut(2)], 3: [join]}, slots=4, fighters=3)
    game.steps(4)
    assert game.numbers() == [4, 0, 3, 0]


def test_an_episode_tells_its_return_its_length_and_its_metrics(arena: Make) -> None:
    game = arena({2: [die(2)], 5: [respawn(1)]}, slots=3, ticks=2, limit=4)
    outcome = game.step(1, 2, 0)
    assert outcome.episodes is not None
    assert outcome.episodes.episode_return.tolist() == [2 * 21]
    assert outcome.episodes.length.tolist() == [1]
    assert outcome.episodes.metrics["age"].tolist() == [2]
    game.step()
    outcome = game.step()
    assert outcome.episodes is not None
    assert ended(outcome) == [0]
    assert outcome.episodes.episode_return.tolist() == [2 * 11 + 2 + 1]  # one tick of the last step was its own
    assert outcome.episodes.length.tolist() == [3]
    assert outcome.episodes.metrics["age"].tolist() == [5]
    outcome = game.step(2)
    assert outcome.episodes is not None
    assert ended(outcome) == [0, 2]
    assert outcome.episodes.episode_return.tolist() == [2 * 21, 4 * 2]
    assert outcome.episodes.length.tolist() == [1, 4]
    assert outcome.episodes.metrics["age"].tolist() == [3, 8]
    dtypes = {array.dtype for array in (outcome.episodes.episode_return, outcome.episodes.metrics["age"])}
    assert dtypes == {np.dtype(np.float32)}
    assert outcome.episodes.slot.dtype == outcome.episodes.length.dtype == np.int32


def test_final_observations_are_copies_that_later_steps_leave_alone(arena: Make) -> None:
    game = arena({1: [cut(1)]}, slots=2)
    outcome = game.step()
    assert outcome.final_observation is not None
    before = {name: array.copy() for name, array in outcome.final_observation.items()}
    game.steps(3)
    for name, array in before.items():
        np.testing.assert_array_equal(outcome.final_observation[name], array)


# Respawns.


def test_a_fresh_agent_takes_the_slot_of_one_that_ended_in_the_same_step(arena: Make) -> None:
    game = arena({2: [respawn(1)]}, slots=2)
    draws = game.rows.observation["body"][:, 2].copy()
    game.step()
    outcome = game.step()
    assert ended(outcome) == game.flags("terminated") == [0]
    assert game.numbers() == [3, 2]
    assert game.ages() == [0, 2]
    assert game.rows.observation["body"][0, 2] not in draws
    game.step()
    assert game.flags("valid") == [0, 1]
    assert game.flags("terminated") == []
    assert game.rows.reward.tolist() == [1, 1]


def test_the_last_and_the_first_observation_of_one_slot_are_not_mixed_up(arena: Make) -> None:
    """One is cut and still there, the newcomer takes its slot and both are observed together."""
    game = arena({2: [cut(1), join]}, slots=2)
    draw = game.rows.observation["body"][0, 2]
    game.step()
    outcome = game.step()
    assert outcome.final_observation is not None
    assert seen_last(outcome) == [[1, 2]]
    assert outcome.final_observation["body"][0, 2] == draw
    assert outcome.final_observation["crowd"].tolist() == [[3]]
    assert game.numbers() == [3, 2]
    assert game.ages() == [0, 2]
    mask = game.rows.action_mask["main"]
    assert np.argwhere(~mask).tolist() == [[0, 0], [1, 2]]  # the one that was cut forbade itself choice 1
    game.step()
    assert game.numbers() == [3, 2]  # it is still in the game, and writes into nobody's rows


def test_a_game_goes_on_as_long_as_somebody_is_in_it(arena: Make) -> None:
    """All end in a step, but one comes back in it."""
    game = arena({2: [die(1), respawn(2)]}, slots=2, limit=10)
    game.steps(2)
    assert game.world.games == 1
    assert game.numbers() == [3, 0]
    assert game.flags("terminated") == [0, 1]


def test_at_the_limit_all_end_together_even_if_one_comes_back_in_that_step(arena: Make) -> None:
    game = arena({4: [respawn(1)]}, slots=2, limit=4)
    outcome = game.steps(4)
    assert ended(outcome) == [0, 1]
    assert game.world.games == 2
    assert game.numbers() == [1, 2]


def test_who_comes_and_dies_within_a_step_never_had_a_slot(arena: Make) -> None:
    game = arena({1: [join], 2: [die(2)]}, slots=2, fighters=1, ticks=2)
    game.step()
    assert game.numbers() == [1, 0]
    game.step()
    assert game.flags("valid") == [0]


def test_a_new_agent_in_the_place_of_one_that_goes_on_is_a_mistake(arena: Make) -> None:
    def replace(game: Arena) -> None:
        esper.add_component(game.find(2)[0], Agent())

    game = arena({1: [replace]}, slots=2)
    with pytest.raises(ContractError, match=r"slot 1, .*lost its Agent, while its episode went on"):
        game.step()


# What agents are given to write into, and what they may put in its place.


@pytest.mark.parametrize(
    "value",
    [[0.5, -0.25], (0.5, -0.25), np.array([0.5, -0.25]), np.array([0.5, -0.25], np.float32), np.float16([0.5, -0.25])],
    ids=["list", "tuple", "float64", "float32", "float16"],
)
def test_an_observation_may_be_put_in_place_of_the_array(value: Any, play: Make) -> None:
    world = Recorder()
    world.answer = lambda agent: setattr(agent, "observation", value)
    game = play(world)
    assert game.rows.observation["main"].tolist() == [[0.5, -0.25]]
    game.step()
    assert game.rows.observation["main"].tolist() == [[0.5, -0.25]]
    outcome = game.steps(4)
    assert outcome.final_observation is not None
    assert outcome.final_observation["main"].tolist() == [[0.5, -0.25]]


def test_a_list_of_whole_numbers_will_do_for_every_dtype_that_holds_them(play: Make) -> None:
    world = Recorder(
        gymnasium.spaces.Dict(
            {"image": gymnasium.spaces.Box(0, 255, (2,), np.uint8), "bits": gymnasium.spaces.MultiBinary(2)}
        )
    )
    world.answer = lambda agent: agent.observation.update(image=[7, 255], bits=[0, 1])
    game = play(world)
    assert game.rows.observation["image"].tolist() == [[7, 255]]
    assert game.rows.observation["bits"].tolist() == [[False, True]]


def test_what_was_put_in_place_is_copied_and_the_next_step_gives_new_rows(play: Make) -> None:
    own = np.zeros(2, np.float32)
    world = Recorder()
    world.answer = lambda agent: setattr(agent, "observation", own)
    game = play(world)
    own[:] = 1
    assert not game.rows.observation["main"].any()
    world.answer = lambda agent: agent.observation.__setitem__(slice(None), 0.5)
    game.step()
    assert game.rows.observation["main"].tolist() == [[0.5, 0.5]]
    assert own.tolist() == [1, 1]


def test_parts_of_a_dict_and_the_whole_of_it_may_be_replaced(play: Make) -> None:
    space = gymnasium.spaces.Dict({name: gymnasium.spaces.Box(-1, 1, (1,), np.float32) for name in ("a", "b")})
    world = Recorder(space)
    world.answer = lambda agent: agent.observation.update(a=[0.5])
    game = play(world)
    assert game.rows.observation["a"].tolist() == [[0.5]]
    assert game.rows.observation["b"].tolist() == [[POISON]]  # unwritten
    world.answer = lambda agent: setattr(agent, "observation", {"b": [0.25], "a": np.ones(1)})
    game.step()
    assert game.rows.observation["a"].tolist() == [[1]]
    assert game.rows.observation["b"].tolist() == [[0.25]]


def test_a_mask_may_be_put_in_place_of_the_array_and_allows_everything_if_it_is_left_alone(play: Make) -> None:
    world = Recorder(masked=True)
    game = play(world)
    assert game.rows.action_mask["main"].all()
    world.answer = lambda agent: setattr(agent, "action_mask", [True, False, True])
    game.step()
    assert game.rows.action_mask["main"].tolist() == [[True, False, True]]
    world.answer = lambda agent: None
    game.step()
    assert game.rows.action_mask["main"].all()


def test_masks_of_several_parts_are_a_dict_of_those_that_are_masked(play: Make) -> None:
    action = gymnasium.spaces.Dict(
        {
            "aim": gymnasium.spaces.Box(-1, 1, (1,), np.float32),
            "fire": gymnasium.spaces.Discrete(2),
            "gear": gymnasium.spaces.Discrete(3),
        }
    )
    world = Recorder(action=action, masked=True)

    def answer(agent: Agent) -> None:
        assert sorted(agent.action_mask) == ["fire", "gear"]
        agent.action_mask["fire"][0] = False
        agent.action_mask["gear"] = np.array([False, True, True])

    world.answer = answer
    game = play(world)
    assert game.rows.action_mask["fire"].tolist() == [[False, True]]
    assert game.rows.action_mask["gear"].tolist() == [[False, True, True]]


# Mistakes.


def put(name: str, value: Any, number: int = 2) -> Act:
    """A fighter's Agent gets this in a field."""
    return lambda game: setattr(game.find(number)[1], name, value)


FIELDS = {
    "reward is text": ("reward", "much", "a number, got 'much' (str)"),
    "reward is an array": ("reward", np.ones(2), "a number, got float64 (2,)"),
    "reward is None": ("reward", None, "a number, got None (NoneType)"),
    "flag is a number": ("terminated", 1, "True or False, got 1 (int)"),
    "flag is an array": ("truncated", np.zeros(1, bool), "True or False, got bool (1,)"),
    "flag is None": ("truncated", None, "True or False, got None (NoneType)"),
    "observation is no dict": ("observation", [1.0], "a dict of ['body', 'crowd'], got [1.0] (list)"),
}


@pytest.mark.parametrize(("name", "value", "said"), FIELDS.values(), ids=FIELDS)
def test_a_wrong_value_is_named_with_its_field_slot_tick_and_seed(
    name: str, value: Any, said: str, arena: Make
) -> None:
    game = arena({6: [put(name, value)]}, slots=3, ticks=2)
    if name == "observation":
        game.world.observe = lambda: None
    game.steps(2)
    with pytest.raises(ContractError) as caught:
        game.step()
    assert str(caught.value) == (
        "world 'arena', slot 1, tick 6 (env step 3) after reset with seed (1, 2, 3): "
        f"component Agent, field {name}: expected {said}"
    )


@pytest.mark.parametrize("flag", [np.True_, True])
def test_a_flag_may_be_numpys(flag: Any, arena: Make) -> None:
    game = arena({1: [put("terminated", flag, 1)]}, slots=2)
    game.step()
    assert game.flags("terminated") == [0]


@pytest.mark.parametrize("reward", [np.float64(2.5), np.float32(2.5), np.array(2.5), 2.5])
def test_a_reward_may_be_numpys(reward: Any, arena: Make) -> None:
    game = arena({1: [put("reward", reward, 1)]}, slots=1, limit=1)
    outcome = game.step()
    assert game.rows.reward.tolist() == [2.5]
    assert outcome.episodes is not None
    assert outcome.episodes.episode_return.tolist() == [2.5]


PARTS = gymnasium.spaces.Dict({name: gymnasium.spaces.Box(-1, 1, (2,), np.float32) for name in ("a", "b")})
CHOICE_PARTS = gymnasium.spaces.Dict({name: gymnasium.spaces.Discrete(2) for name in ("fire", "gear")})
BYTES = gymnasium.spaces.Box(0, 255, (2,), np.uint8)
SEEN = {
    "wrong shape": (
        "observation",
        np.zeros(3, np.float32),
        {},
        "observation: expected numbers that fit float32 (2,), got float32 (3,)",
    ),
    "wrong length": (
        "observation",
        [0.5],
        {},
        "observation: expected numbers that fit float32 (2,), got [0.5] (list)",
    ),
    "wrong dtype": (
        "observation",
        np.zeros(2, np.complex64),
        {},
        "observation: expected numbers that fit float32 (2,), got complex64 (2,)",
    ),
    "fractions in bytes": (
        "observation",
        np.ones(2, np.float32),
        {"observation": BYTES},
        "observation: expected numbers that fit uint8 (2,), got float32 (2,)",
    ),
    "text": (
        "observation",
        ["a", "b"],
        {},
        "observation: expected numbers that fit float32 (2,), got ['a', 'b'] (list)",
    ),
    "ragged": (
        "observation",
        [[1.0], [1.0, 2.0]],
        {},
        "observation: expected numbers that fit float32 (2,), got [[1.0], [1.0, 2.0]] (list)",
    ),
    "nothing": (
        "observation",
        None,
        {},
        "observation: expected numbers that fit float32 (2,), got None (NoneType)",
    ),
    "a number": (
        "observation",
        0.5,
        {},
        "observation: expected numbers that fit float32 (2,), got 0.5 (float)",
    ),
    "key missing": (
        "observation",
        {"a": np.zeros(2)},
        {"observation": PARTS},
        "observation: expected a dict of ['a', 'b'], got ['a']",
    ),
    "key too many": (
        "observation",
        {"a": np.zeros(2), "b": np.zeros(2), "c": 1},
        {"observation": PARTS},
        "observation: expected a dict of ['a', 'b'], got ['a', 'b', 'c']",
    ),
    "wrong shape of a part": (
        "observation",
        {"a": np.zeros(2), "b": np.zeros((1, 2))},
        {"observation": PARTS},
        "observation['b']: expected numbers that fit float32 (2,), got float64 (1, 2)",
    ),
    "mask of numbers": (
        "action_mask",
        [0.0, 1.0, 1.0],
        {},
        "action_mask: expected numbers that fit bool (3,), got [0.0, 1.0, 1.0] (list)",
    ),
    "mask too short": (
        "action_mask",
        [True],
        {},
        "action_mask: expected numbers that fit bool (3,), got [True] (list)",
    ),
    "mask keys": (
        "action_mask",
        {"fire": [True, True]},
        {"action": CHOICE_PARTS},
        "action_mask: expected a dict of ['fire', 'gear'], got ['fire']",
    ),
    "mask that allows nothing": (
        "action_mask",
        [False, False, False],
        {},
        "action_mask['main']: expected at least one choice that is allowed, got none",
    ),
    "mask of a part that allows nothing": (
        "action_mask",
        {"fire": [True, True], "gear": [False, False]},
        {"action": CHOICE_PARTS},
        "action_mask['gear']: expected at least one choice that is allowed, got none",
    ),
}


@pytest.mark.parametrize(("name", "value", "spaces", "said"), SEEN.values(), ids=SEEN)
def test_an_observation_or_mask_that_does_not_fit_is_named_with_its_field(
    name: str, value: Any, spaces: dict[str, Any], said: str, play: Make
) -> None:
    world = Recorder(**spaces, masked=True)
    game = play(world)
    world.answer = lambda agent: setattr(agent, name, value)
    with pytest.raises(ContractError) as caught:
        game.environment.step({part.name: np.zeros(1, np.int64) for part in game.environment.spec.action}, game.rows)
    where = "world 'arena', slot 0, tick 1 (env step 1) after reset with seed (1, 2, 3): component Agent, field "
    assert str(caught.value) == where + said


@pytest.mark.parametrize("gone", [False, True], ids=["deleted", "deleted at once"])
@pytest.mark.parametrize("ticks", [1, 3])
def test_an_entity_deleted_without_a_flag_is_a_mistake(gone: bool, ticks: int, arena: Make) -> None:
    game = arena({3 * ticks: [vanish(2, gone=gone)]}, slots=3, ticks=ticks)
    game.steps(2)
    with pytest.raises(ContractError) as caught:
        game.step()
    assert str(caught.value) == (
        f"world 'arena', slot 1, tick {3 * ticks} (env step 3) after reset with seed (1, 2, 3): the entity was deleted,"
        " or lost its Agent, while its episode went on; set agent.terminated (it died) or agent.truncated (it was "
        "taken away) before that"
    )


def test_an_agent_taken_off_its_entity_without_a_flag_is_a_mistake(arena: Make) -> None:
    game = arena({1: [lambda game: esper.remove_component(game.find(1)[0], Agent)]}, slots=2)
    with pytest.raises(ContractError, match=r"slot 0, tick 1 .*or lost its Agent, while its episode went on"):
        game.step()


def test_who_is_truncated_must_stay_to_see_what_it_sees_last(arena: Make) -> None:
    game = arena({2: [cut(2, gone=True)]}, slots=2, ticks=2)
    with pytest.raises(ContractError, match=r"slot 1, tick 2 .*truncated and removed at once.*without immediate=True"):
        game.step()


def test_more_agents_than_slots_says_how_to_get_more(arena: Make) -> None:
    with pytest.raises(ContractError) as caught:
        arena(slots=2, fighters=3)
    assert str(caught.value) == (
        "world 'arena', tick 0 (env step 0) after reset with seed (1, 2, 3): entity 3 is one agent more than the 2 "
        "slots of this world; build it for more with --set env.slots=3"
    )
    game = arena({2: [join]}, slots=2)
    game.step()
    with pytest.raises(ContractError, match=r"tick 2 \(env step 2\).*entity 3 is one agent more than the 2 slots"):
        game.step()


def test_a_world_without_an_agent_says_how_to_make_one(play: Make) -> None:
    class Empty(Arena):
        def join(self) -> int:
            return esper.create_entity()

    with pytest.raises(ContractError, match=r"reset\(\) created no entity with an Agent.*add_component\(entity, Agent"):
        play(Empty(2, Parameters()), 2)


@pytest.mark.parametrize(("value", "said"), [(None, "None (NoneType)"), ("old", "'old' (str)")])
def test_a_metric_that_is_missing_or_no_number_is_named(value: Any, said: str, arena: Make) -> None:
    def spoil(game: Arena) -> None:
        metrics = game.find(2)[1].episode_metrics
        metrics.pop("age")
        if value is not None:
            metrics["age"] = value

    game = arena({3: [spoil, die(2)]}, slots=2)
    game.steps(2)
    with pytest.raises(ContractError) as caught:
        game.step()
    assert str(caught.value) == (
        "world 'arena', slot 1, tick 3 (env step 3) after reset with seed (1, 2, 3): component Agent, field "
        f"episode_metrics['age']: expected a number, as the world declares it, got {said}"
    )


@pytest.mark.parametrize("where", ["reset", "tick", "observe"])
def test_an_error_of_the_game_reaches_the_caller_and_leaves_the_environment_closable(where: str, play: Make) -> None:
    class Broken(Arena):
        def fail(self, *_: Any) -> None:
            raise ZeroDivisionError("the game fell over")

    world = Broken(2, Parameters())
    before = esper.list_worlds()
    game = play(world, 2)
    if where == "tick":
        world.plan = {1: [Broken.fail]}
    else:
        setattr(world, where, world.fail)
    with pytest.raises(ZeroDivisionError, match="the game fell over"):
        game.reset() if where == "reset" else game.step()
    game.environment.close()
    assert esper.list_worlds() == before
    game.environment.close()  # a second time is no mistake


# Repeating, and keeping apart.


def history(game: Played, steps: int, seed: tuple[int, ...] | None = SEED) -> list[Any]:
    """All that some steps under known actions say, bit by bit."""
    if seed is not None:
        game.reset(seed)
    rng, said = np.random.default_rng(5), [_said(game.rows)]
    for _ in range(steps):
        outcome = game.step(*rng.integers(0, CHOICES, game.environment.spec.slots))
        said.append((_said(game.rows), _told(outcome)))
    return said


def _said(rows: StepRows) -> list[bytes]:
    named = {**rows.observation, **{f"mask {name}": mask for name, mask in rows.action_mask.items()}}
    return [array.tobytes() for array in (*named.values(), rows.reward, rows.terminated, rows.truncated, rows.valid)]


def _told(outcome: TimeStep) -> Any:
    episodes = outcome.episodes
    if episodes is None or outcome.final_observation is None:
        return None
    columns = (episodes.slot, episodes.episode_return, episodes.length, *episodes.metrics.values())
    return [array.tobytes() for array in (*columns, *outcome.final_observation.values())]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("ticks", [1, 3])
def test_a_reset_with_the_same_seed_repeats_bit_for_bit(stagger: bool, ticks: int, arena: Make) -> None:
    settings = {"unrest": 0.1, "limit": 12, "ticks": ticks, "stagger": stagger}
    game, other = arena(**settings), arena(**settings)
    first = history(game, 100)
    assert game.world.games > 4
    assert history(game, 100) == first  # what was played before leaves no trace
    assert history(other, 100) == first
    assert history(other, 100, (1, 2, 4))[1:] != first[1:]


def test_a_game_draws_from_the_generator_of_slot_0_of_its_environment(arena: Make) -> None:
    """As a column world of one slot does, so that one game in both styles can have the same numbers."""
    game = arena(slots=3, limit=2)
    expected = slot_generator(SEED, 0).random(6).astype(np.float32)
    assert game.rows.observation["body"][:, 2].tolist() == expected[:3].tolist()
    game.steps(2)
    assert game.rows.observation["body"][:, 2].tolist() == expected[3:].tolist()


def test_two_games_in_one_process_do_not_touch_each_other(arena: Make) -> None:
    alone = [history(arena(unrest=0.1, limit=12), 60, seed) for seed in ((1, 0), (1, 1))]
    games = [arena(unrest=0.1, limit=12, seed=(1, index)) for index in (0, 1)]
    rngs = [np.random.default_rng(5) for _ in games]
    said = [[_said(game.rows)] for game in games]
    for t in range(60):
        for game, rng, heard in list(zip(games, rngs, said, strict=True))[:: 1 if t % 2 else -1]:
            outcome = game.step(*rng.integers(0, CHOICES, 4))
            heard.append((_said(game.rows), _told(outcome)))
    assert said == alone
    assert said[0] != said[1]


def test_the_default_world_of_esper_is_left_as_it_was(arena: Make) -> None:
    class Own(esper.Processor):
        def process(self) -> None:
            raise AssertionError("a processor of another world was run")

    esper.switch_world("default")
    esper.add_processor(Own())
    entity = esper.create_entity(Agent())
    game = arena({1: [die(1, gone=True)]}, slots=2, limit=3)
    game.steps(7)
    game.environment.close()
    assert esper.current_world == "default"
    assert [e for e, _ in esper.get_component(Agent)] == [entity]
    assert esper.get_processor(Own) is not None
    assert esper.create_entity() == entity + 1
    esper.remove_processor(Own)
    esper.clear_database()


def test_the_world_is_entered_for_every_reset_and_step_whichever_is_current(arena: Make) -> None:
    game = arena(slots=1)
    esper.switch_world("default")
    game.step()
    assert game.ages() == [1]
    esper.switch_world("default")
    game.reset()
    assert game.ages() == [0]
    assert esper.current_world != "default"
    esper.switch_world("default")
    assert not esper.get_component(Agent)


def test_a_new_game_begins_in_an_empty_esper_world(play: Make) -> None:
    class Tidy(Arena):
        def reset(self, rng: np.random.Generator) -> None:
            self.found = (list(esper.get_entities()), esper.get_component(Agent), esper.get_processor(Judge))
            self.heard = []
            esper.dispatch_event("cheer")
            super().reset(rng)
            esper.add_processor(Judge())
            esper.set_handler("cheer", self.hear)
            esper.create_entity()

        def hear(self) -> None:
            self.heard.append(self.games)

    class Judge(esper.Processor):
        def process(self) -> None:
            esper.dispatch_event("cheer")

    game = play(Tidy(2, Parameters(limit=2)), 2)
    game.steps(2)
    assert game.world.games == 2
    assert game.world.found == ([], [], None)
    assert game.world.heard == []
    game.step()
    assert game.world.heard == [2]
    assert esper.create_entity() == 4  # entities count from 1 in every game


class Gambler:
    """A game that draws from the global generators, in amounts that depend on the throw."""

    global_random = True

    def __init__(self, draw: Callable[[], list[float]] | None = None, *, limit: int = 4) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
            action_space=gymnasium.spaces.Discrete(2),
            step_s=1.0,
            max_episode_steps=limit,
        )
        self._draw = draw or self._throw

    def _throw(self) -> list[float]:
        dice = [random.randint(1, 6) for _ in range(random.randint(1, 3))]
        return [sum(dice), np.random.random(), np.random.randint(9) + random.random()]

    def reset(self, rng: np.random.Generator) -> None:
        self.agent = Agent()
        self.seen = self._draw()
        esper.create_entity(self.agent)

    def tick(self) -> None:
        self.seen = self._draw()

    def observe(self) -> None:
        self.agent.observation = self.seen


def throws(game: Played, count: int) -> list[list[float]]:
    """What a gambler sees now, and in the next steps."""
    seen = [game.rows.observation["main"][0].tolist()]
    for _ in range(count):
        game.step()
        seen.append(game.rows.observation["main"][0].tolist())
    return seen


def gaussians() -> list[float]:
    """One number of each generator: both make normal numbers in pairs and keep the second one."""
    return [random.gauss(0, 1), np.random.normal(), np.random.normal()]


def one_gaussian() -> list[float]:
    return [random.gauss(0, 1), np.random.normal(), 0.0]


@pytest.mark.parametrize("draw", [None, gaussians, one_gaussian], ids=["dice", "normal pairs", "odd normals"])
def test_each_world_has_global_generators_of_its_own_in_any_interleaving(
    draw: Callable[[], list[float]] | None, play: Make
) -> None:
    alone = [throws(play(Gambler(draw), seed=(seed,)), 12) for seed in (1, 2, 3)]
    assert alone[0] != alone[1] != alone[2]
    games = [play(Gambler(draw), seed=(seed,)) for seed in (1, 2, 3)]
    seen = [throws(game, 0) for game in games]
    order = [index for index in (0, 1, 2) for _ in range(12)]
    random.Random(4).shuffle(order)
    for index in order:
        seen[index] += throws(games[index], 1)[1:]
    assert seen == alone


def test_a_reset_seeds_the_global_generators_of_its_world_alone(play: Make) -> None:
    game, other = play(Gambler()), play(Gambler(), seed=(9,))
    first = throws(game, 6)
    later = throws(other, 3)
    game.reset()
    assert throws(game, 6) == first
    game.reset((5,))
    assert throws(game, 6) != first
    game.environment.close()
    fresh = play(Gambler(), seed=(9,))
    assert later + throws(other, 3)[1:] == throws(fresh, 6)


def test_a_seed_of_the_games_own_stays_in_its_world(play: Make) -> None:
    class Seeding(Gambler):
        def reset(self, rng: np.random.Generator) -> None:
            random.seed(1)
            np.random.seed(1)
            super().reset(rng)

    other = play(Gambler(), seed=(2,))
    expected = throws(other, 8)
    other.reset((2,))
    seen = throws(other, 2)
    game = play(Seeding(), seed=(3,))
    seen += throws(other, 2)[1:]
    game.steps(6)
    seen += throws(other, 4)[1:]
    assert seen == expected


def test_a_world_that_does_not_ask_for_it_leaves_the_global_generators_alone(arena: Make) -> None:
    before = random.getstate(), str(np.random.get_state())
    game = arena(unrest=0.2)
    game.steps(30)
    assert (random.getstate(), str(np.random.get_state())) == before


def test_stagger_shortens_the_first_game_alone(arena: Make) -> None:
    limit, first = 8, set()
    for seed in range(40):
        game = arena(slots=1, limit=limit, stagger=True, seed=(seed,))
        assert game.ages() == [0]
        ends = [step for step in range(1, 4 * limit) if ended(game.step())]
        first.add(ends[0])
        assert set(np.diff(ends)) == {limit}
    assert first == set(range(1, limit + 1))


def test_without_stagger_the_first_game_has_its_full_length(arena: Make) -> None:
    game = arena(slots=1, limit=8)
    assert [step for step in range(1, 30) if ended(game.step())] == [8, 16, 24]


# Recorded through the actor's own loop.

LENGTH = 40
TICKET = Ticket(3, 2, (4, 7, 9))


def recorded(config: dict[str, Any], batches: int = 1) -> tuple[Rollout, Any]:
    """What several worlds of one actor under one policy do in the last of so many batches."""
    source = find_environment(ARENA, config)
    spec = source.spec
    slots = spec.slots * len(TICKET.worlds)
    origin = RolloutOrigin(spec.fingerprint, "main", TICKET, 0, 0, 0)
    columns = [slice(i * spec.slots, (i + 1) * spec.slots) for i in range(len(TICKET.worlds))]
    buffer = UnrollBuffer(
        allocate_rollout(spec, LENGTH, slots, origin, poison=True), columns, allocate_noise(spec, LENGTH, slots)
    )
    policy_spec = PolicySpec(spec.observation, spec.action, (8,), "tanh", normalize=False)
    rng = np.random.default_rng(0)
    layout = weights_layout(policy_spec)
    weights = Weights(policy_spec, {n: rng.normal(0, 0.5, shape).astype(np.float32) for n, shape in layout.items()})
    worlds = [OwnedWorld(index, source.make(), 0, allocate_rows(spec)) for index in TICKET.worlds]
    policy = Policy(weights, slots)
    try:
        for world in worlds:
            world.environment.reset((6, world.index, 0), world.now)
        for batch in range(batches):
            for world, part in zip(worlds, columns, strict=True):
                fill_noise(buffer.noise, spec, part, noise_generator(6, world.index, batch))
            rollout = unroll(worlds, policy, buffer, Stages())
    finally:
        for world in worlds:
            world.environment.close()
    return rollout, spec


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("ticks", [1, 3])
def test_the_learner_admits_what_restless_worlds_record(ticks: int, batches: int) -> None:
    rollout, spec = recorded({"unrest": 0.1, "slots": 4, "limit": 15, "ticks": ticks}, batches)
    admit(rollout, spec, LENGTH, 0)
    assert rollout.truncated.any()
    assert rollout.terminated.any()
    assert not rollout.valid.all()
    assert not (rollout.terminated & rollout.truncated).any()
    ends = rollout.terminated | rollout.truncated
    assert not (ends & ~rollout.valid).any()
    assert not (rollout.valid[:-1] & ~rollout.valid[1:] & ~ends[:-1]).any()
    assert not rollout.reward[~rollout.valid].any()
    assert not rollout.observation["body"][:-1][~rollout.valid].any()
    assert len(rollout.episodes.slot) == ends.sum()
    assert (rollout.episodes.length <= 15).all()
    assert (rollout.final_observation["body"][:, 0] > 0).all()
    assert (np.sort(rollout.final_observation["body"][:, 1]) >= 1).all()


def test_worlds_side_by_side_record_what_each_of_them_does_alone() -> None:
    config = {"unrest": 0.1, "slots": 4, "limit": 15}
    rollout, spec = recorded(config)
    source = find_environment(ARENA, config)
    for position, index in enumerate(TICKET.worlds):
        columns = slice(position * 4, position * 4 + 4)
        environment = source.make()
        alone = allocate_rollout(spec, LENGTH, 4, rollout.origin)
        now = allocate_rows(spec)
        environment.reset((6, index, 0), now)
        assert all(np.array_equal(now.observation[n], rollout.observation[n][0, columns]) for n in now.observation)
        finals, places = [], []
        for t, rows in enumerate(rows_of(alone, slice(0, 4))):
            step = environment.step({"main": rollout.action["main"][t, columns]}, rows)
            if step.episodes is None or step.final_observation is None:
                continue
            kept = rows.truncated[step.episodes.slot]
            finals += list(step.final_observation["body"][kept])
            places += [(t, int(slot) + columns.start) for slot in step.episodes.slot[kept]]
        environment.close()
        for name in ("reward", "terminated", "truncated", "valid"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(rollout, name)[:, columns])
        for name in alone.observation:
            np.testing.assert_array_equal(alone.observation[name][1:], rollout.observation[name][1:, columns])
        mine = (rollout.final_index[:, 1] >= columns.start) & (rollout.final_index[:, 1] < columns.stop)
        assert rollout.final_index[mine].tolist() == [list(place) for place in places]
        np.testing.assert_array_equal(rollout.final_observation["body"][mine], np.array(finals))


def test_an_error_within_a_rollout_names_world_batch_and_place() -> None:
    source = find_environment(ARENA, {"slots": 2})
    world = OwnedWorld(7, source.make(), 3, allocate_rows(source.spec))
    world.environment.reset((6, 7, 3), world.now)
    world.environment._world.plan = {5: [vanish(1, gone=True)]}  # type: ignore[attr-defined]
    origin = RolloutOrigin(source.spec.fingerprint, "main", Ticket(3, 2, (7,)), 0, 0, 0)
    rollout = allocate_rollout(source.spec, LENGTH, 2, origin)
    buffer = UnrollBuffer(rollout, [slice(0, 2)], allocate_noise(source.spec, LENGTH, 2))
    buffer.noise[...] = 0.5
    policy_spec = PolicySpec(source.spec.observation, source.spec.action, (), "tanh", normalize=False)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights_layout(policy_spec).items()}
    with pytest.raises(ContractError, match=r"slot 0, tick 5 .*seed \(6, 7, 3\).*went on") as caught:
        unroll([world], Policy(Weights(policy_spec, arrays), 2), buffer, Stages())
    world.environment.close()
    [note] = caught.value.__notes__
    assert re.search(r"world 7 of .*arena.py:Arena' in step 4 of batch 3", note)
