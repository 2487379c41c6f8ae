"""A policy within a game: what `PolicyProcessor` gives to agents is what the policy says, in both styles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import esper
import numpy as np
import pytest
from numpy.typing import NDArray
from worlds.arena import Arena, Fighter, Parameters, die, join

from rustyrl.errors import ContractError
from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl.weights import PolicySpec, Weights, encode_weights, weights_layout
from rustyrl_actors.agent import Agent
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.object import ObjectEnvironment
from rustyrl_actors.processor import PolicyProcessor
from rustyrl_actors.world import describe_world

ONE = (ArraySpec("main", (4,), "float32"),)
SEVERAL = (ArraySpec("body", (3,), "float32"), ArraySpec("view", (2, 2), "uint8"))
BOX = ActionSpec("box", shape=(2,), low=(-0.25, 0.0), high=(0.25, 0.5))
CHOICE = ActionSpec("discrete", counts=(3,))
MASKED = ActionSpec("discrete", counts=(3,), masked=True)
HYBRID = (
    ActionSpec("box", "aim", (2,), low=(-0.25, 0.0), high=(0.25, 0.5)),
    ActionSpec("discrete", "fire", counts=(4,), masked=True),
    ActionSpec("discrete", "gears", (2,), counts=(3, 2)),
)
ALL_SPACES = {
    "box": (ONE, (BOX,)),
    "choice": (ONE, (CHOICE,)),
    "masked": (SEVERAL, (MASKED,)),
    "hybrid": (SEVERAL, HYBRID),
    "hybrid of one array": (ONE, HYBRID),
}
SPACES = pytest.mark.parametrize(("observation", "action"), ALL_SPACES.values(), ids=ALL_SPACES)

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def _game() -> Iterator[None]:
    """An esper world for each test."""
    esper.switch_world("test-processor")
    yield
    esper.switch_world("default")
    esper.delete_world("test-processor")


def make_weights(observation: tuple[ArraySpec, ...], action: tuple[ActionSpec, ...], seed: int = 0) -> Weights:
    spec = PolicySpec(observation, action, (8,), "tanh", normalize=True)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.7, shape).astype(np.float32) for name, shape in weights_layout(spec).items()}
    arrays["normalizer.variance"] = np.exp(arrays["normalizer.variance"])
    return Weights(spec, arrays)


def draw_observations(spec: PolicySpec, slots: int, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        array.name: rng.normal(0, 2, (slots, *array.shape)).astype(np.float32)
        if array.dtype == "float32"
        else rng.integers(0, 9, (slots, *array.shape)).astype(array.dtype)
        for array in spec.observation
    }


def draw_masks(spec: PolicySpec, slots: int, seed: int = 2) -> Arrays:
    """Two choices of every masked part are allowed."""
    rng = np.random.default_rng(seed)
    return {
        part.name: np.argsort(np.argsort(rng.random((slots, *part.mask.shape)))) < 2
        for part in spec.action
        if part.masked
    }


def policys_answer(weights: Weights, seen: Arrays, masks: Arrays, slots: int) -> Arrays:
    """What the policy itself does greedily, within the bounds."""
    policy = Policy(weights, slots)
    action = policy.allocate_action()
    policy.act(seen, None, action, mask=masks)
    policy.bound(action, action)
    return action


def form(arrays: Arrays) -> Any:
    """One array as it is, several as a dict."""
    return arrays["main"] if list(arrays) == ["main"] else arrays


def add_objects(weights: Weights, seen: Arrays, masks: Arrays, slots: int) -> list[Agent]:
    """Agents in object style that already see something."""
    agents = []
    for slot in range(slots):
        agent = Agent(observation=form({name: array[slot].copy() for name, array in seen.items()}))
        if masks:
            agent.action_mask = form({name: array[slot].copy() for name, array in masks.items()})
        esper.create_entity(agent)
        agents.append(agent)
    return agents


@SPACES
def test_every_agent_gets_what_the_policy_says_to_its_observation(
    observation: tuple[ArraySpec, ...], action: tuple[ActionSpec, ...]
) -> None:
    weights = make_weights(observation, action)
    seen, masks = draw_observations(weights.spec, 6), draw_masks(weights.spec, 6)
    agents = add_objects(weights, seen, {}, 6)

    def observe() -> None:
        for slot, agent in enumerate(agents):
            if masks:
                own = {"main": agent.action_mask} if "main" in masks else agent.action_mask
                for name, mask in masks.items():
                    own[name][:] = mask[slot]

    esper.add_processor(PolicyProcessor(weights, observe))
    esper.process()
    for slot, agent in enumerate(agents):
        alone = {name: array[slot : slot + 1] for name, array in seen.items()}
        expected = policys_answer(weights, alone, {name: mask[slot : slot + 1] for name, mask in masks.items()}, 1)
        given = {"main": agent.action} if len(action) == 1 else agent.action
        assert given.keys() == {part.name for part in action}
        for part in action:
            np.testing.assert_allclose(given[part.name], expected[part.name][0], rtol=0, atol=1e-6)
            assert type(given[part.name]) is int or part.kind == "box" or part.shape
            if part.masked:
                assert masks[part.name][slot, given[part.name]]
    assert len({str(agent.action) for agent in agents}) > 1


def test_all_agents_are_asked_in_one_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    act = Policy.act
    monkeypatch.setattr(Policy, "act", lambda self, *a, **k: (asked.append(self.slots), act(self, *a, **k))[1])
    weights = make_weights(ONE, (CHOICE,))
    add_objects(weights, draw_observations(weights.spec, 5), {}, 5)
    esper.add_processor(PolicyProcessor(weights))
    esper.process()
    esper.process()
    assert asked == [5, 5]


def test_numbers_are_within_the_bounds_of_the_action_space() -> None:
    weights = make_weights(ONE, (BOX,))
    weights.arrays["policy.1.weight"][...] *= 100
    agents = add_objects(weights, draw_observations(weights.spec, 20), {}, 20)
    esper.add_processor(PolicyProcessor(weights))
    esper.process()
    action = np.array([agent.action for agent in agents])
    assert action.dtype == np.float32
    assert (action.min(axis=0) == [-0.25, 0.0]).all()
    assert (action.max(axis=0) == [0.25, 0.5]).all()


@SPACES
def test_agents_without_arrays_are_given_those_of_the_policy(
    observation: tuple[ArraySpec, ...], action: tuple[ActionSpec, ...]
) -> None:
    weights = make_weights(observation, action)
    agents = [Agent(), Agent()]
    for agent in agents:
        esper.create_entity(agent)

    def observe() -> None:
        for agent in agents:
            for array in agent.observation.values() if isinstance(agent.observation, dict) else [agent.observation]:
                array[...] = 0

    esper.add_processor(PolicyProcessor(weights, observe))
    esper.process()
    assert agents[0].observation is not agents[1].observation
    for agent in agents:
        seen = {"main": agent.observation} if observation == ONE else agent.observation
        described = [(name, array.shape, str(array.dtype)) for name, array in seen.items()]
        assert described == [(array.name, array.shape, array.dtype) for array in observation]
        assert agent.action is not None
        masks = [part for part in action if part.masked]
        if not masks:
            assert agent.action_mask is None
            continue
        mask = agent.action_mask if masks == [MASKED] else agent.action_mask["fire"]
        assert mask.tolist() == [True] * masks[0].counts[0]


def test_what_observe_puts_in_place_of_the_arrays_is_taken_as_it_is_in_training() -> None:
    """A world may assign lists, in every step, where it may write into arrays."""
    weights = make_weights(ONE, (MASKED,))
    agent = Agent()
    esper.create_entity(agent)
    views = [([0.5, -1.0, 2.0, 0.0], [True, False, True]), ([-2.0, 1.0, 0.0, 3.0], [False, True, False])]
    turns = iter(views)

    def observe() -> None:
        agent.observation, agent.action_mask = next(turns)

    esper.add_processor(PolicyProcessor(weights, observe))
    for seen, mask in views:
        esper.process()
        expected = policys_answer(weights, {"main": np.array([seen], np.float32)}, {"main": np.array([mask])}, 1)
        assert agent.action == expected["main"][0]


def test_a_mask_starts_all_true_each_time_the_world_observes() -> None:
    weights = make_weights(ONE, (MASKED,))
    agent = Agent()
    esper.create_entity(agent)
    allowed: list[list[bool]] = []

    def observe() -> None:
        allowed.append(agent.action_mask.tolist())
        agent.observation[:] = 0
        agent.action_mask[len(allowed) % 3] = False

    esper.add_processor(PolicyProcessor(weights, observe))
    for turn in range(1, 4):
        esper.process()
        assert agent.action != turn % 3
    assert allowed == [[True] * 3] * 3


def test_masks_that_processors_wrote_before_it_are_heeded() -> None:
    weights = make_weights(ONE, (MASKED,))
    seen = draw_observations(weights.spec, 1)
    free = int(policys_answer(weights, seen, {"main": np.ones((1, 3), bool)}, 1)["main"][0])
    [agent] = add_objects(weights, seen, {"main": np.ones((1, 3), bool)}, 1)

    class Watch(esper.Processor):
        def process(self) -> None:
            agent.action_mask[:] = True
            agent.action_mask[free] = False

    esper.add_processor(Watch(), priority=2)
    esper.add_processor(PolicyProcessor(weights), priority=1)
    esper.process()
    assert agent.action != free


def test_it_observes_and_acts_in_every_so_many_ticks_and_leaves_the_actions_between() -> None:
    weights = make_weights(ONE, (BOX,))
    agent = Agent()
    esper.create_entity(agent)
    rng = np.random.default_rng(3)
    looked: list[int] = []
    ticks: list[list[float]] = []

    def observe() -> None:
        looked.append(len(ticks))
        agent.observation[:] = rng.normal(0, 2, 4)

    esper.add_processor(PolicyProcessor(weights, observe, every=3))
    for _ in range(9):
        esper.process()
        ticks.append(agent.action.tolist())
    assert looked == [0, 3, 6]
    for first in (0, 3, 6):
        assert ticks[first] == ticks[first + 1] == ticks[first + 2]
    assert ticks[0] != ticks[3] != ticks[6]


def test_agents_that_join_and_leave_are_counted_in_when_it_acts() -> None:
    weights = make_weights(ONE, (CHOICE,))
    seen = draw_observations(weights.spec, 3)
    expected = policys_answer(weights, seen, {}, 3)["main"].tolist()
    first, second = add_objects(weights, {"main": seen["main"][:2]}, {}, 2)
    esper.add_processor(PolicyProcessor(weights, every=2))
    esper.process()
    assert [first.action, second.action] == expected[:2]
    first.action = second.action = None
    [late] = add_objects(weights, {"main": seen["main"][2:]}, {}, 1)
    esper.delete_entity(next(entity for entity, agent in esper.get_component(Agent) if agent is first))
    esper.process()
    assert [first.action, second.action, late.action] == [None, None, None]
    esper.process()
    assert [first.action, second.action, late.action] == [None, *expected[1:]]


def test_an_entity_that_dies_in_this_tick_is_not_asked() -> None:
    weights = make_weights(ONE, (CHOICE,))
    one, other = add_objects(weights, draw_observations(weights.spec, 2), {}, 2)

    class Doom(esper.Processor):
        def process(self) -> None:
            [entity] = [entity for entity, agent in esper.get_component(Agent) if agent is one]
            esper.delete_entity(entity)

    esper.add_processor(Doom(), priority=2)
    esper.add_processor(PolicyProcessor(weights), priority=1)
    esper.process()
    assert one.action is None
    assert other.action is not None


def test_a_game_without_agents_goes_on_and_passes_its_arguments() -> None:
    esper.add_processor(PolicyProcessor(make_weights(ONE, (CHOICE,))))
    esper.process(0.1)


def test_it_reads_a_policy_file(tmp_path: Path) -> None:
    weights = make_weights(ONE, (CHOICE,))
    path = tmp_path / "policy.safetensors"
    path.write_bytes(encode_weights(weights))
    seen = draw_observations(weights.spec, 4)
    agents = add_objects(weights, {"main": np.zeros((4, 4), np.float32)}, {}, 4)

    def observe() -> None:
        for slot, agent in enumerate(agents):
            agent.observation[:] = seen["main"][slot]

    esper.add_processor(PolicyProcessor.from_file(path, observe, every=2))
    esper.process()
    assert [agent.action for agent in agents] == policys_answer(weights, seen, {}, 4)["main"].tolist()


# Column style.


@SPACES
def test_an_agent_in_column_style_gets_the_policys_arrays_for_all_its_slots(
    observation: tuple[ArraySpec, ...], action: tuple[ActionSpec, ...]
) -> None:
    weights = make_weights(observation, action)
    seen, masks = draw_observations(weights.spec, 7), draw_masks(weights.spec, 7)
    given = {name: np.ones_like(mask) for name, mask in masks.items()}
    agent = Agent(observation=form(dict(seen)), action_mask=form(given) if masks else None)
    esper.create_entity(agent)

    def observe() -> None:
        for name, mask in masks.items():
            given[name][:] = mask

    esper.add_processor(PolicyProcessor(weights, observe))
    esper.process()
    expected = policys_answer(weights, seen, masks, 7)
    got = {"main": agent.action} if len(action) == 1 else agent.action
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_an_agent_in_column_style_that_brings_no_mask_is_given_one_for_all_its_slots() -> None:
    weights = make_weights(ONE, (MASKED,))
    seen, masks = draw_observations(weights.spec, 7), draw_masks(weights.spec, 7)
    agent = Agent(observation=seen["main"])
    esper.create_entity(agent)

    def observe() -> None:
        assert agent.action_mask.shape == (7, 3)
        agent.action_mask[:] = masks["main"]

    esper.add_processor(PolicyProcessor(weights, observe))
    esper.process()
    np.testing.assert_array_equal(agent.action, policys_answer(weights, seen, masks, 7)["main"])


def test_both_styles_may_meet_in_one_game() -> None:
    weights = make_weights(ONE, (CHOICE,))
    seen = draw_observations(weights.spec, 7)
    columns = Agent(observation=seen["main"][2:])
    esper.create_entity(columns)
    one, other = add_objects(weights, {"main": seen["main"][:2]}, {}, 2)
    esper.add_processor(PolicyProcessor(weights))
    esper.process()
    expected = policys_answer(weights, seen, {}, 7)["main"].tolist()
    assert [one.action, other.action, *columns.action.tolist()] == expected


# As in training.


@pytest.mark.parametrize("ticks", [1, 3])
def test_a_game_by_itself_runs_as_it_ran_in_its_environment(ticks: int) -> None:
    plan = {2 * ticks: [join], 3 * ticks: [die(1, gone=True)]}  # at the end of a step
    steps, parameters = 6, Parameters(fighters=3, ticks=ticks)
    world = Arena(4, parameters, plan)
    spec = describe_world("arena", world.info, 4, parameters, {})
    weights = make_weights(spec.observation, spec.action)
    policy, rows = Policy(weights, 4), allocate_rows(spec)
    environment = ObjectEnvironment(world, spec)
    environment.reset((5,), rows)
    action = policy.allocate_action()
    trained = []
    for _ in range(steps):
        seen = rows.observation["body"][:, 0].astype(int)
        policy.act(rows.observation, None, action, mask=rows.action_mask)
        trained += [{int(number): int(a) for number, a in zip(seen, action["main"], strict=True) if number}] * ticks
        environment.step(action, rows)
    environment.close()

    esper.switch_world("test-processor")
    game = Arena(4, parameters, plan)
    game.reset(np.random.Generator(np.random.Philox(np.random.SeedSequence((5, 0)))))
    played = []

    class Note(esper.Processor):
        def process(self) -> None:
            played.append({f.number: agent.action for _, (f, agent) in esper.get_components(Fighter, Agent)})

    esper.add_processor(PolicyProcessor(weights, game.observe, every=ticks), priority=2)
    esper.add_processor(Note(), priority=1)
    for _ in range(steps * ticks):
        esper.process()
    assert played == trained
    assert {frozenset(actions) for actions in played} == {
        frozenset({1, 2, 3}),
        frozenset({1, 2, 3, 4}),
        frozenset({2, 3, 4}),
    }
    assert len({tuple(actions.items()) for actions in played}) > 2


def test_acting_on_what_nobody_observed_is_an_error_that_says_what_to_do() -> None:
    weights = make_weights(ONE, (CHOICE,))
    esper.create_entity(Agent())
    esper.add_processor(PolicyProcessor(weights))
    with pytest.raises(ContractError, match=r"observation was not written .* observe=world\.observe"):
        esper.process()
