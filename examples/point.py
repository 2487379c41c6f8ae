"""A world of your own, complete: push a point to a goal on a plane.

rustyrl train examples/point.py:Point --total-steps 300000
"""

from __future__ import annotations

from dataclasses import dataclass

import esper
import gymnasium
import msgspec
import numpy as np

from rustyrl_actors import Agent, MetricSpec, SlotDraws, WorldInfo

STEP_S = 0.05


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settable with ``--set env.thrust=2``."""

    thrust: float = 1.0


@dataclass
class Mover:
    """A component: E points, `[E, 2]` each, in m and m/s."""

    position: np.ndarray
    velocity: np.ndarray
    goal: np.ndarray


class MoveProcessor(esper.Processor):
    """Moves every point by its action and rewards being near the goal."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters

    def process(self) -> None:
        """Advance by one step."""
        for _, (mover, agent) in esper.get_components(Mover, Agent):
            mover.velocity += STEP_S * (self._parameters.thrust * agent.action - 0.5 * mover.velocity)
            mover.position += STEP_S * mover.velocity
            distance = np.linalg.norm(mover.goal - mover.position, axis=1)
            agent.reward[:] = -distance  # write into the arrays, never replace them
            agent.terminated[:] = distance > 10
            agent.episode_metrics["final_distance"][:] = distance


class Point:
    """Push a point to its goal."""

    name = "point"
    default_slots = 64  # points in one world
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            action_space=gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            step_s=STEP_S,
            max_episode_steps=200,
            metrics=(MetricSpec("final_distance_mean", "final_distance", "mean"),),
            goal=("final_distance_mean<=0.1",),
            evaluate_from=("return_mean>=-300",),
        )
        self._parameters = parameters
        self._mover = Mover(*(np.zeros((slots, 2), np.float32) for _ in range(3)))
        self._agent = Agent(episode_metrics={"final_distance": np.zeros(slots, np.float32)})

    def build(self) -> Agent:
        """Create the entity that stands for every point."""
        esper.create_entity(self._mover, self._agent)
        esper.add_processor(MoveProcessor(self._parameters))
        return self._agent

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        """Start a new episode in these slots."""
        self._mover.position[rows] = rng.uniform(-1, 1, 2)
        self._mover.velocity[rows] = 0
        self._mover.goal[rows] = rng.uniform(-1, 1, 2)

    def observe(self, rows: np.ndarray | slice) -> None:
        """Write what these slots see."""
        seen = self._agent.observation  # one array for a Box, a dict of arrays for a Dict
        seen[rows, :2] = self._mover.goal[rows] - self._mover.position[rows]
        seen[rows, 2:] = self._mover.velocity[rows]
