"""A world whose optimum needs an action mask: which doors are open is in the mask alone.

rustyrl train examples/doors.py:Doors
"""

from __future__ import annotations

import esper
import gymnasium
import msgspec
import numpy as np

from rustyrl_actors import Agent, MetricSpec, SlotDraws, WorldInfo

DOORS = 8
STEPS = 16


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settable with ``--set env.masked=false``: without the mask nobody can know which doors are open."""

    masked: bool = True


class Corridor:
    """E corridors. open: `[E, STEPS + 1, 8]` bool, the doors that are open at each step; step: `[E]`."""

    def __init__(self, slots: int) -> None:
        self.open = np.ones((slots, STEPS + 1, DOORS), bool)
        self.step = np.zeros(slots, np.int64)
        self.gold = np.zeros(slots, np.float32)
        self.best = np.zeros(slots, np.float32)


class DoorProcessor(esper.Processor):
    """Pays what lies behind the chosen door: its number, if it is open, a fine if it is not."""

    def process(self) -> None:
        """Go through one door."""
        for _, (corridor, agent) in esper.get_components(Corridor, Agent):
            rows = np.arange(len(corridor.step))
            now = corridor.open[rows, corridor.step]
            agent.reward[:] = np.where(now[rows, agent.action], agent.action, -DOORS) / DOORS
            corridor.gold += agent.reward
            corridor.best += (DOORS - 1 - np.argmax(now[:, ::-1], axis=1)) / DOORS
            corridor.step += 1
            agent.terminated[:] = corridor.step == STEPS
            agent.episode_metrics["share_of_best"][:] = corridor.gold / np.maximum(corridor.best, 1 / DOORS)


class Doors:
    """Take the best open door; which are open only the mask tells."""

    default_slots = 64
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(0, 1, (1,), np.float32),
            action_space=gymnasium.spaces.Discrete(DOORS),
            action_mask=parameters.masked,
            step_s=1.0,
            max_episode_steps=STEPS,
            metrics=(MetricSpec("share_of_best_mean", "share_of_best", "mean"),),
            goal=("share_of_best_mean>=0.99",),
            evaluate_from=("share_of_best_mean>=0.8",),
        )
        self._parameters = parameters
        self._corridor = Corridor(slots)
        self._agent = Agent(episode_metrics={"share_of_best": np.zeros(slots, np.float32)})

    def build(self) -> Agent:
        """Create the entity that stands for every corridor."""
        esper.create_entity(self._corridor, self._agent)
        esper.add_processor(DoorProcessor())
        return self._agent

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        """Draw which doors will be open; one of them, not the last, always is."""
        corridor = self._corridor
        corridor.open[rows] = rng.random((STEPS + 1, DOORS)) < 0.3
        corridor.open[rows, :, 1] |= ~corridor.open[rows].any(axis=2)
        corridor.step[rows] = 0
        corridor.gold[rows] = corridor.best[rows] = 0

    def observe(self, rows: np.ndarray | slice) -> None:
        """Show how far it is, and mask the doors that are closed."""
        corridor = self._corridor
        step = corridor.step[rows]
        self._agent.observation[rows, 0] = step / STEPS
        if self._parameters.masked:
            self._agent.action_mask[rows] = corridor.open[rows][np.arange(len(step)), step]
