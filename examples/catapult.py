"""A world whose optimum needs a hybrid action: which sling, a choice, and how hard, a number.

rustyrl train examples/catapult.py:Catapult
"""

from __future__ import annotations

import esper
import gymnasium
import numpy as np

from rustyrl_actors import Agent, MetricSpec, NoParameters, SlotDraws, WorldInfo

REACH_M = np.array([10.0, 30.0, 90.0])  # of each sling at full force
LEAST = 0.4  # of its reach: no sling throws shorter, so that each has targets of its own
SHOTS = 8


class Siege:
    """E catapults. target_m: `[E, SHOTS + 1]` distances to hit, one after another; shot: `[E]`; hits: `[E]`."""

    def __init__(self, slots: int) -> None:
        self.target_m = np.ones((slots, SHOTS + 1))
        self.shot = np.zeros(slots, np.int64)
        self.hits = np.zeros(slots, np.float32)


class ShotProcessor(esper.Processor):
    """Throws; the nearer the stone falls, in parts of the distance, the better."""

    def process(self) -> None:
        """Take one shot."""
        for _, (siege, agent) in esper.get_components(Siege, Agent):
            target = siege.target_m[np.arange(len(siege.shot)), siege.shot]
            force = LEAST + (1 - LEAST) * (agent.action["force"][:, 0] + 1) / 2
            miss = np.abs(REACH_M[agent.action["sling"]] * force - target) / target
            agent.reward[:] = 1 - np.minimum(miss, 1)
            siege.hits += miss < 0.15
            siege.shot += 1
            agent.terminated[:] = siege.shot == SHOTS
            agent.episode_metrics["hits"][:] = siege.hits / SHOTS


class Catapult:
    """Hit targets that need the right sling and the right force."""

    default_slots = 64

    def __init__(self, slots: int, _parameters: NoParameters) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Dict(
                {
                    "log_distance": gymnasium.spaces.Box(-1, 2, (1,), np.float32),
                    "share_of_reach": gymnasium.spaces.Box(0, 2, (3,), np.float32),
                }
            ),
            action_space=gymnasium.spaces.Dict(
                {
                    "force": gymnasium.spaces.Box(-1, 1, (1,), np.float32),
                    "sling": gymnasium.spaces.Discrete(len(REACH_M)),
                }
            ),
            step_s=1.0,
            max_episode_steps=SHOTS,
            metrics=(MetricSpec("hit_rate", "hits", "mean"),),
            goal=("hit_rate>=0.9",),
            evaluate_from=("hit_rate>=0.4",),
            defaults={"ppo": {"gamma": 0.0}},  # a shot does not change the next one
        )
        self._siege = Siege(slots)
        self._agent = Agent(episode_metrics={"hits": np.zeros(slots, np.float32)})

    def build(self) -> Agent:
        """Create the entity that stands for every catapult."""
        esper.create_entity(self._siege, self._agent)
        esper.add_processor(ShotProcessor())
        return self._agent

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        """Draw the targets, each within reach of one sling."""
        sling = rng.integers(0, len(REACH_M), SHOTS + 1)
        self._siege.target_m[rows] = REACH_M[sling] * rng.uniform(LEAST, 1.0, SHOTS + 1)
        self._siege.shot[rows] = 0
        self._siege.hits[rows] = 0

    def observe(self, rows: np.ndarray | slice) -> None:
        """Show the distance, in decades and in parts of each sling's reach."""
        shot = self._siege.shot[rows]
        target = self._siege.target_m[rows][np.arange(len(shot)), shot]
        self._agent.observation["log_distance"][rows, 0] = np.log10(target)
        self._agent.observation["share_of_reach"][rows] = np.minimum(target[:, None] / REACH_M, 2)
