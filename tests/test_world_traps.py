"""What a review found that worlds may do, or declare, and that must not go wrong without a word."""

from __future__ import annotations

import json
import random
from typing import Any

import esper
import gymnasium
import msgspec
import numpy as np
import pytest
from clusters import rustyrl

from rustyrl.errors import UsageError
from rustyrl.spec import read_spec, spec_to_json
from rustyrl_actors import Agent, MetricSpec, NoParameters, SlotDraws, WorldEnv, WorldInfo
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.draws import slot_generator
from rustyrl_actors.environment import allocate_rows

TRAPS = f"{__file__}:Traps"


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ticks: int = 1
    cut_tick: int = 0
    bad: str = ""


class Traps:
    """Pays how far an action is from the one before, keeping a reference to that; may be cut in any tick."""

    style = "object"
    global_random = True
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.parameters = parameters
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32),
            action_space=gymnasium.spaces.Box(-1, 1, (1,), np.float32),
            step_s=1,
            max_episode_steps=9,
            ticks_per_step=parameters.ticks,
        )

    def reset(self, rng: np.random.Generator) -> None:
        if self.parameters.bad == "reset":
            raise KeyError("level")
        self.ticks = 0
        self.before = np.zeros(1, np.float32)
        self.entity = esper.create_entity(Agent())

    def tick(self) -> None:
        self.ticks += 1
        esper.process()
        for _, agent in esper.get_component(Agent):
            agent.reward += float(np.abs(agent.action - self.before).sum())
            self.before = agent.action
            if self.ticks == self.parameters.cut_tick:
                agent.truncated = True
                esper.delete_entity(self.entity)

    def observe(self) -> None:
        for _, agent in esper.get_component(Agent):
            if self.parameters.bad == "observe":
                agent.observation[:] = [1, 2, 3]
            agent.observation[:] = self.ticks, random.random()


def run(settings: dict[str, Any], actions: list[float]) -> list[tuple[float, bool, np.ndarray | None]]:
    environment = find_environment(TRAPS, settings).make()
    rows, action, said = allocate_rows(environment.spec), {"main": np.zeros((1, 1), np.float32)}, []
    try:
        environment.reset((1,), rows)
        for value in actions:
            action["main"][:] = value  # as actors do: one array for every step
            step = environment.step(action, rows)
            final = None if step.final_observation is None else step.final_observation["main"][0]
            said.append((float(rows.reward[0]), bool(rows.truncated[0]), final))
    finally:
        environment.close()
    return said


def test_a_world_may_keep_its_action_for_the_next_step() -> None:
    assert [reward for reward, _, _ in run({}, [1.0, -1.0, 0.5])] == pytest.approx([1.0, 2.0, 1.5])


@pytest.mark.parametrize("tick", [4, 5, 6])
def test_an_agent_may_be_cut_and_deleted_in_any_tick_of_a_step(tick: int) -> None:
    said = run({"ticks": 3, "cut_tick": tick}, [0.0, 0.0])
    assert [truncated for _, truncated, _ in said] == [False, True]
    assert said[1][2][0] == tick


def test_whole_numbers_where_seconds_are_meant_give_one_fingerprint_everywhere() -> None:
    spec = find_environment(TRAPS, {}).spec
    assert read_spec(spec_to_json(spec)).fingerprint == spec.fingerprint
    assert type(spec.step_s) is float


def test_an_error_in_a_hook_names_the_hook_the_place_and_the_fields() -> None:
    with pytest.raises(KeyError) as caught:
        run({"bad": "reset"}, [])
    assert "raised in reset() of world" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="broadcast") as wrong:
        run({"bad": "observe"}, [])
    assert "component Agent: field observation is float32 (2,)" in wrong.value.__notes__[0]


