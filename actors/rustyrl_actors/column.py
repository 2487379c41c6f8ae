"""An esper world in column style behind the environment contract."""

from __future__ import annotations

import itertools

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.environment import Arrays, StepRows, TimeStep
from rustyrl_actors.world import World

__all__ = ["ColumnEnvironment"]

_context_names = (f"rustyrl-{number}" for number in itertools.count())


class ColumnEnvironment:
    """Steps one esper world: actions in, ticks, episode ends, same-step reset, observations out.

    With ``stagger`` the first episode of each slot starts with a random part of its step limit already used,
    so that the slots of a world do not all end together; what follows a cut is bootstrapped all the same.
    """

    def __init__(self, world: World, spec: EnvironmentSpec, *, stagger: bool = False) -> None:
        self.spec = spec
        self._world = world
        self._stagger = stagger
        self._context = next(_context_names)
        esper.switch_world(self._context)
        self._agent = world.build()
        if not isinstance(self._agent, Agent):
            self.close()
            raise ContractError(
                f"world {spec.env!r}: build() returned {self._agent!r}; it returns the Agent that it made"
            )
        if missing := set(spec.episode_metrics) - self._agent.episode_metrics.keys():
            self.close()
            raise ContractError(
                f"world {spec.env!r} declares the episode metrics {sorted(missing)} but its Agent's "
                "episode_metrics lack them; add a float32 array of one number a slot for each"
            )
        self._all = np.arange(spec.slots)
        self._elapsed = np.zeros(spec.slots, np.int32)
        self._length = np.zeros(spec.slots, np.int32)
        self._return = np.zeros(spec.slots, np.float64)
        self._ended = np.zeros(spec.slots, bool)
        self._rng = np.random.default_rng(0)

    def reset(self, seed: tuple[int, ...], observation: Arrays) -> None:
        """Start new episodes in every slot, write their first observation, and seed what follows."""
        self._rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        esper.switch_world(self._context)
        self._agent.observation = observation
        self._begin(self._all)
        if self._stagger:
            self._elapsed[:] = self._rng.integers(0, self.spec.max_episode_steps, self.spec.slots)
        self._world.observe(slice(None))

    def step(self, action: NDArray[np.generic], out: StepRows) -> TimeStep:
        """Step every slot once, write the outcome into ``out``, reset what ended."""
        agent = self._agent
        agent.action, agent.observation, agent.reward = action, out.observation, out.reward
        agent.terminated, agent.truncated, agent.valid = out.terminated, out.truncated, out.valid
        given = dict(out.observation)
        out.reward.fill(0.0)
        out.terminated.fill(False)
        out.truncated.fill(False)
        out.valid.fill(True)
        esper.switch_world(self._context)
        for _ in range(self._world.info.ticks_per_step):
            esper.process()
        self._world.observe(slice(None))
        self._check_written_into(out, given)

        self._elapsed += 1
        self._length += 1
        self._return += out.reward
        np.logical_or(out.truncated, self._elapsed >= self.spec.max_episode_steps, out=out.truncated)
        np.logical_and(out.truncated, ~out.terminated, out=out.truncated)  # if both, terminated wins
        np.logical_or(out.terminated, out.truncated, out=self._ended)
        if not self._ended.any():
            return TimeStep()
        return self._end_episodes(out)

    def close(self) -> None:
        """Delete the esper world."""
        if esper.current_world == self._context:
            esper.switch_world("default")
        esper.delete_world(self._context)

    def _check_written_into(self, out: StepRows, given: Arrays) -> None:
        """Refuse arrays put in place of those that were given: what stands in them would reach nobody."""
        agent = self._agent
        for name in ("reward", "terminated", "truncated", "valid"):
            if getattr(agent, name) is not getattr(out, name):
                raise ContractError(
                    f"world {self.spec.env!r} put another array into agent.{name}; write into the one that is there: "
                    f"agent.{name}[:] = ..."
                )
        if agent.observation is not out.observation or any(
            agent.observation[name] is not array for name, array in given.items()
        ):
            raise ContractError(
                f"world {self.spec.env!r} put another array into agent.observation; write into those that are there: "
                "agent.observation[NAME][rows] = ..."
            )

    def _end_episodes(self, out: StepRows) -> TimeStep:
        ended = np.flatnonzero(self._ended)
        cut = np.flatnonzero(out.truncated)
        final = {name: array[cut].copy() for name, array in out.observation.items()}
        episodes = EpisodeRows(
            slot=ended.astype(np.int32),
            episode_return=self._return[ended].astype(np.float32),
            length=self._length[ended].copy(),
            metrics={
                name: self._agent.episode_metrics[name][ended].astype(np.float32) for name in self.spec.episode_metrics
            },
        )
        self._begin(ended)
        self._world.observe(ended)
        return TimeStep(cut, final, episodes) if len(cut) else TimeStep(episodes=episodes)

    def _begin(self, rows: NDArray[np.intp]) -> None:
        self._elapsed[rows] = 0
        self._length[rows] = 0
        self._return[rows] = 0.0
        self._world.reset(rows, self._rng)
