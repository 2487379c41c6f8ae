"""A guessing game that is learned in seconds, and one thing at a time that makes it impossible to learn."""

from __future__ import annotations

import esper
import gymnasium
import msgspec
import numpy as np

from rustyrl_actors.agent import Agent
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.world import WorldInfo

CHOICES = 4
HUGE = 1e38  # a float32, as few times more are not


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """fault: what is wrong with it, nothing by default; box: guess a number instead; limit: guesses of an episode."""

    fault: str = ""
    box: bool = False
    limit: int = 8


class GuessProcessor(esper.Processor):
    """Pays 1 for the choice that the agent was shown, or less the further the number is from a quarter of it."""

    def __init__(self, world: Guesses) -> None:
        self._world = world

    def process(self) -> None:
        world, agent, fault = self._world, self._world.agent, self._world.parameters.fault
        if world.parameters.box:
            agent.reward[:] = -np.abs(agent.action[:, 0] - world.shown / CHOICES)
        else:
            agent.reward[:] = agent.action == world.shown
        world.shown[:] = (world.shown * 5 + 3 + world.number) % CHOICES
        if fault == "no reward":
            agent.reward[:] = 0
        elif fault == "same reward":
            agent.reward[:] = -1
        elif fault == "huge reward":
            agent.reward[:] *= HUGE
        elif fault == "chance":
            agent.reward[:] = world.chance.normal(size=len(agent.reward))
        elif fault == "one step":
            agent.terminated[:] = True
        elif fault == "fading":  # the best there is, the longer the run the less of it
            world.left = max(world.left - 0.001, 0.0)
            agent.reward[:] *= world.left
        elif fault == "meddling":
            world.given[:] = 0  # what the policy was given, and has acted on


class Guesses:
    """See one of four numbers, and choose it."""

    name = "guesses"
    default_slots = 16
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Dict(
                {"noise": gymnasium.spaces.Box(-1, 1, (1,)), "shown": gymnasium.spaces.Box(0, 1, (CHOICES,))}
            ),
            action_space=gymnasium.spaces.Box(-1, 1, (1,)) if parameters.box else gymnasium.spaces.Discrete(CHOICES),
            step_s=1.0,
            max_episode_steps=parameters.limit,
        )
        self.parameters = parameters
        self.number = np.arange(slots)
        self.shown = np.zeros(slots, np.int64)
        self.chance = np.random.default_rng(0)
        self.left = 1.0
        self.agent = Agent()
        self.given = np.zeros((slots, CHOICES), np.float32)

    def build(self) -> Agent:
        esper.create_entity(self.agent)
        esper.add_processor(GuessProcessor(self))
        return self.agent

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        self.shown[rows] = rng.integers(CHOICES)

    def observe(self, rows: np.ndarray | slice) -> None:
        noise, seen = self.agent.observation["noise"], self.agent.observation["shown"]
        fault = self.parameters.fault
        noise[rows] = 0.0 if fault == "blind" else np.sin(self.shown[rows] + self.number[rows])[:, None]
        seen[rows] = np.eye(CHOICES)[self.shown[rows]] * (fault != "blind")
        if fault == "unscaled":
            seen[rows, 2] *= 1000
        elif fault == "tiny":
            noise[rows] *= 1e-5
            seen[rows] *= 1e-5
        self.given = seen