def test_the_rest_of_the_process_keeps_its_random_numbers_and_its_esper_world() -> None:
    esper.switch_world("mine")
    try:
        random.seed(3)
        np.random.seed(4)
        expected = [random.random(), *np.random.normal(size=3)]
        random.seed(3)
        np.random.seed(4)
        world = WorldEnv(TRAPS)
        first, _ = world.reset(seed=1)
        got = [random.random()]
        world.step(np.zeros(1, np.float32))
        got.append(np.random.normal())
        again, _ = world.reset(seed=1)
        got += [np.random.normal(), np.random.normal()]
        world.close()
        assert got == expected
        assert first.tolist() == again.tolist()
        assert esper.current_world == "mine"
    finally:
        esper.switch_world("default")
        esper.delete_world("mine")


def test_stepping_before_the_reset_is_an_error() -> None:
    world = WorldEnv(TRAPS)
    with pytest.raises(gymnasium.error.ResetNeeded):
        world.step(np.zeros(1, np.float32))
    world.close()


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_bounds_by_number_draw_one_row_for_each_slot(slots: int) -> None:
    draws = SlotDraws([slot_generator((1,), slot) for slot in range(slots)])
    low, high = np.array([-1.0, -20.0, -300.0]), np.array([1.0, 20.0, 300.0])
    drawn = draws.uniform(low, high)
    assert drawn.shape == (slots, 3)
    assert ((drawn >= low) & (drawn < high)).all()
    assert len(np.unique(drawn / high)) == 3 * slots
    assert draws.normal([0, 100, 200], 1.0).shape == (slots, 3)
    assert draws.uniform(low, high, (2, 3)).shape == (slots, 2, 3)
    with pytest.raises(ValueError, match="do not fit draws of size"):
        draws.uniform(low, high, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal": "return_mean>=1"}, "WorldInfo.goal is 'return_mean>=1', expected a tuple"),
        ({"metrics": MetricSpec("a", "b", "mean")}, "WorldInfo.metrics is .* expected a tuple"),
        ({"ticks_per_step": 0}, "WorldInfo.ticks_per_step is 0"),
        ({"max_episode_steps": 10.0}, "WorldInfo.max_episode_steps is 10.0"),
        ({"step_s": -1.0}, "WorldInfo.step_s is -1.0"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_where_it_is_made(changes: dict[str, Any], message: str) -> None:
    sound = Traps(1, Parameters()).info
    with pytest.raises(UsageError, match=message):
        WorldInfo(**{**msgspec.structs.asdict(sound), **changes})


def test_a_figure_is_a_mean_or_a_median() -> None:
    with pytest.raises(ValueError, match="aggregate is 'max', expected mean or median"):
        MetricSpec("most", "apples", "max")


def test_choices_that_do_not_start_at_zero_are_refused() -> None:
    from rustyrl_actors.spaces import action_parts

    with pytest.raises(UsageError, match="expected choices that start at 0"):
        action_parts("steering", gymnasium.spaces.Discrete(3, start=-1))


def test_a_run_of_another_version_is_refused_in_words(tmp_path) -> None:
    run_folder = tmp_path / "old"
    run_folder.mkdir()
    (run_folder / "config.toml").write_text('[run]\nenv = "cartpole"\n')
    (run_folder / "spec.json").write_text(json.dumps({"env": "cartpole", "action": {"kind": "discrete", "count": 2}}))
    code, _, err = rustyrl("train", "--resume", "--run", str(run_folder))
    assert code == 2
    assert "was not made by this version of rustyrl" in err


class Silent(Traps):
    """For the kit: what it leaves unwritten is a bool."""

    def __init__(self, slots: int, _parameters: NoParameters) -> None:
        super().__init__(slots, Parameters())
        self.info = msgspec.structs.replace(self.info, observation_space=gymnasium.spaces.MultiBinary(2))

    def observe(self) -> None:
        for _, agent in esper.get_component(Agent):
            agent.observation[0] = self.ticks % 2


def test_the_kit_sees_an_unwritten_bool() -> None:
    from rustyrl_actors.testing.checks_rows import writes_every_row
    from rustyrl_actors.testing.subject import Subject, ViolationError

    with pytest.raises(ViolationError, match="shows through: observation 'main'"):
        writes_every_row(Subject(find_environment(f"{__file__}:Silent", {}), 1, 12))
