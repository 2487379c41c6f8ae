"""A sound walk to a goal on a line in both styles, and one planted fault at a time, for the conformance kit to find."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import esper
import gymnasium
import msgspec
import numpy as np

from rustyrl.spec import MetricSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.world import WorldInfo

LIMIT = 15
FAULT_AGE = 3
HOARD: list[Any] = []  # what a world that leaks never lets go
SHARED_GOALS: dict[int, np.ndarray] = {}


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """fault: what is wrong with the world; nothing by default."""

    fault: str = ""


def declare(fault: str) -> WorldInfo:
    space: gymnasium.Space[Any] = gymnasium.spaces.Box(-5, 5, (3,), np.float32)
    if fault == "float64":
        space = gymnasium.spaces.Box(-5, 5, (3,), np.float64)
    elif fault == "discrete observation":
        space = gymnasium.spaces.Discrete(5)
    return WorldInfo(
        observation_space=space,
        action_space=gymnasium.spaces.Discrete(3),
        action_mask=True,
        step_s=0.1,
        max_episode_steps=LIMIT,
        metrics=(MetricSpec("distance_mean", "distance", "mean"),),
        goal=("sucess_rate>=0.9",) if fault == "unknown goal" else ("distance_mean<=1",),
    )


def disturbance(fault: str) -> float:
    """What no seed decides."""
    if fault == "global random":
        return 0.01 * random.random()
    if fault == "numpy's global random":
        return 0.01 * np.random.random()
    return 1e-3 * (time.perf_counter() % 1) if fault == "clock" else 0.0


def hoard(fault: str) -> None:
    if fault == "leaks objects":
        HOARD.append([])
    elif fault == "leaks arrays":
        HOARD.append(np.ones(1 << 14))  # 128 KiB


# Column style.


class Walks:
    """x, goal: `[E]` m; age: `[E]` steps."""

    def __init__(self, slots: int) -> None:
        self.x, self.goal = np.zeros(slots), np.zeros(slots)
        self.age = np.zeros(slots, np.int64)


class WalksProcessor(esper.Processor):
    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._ticks = 0
        self._kept: Any = None

    def process(self) -> None:
        fault = self._fault
        self._ticks += 1
        for _, (walks, agent) in esper.get_components(Walks, Agent):
            walks.age += 1
            late = walks.age >= FAULT_AGE
            walks.x += 0.2 * (agent.action - 1) + disturbance(fault)
            if fault == "keeps state":
                walks.x += 1e-3 * self._ticks
            if fault == "slots meet":
                walks.x += 0.01 * walks.x.mean()
            distance = np.abs(walks.x - walks.goal)
            if fault == "replaces the reward":
                agent.reward = -distance
            else:
                agent.reward[:] = -distance
            if fault == "infinite reward":
                agent.reward[1] = np.inf if late[1] else 0
            if fault == "keeps a row":
                self._kept = agent.reward if self._kept is None else self._kept
                self._kept[:] = agent.reward
            agent.terminated[:] = (distance > 2) | (fault == "dies at once")
            if fault == "vanishes":
                agent.valid[:] = ~late
            if fault == "crashes" and late.any():
                raise ZeroDivisionError("the world fell over")
            agent.episode_metrics["distance"][:] = np.inf if fault == "infinite metric" else distance


class ColumnWalk:
    """Walk to a goal, in columns."""

    default_slots = 3
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = declare(parameters.fault)
        self._fault = parameters.fault
        self._walks = Walks(slots)
        if self._fault == "shared state":
            self._walks.goal = SHARED_GOALS.setdefault(slots, np.zeros(slots))
        self._agent = Agent(episode_metrics={"distance": np.zeros(slots, np.float32)})
        self._started = False

    def build(self) -> Agent:
        esper.create_entity(self._walks, self._agent)
        esper.add_processor(WalksProcessor(self._fault))
        return self._agent

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        walks, fault = self._walks, self._fault
        hoard(fault)
        if fault == "does not reset" and self._started:
            return
        self._started = True
        walks.x[rows], walks.goal[rows] = rng.uniform(-1, 1), rng.uniform(-1, 1)
        if fault == "ignores the seed":
            walks.x[rows], walks.goal[rows] = 0.5, -0.5
        walks.age[slice(None) if fault == "resets all rows" else rows] = 0

    def save_state(self) -> dict[str, np.ndarray]:
        walks = self._walks
        state = {"x": walks.x, "goal": walks.goal, "age": walks.age}
        if self._fault == "forgets a number":
            del state["goal"]
        return state

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        for name, array in state.items():
            getattr(self._walks, name)[:] = array

    def observe(self, rows: np.ndarray | slice) -> None:
        walks, agent, fault = self._walks, self._agent, self._fault
        shown: Any = rows
        if not isinstance(rows, slice) and fault == "observes in another order":
            shown = rows[::-1]
        if not isinstance(rows, slice) and fault == "observes the first rows":
            shown = slice(0, len(rows))
        seen = agent.observation
        seen[rows, 0] = walks.x[shown]
        seen[rows, 1] = walks.goal[shown]
        if fault != "leaves a number unwritten":
            seen[rows, 2] = walks.age[rows] / LIMIT
        late = walks.age[rows] >= FAULT_AGE
        if fault == "outside its space":
            seen[rows, 1] += 7 * late
        if fault.startswith("not a number"):
            first = LIMIT if fault == "not a number at the limit" else FAULT_AGE
            seen[rows, 1] = np.where(walks.age[rows] >= first, np.nan, walks.goal[rows])
        agent.action_mask[rows, 2] = walks.x[rows] < 1
        if fault == "allows nothing":
            agent.action_mask[rows] &= ~late[:, None]


# Object style.


@dataclass(slots=True)
class Walk:
    x: float
    goal: float
    age: int = 0


class WalkProcessor(esper.Processor):
    def __init__(self, game: ObjectWalk) -> None:
        self._game = game

    def process(self) -> None:
        game, fault = self._game, self._game.fault
        game.ticks += 1
        for entity, (walk, agent) in esper.get_components(Walk, Agent):
            if agent.terminated or agent.truncated:
                continue  # it has ended, and its body lies about
            walk.age += 1
            late = walk.age >= FAULT_AGE
            walk.x += 0.2 * (agent.action - 1) + disturbance(fault)
            if fault == "keeps state":
                walk.x += 1e-3 * game.ticks
            if fault == "shared state":
                walk.x += ObjectWalk.wind
            distance = abs(walk.x - walk.goal)
            agent.reward -= np.inf if late and fault == "infinite reward" else distance
            agent.terminated = distance > 2 or fault == "dies at once"
            agent.episode_metrics["distance"] = np.inf if fault == "infinite metric" else distance
            if late and fault == "vanishes":
                esper.delete_entity(entity)
            if late and fault == "crashes":
                raise ZeroDivisionError("the world fell over")
            if late and fault == "is cut and not observed":
                agent.truncated = True
                esper.remove_component(entity, Walk)


class ObjectWalk:
    """Walk to a goal, one entity to a walk."""

    style = "object"
    default_slots = 2
    Parameters = Parameters
    wind = 0.0

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = declare(parameters.fault)
        self.fault = parameters.fault
        self.ticks = 0
        self._slots = slots
        self._walks: list[Walk] = []
        self._kept: Any = None

    def reset(self, rng: np.random.Generator) -> None:
        fault = self.fault
        hoard(fault)
        esper.add_processor(WalkProcessor(self))
        ObjectWalk.wind = rng.uniform(-0.1, 0.1) if fault == "shared state" else 0.0
        if not self._walks or fault != "does not reset":
            self._walks = [Walk(*rng.uniform(-1, 1, 2)) for _ in range(self._slots)]
            if fault == "ignores the seed":
                self._walks = [Walk(0.5, -0.5) for _ in self._walks]
        for walk in self._walks:
            esper.create_entity(walk, Agent())

    def save_state(self) -> dict[str, np.ndarray]:
        found = sorted(esper.get_components(Walk, Agent), key=lambda item: item[0])
        return {
            "walk": np.array([(walk.x, walk.goal, walk.age) for _, (walk, _) in found]).reshape(-1, 3),
            "ended": np.array([(agent.terminated, agent.truncated) for _, (_, agent) in found], bool).reshape(-1, 2),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        esper.add_processor(WalkProcessor(self))
        for (x, goal, age), (terminated, truncated) in zip(state["walk"], state["ended"], strict=True):
            walk = Walk(float(x), 0.0 if self.fault == "forgets a number" else float(goal), int(age))
            esper.create_entity(walk, Agent(terminated=bool(terminated), truncated=bool(truncated)))

    def observe(self) -> None:
        fault = self.fault
        for _, (walk, agent) in esper.get_components(Walk, Agent):
            late = walk.age >= FAULT_AGE
            seen = agent.observation
            seen[0] = walk.x
            seen[1] = walk.goal + 7 * (late and fault == "outside its space")
            if fault != "leaves a number unwritten":
                seen[2] = walk.age / LIMIT
            if (late and fault == "not a number") or (walk.age == LIMIT and fault == "not a number at the limit"):
                seen[1] = np.nan
            if walk.age and fault == "keeps a row":
                self._kept = seen if self._kept is None else self._kept
                self._kept[0] = walk.x
            agent.action_mask[2] = walk.x < 1
            if late and fault == "allows nothing":
                agent.action_mask[:] = False
