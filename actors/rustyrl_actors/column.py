"""An esper world in column style behind the environment contract."""

from __future__ import annotations

from typing import Any

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.context import Context
from rustyrl_actors.contract import Place, check_masks, describe_value, fields_text
from rustyrl_actors.draws import SlotDraws, slot_generator
from rustyrl_actors.environment import Arrays, StepRows, TimeStep
from rustyrl_actors.spaces import has_parts, in_form
from rustyrl_actors.states import can_save, generators_of, place_into, save_generators, save_world, under
from rustyrl_actors.tally import EpisodeTally
from rustyrl_actors.world import ColumnWorld

__all__ = ["ColumnEnvironment"]

FIELDS = ("reward", "terminated", "truncated", "valid")


class ColumnEnvironment:
    """Steps one esper world: actions in, ticks, episode ends, same-step reset, observations out.

    With ``stagger`` the first episode of each slot starts with a random part of its step limit already used,
    so that the slots of a world do not all end together; what follows a cut is bootstrapped all the same.
    """

    def __init__(self, world: ColumnWorld, spec: EnvironmentSpec, *, stagger: bool = False) -> None:
        self.spec = spec
        self._world = world
        self._saves = can_save(world)
        self._stagger = stagger
        self.place = Place(spec.env)
        self._context = Context()
        self._context.enter()
        try:
            self._agent = world.build()
            self._check_agent()
        except BaseException:
            self.close()
            raise
        self._one_observation = not has_parts(world.info.observation_space)
        self._one_action = not has_parts(world.info.action_space)
        self._all = np.arange(spec.slots)
        self._elapsed = np.zeros(spec.slots, np.int32)
        self._tally = EpisodeTally(spec.slots)
        self._ended = np.zeros(spec.slots, bool)
        self._generators: list[np.random.Generator] = []

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        """Start new episodes in every slot, write their first observation, and seed what follows."""
        self.place = Place(self.spec.env, seed)
        self._generators = [slot_generator(seed, slot) for slot in range(self.spec.slots)]
        self._context.enter()
        self._point_at(out)
        self._tally.clear()
        try:
            self._begin(self._all)
        except Exception as error:
            error.add_note(f"raised in reset() of {self.place.text()}")
            raise
        if self._stagger:
            draws = slot_generator(seed, self.spec.slots)  # a stream that no slot draws from
            self._elapsed[:] = draws.integers(0, self.spec.max_episode_steps, self.spec.slots)
        self._world.observe(slice(None))
        self._check_observation_is(out)
        check_masks(self.place, self.spec.action, out.action_mask)

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        """Step every slot once, write the outcome into ``out``, reset what ended."""
        agent, place = self._agent, self.place
        place.step += 1
        own = {name: array.copy() for name, array in action.items()}  # the world may keep it: the arrays are used again
        agent.action = in_form(own, single=self._one_action)
        agent.reward, agent.terminated, agent.truncated, agent.valid = (
            out.reward,
            out.terminated,
            out.truncated,
            out.valid,
        )
        out.reward.fill(0.0)
        out.terminated.fill(False)
        out.truncated.fill(False)
        out.valid.fill(True)
        self._context.enter()
        self._point_at(out)
        try:
            for _ in range(self._world.info.ticks_per_step):
                place.tick += 1
                esper.process()
            self._world.observe(slice(None))
        except Exception as error:
            error.add_note(f"raised in {place.text()}; {fields_text(out.observation, out.action_mask)}")
            raise
        self._check_written_into(out)

        self._elapsed += 1
        self._tally.add(out.reward)
        np.logical_or(out.truncated, self._elapsed >= self.spec.max_episode_steps, out=out.truncated)
        np.logical_and(out.truncated, ~out.terminated, out=out.truncated)  # if both, terminated wins
        np.logical_or(out.terminated, out.truncated, out=self._ended)
        ends = self._end_episodes(out) if self._ended.any() else TimeStep()
        if out.action_mask and not out.valid.all():
            for mask in out.action_mask.values():
                mask[~out.valid] = True  # nobody is there
        if out.action_mask:  # what ended was asked for a mask too, which nobody needed
            check_masks(place, self.spec.action, out.action_mask)
        return ends

    def save(self) -> Arrays | None:
        """The world's state, its generators and running episodes; None if the world has no ``save_state``."""
        if not self._saves:
            return None
        self._context.enter()
        return {
            **save_world(self._world, self.spec.env),
            **{f"own.metric.{name}": self._agent.episode_metrics[name].copy() for name in self.spec.episode_metrics},
            "own.generators": save_generators(self._generators),
            "own.elapsed": self._elapsed.copy(),
            **self._tally.save(),
            **self.place.save(),
        }

    def load(self, state: Arrays) -> None:
        """Go on from such a state."""
        self._context.enter()
        self.place = Place.of(self.spec.env, state)
        self._generators = generators_of(state["own.generators"])
        if len(self._generators) != self.spec.slots:
            raise ValueError(f"the state is of {len(self._generators)} slots, expected {self.spec.slots}")
        place_into(self._elapsed, state, "own.elapsed")
        self._tally.load(state)
        for name in self.spec.episode_metrics:
            place_into(self._agent.episode_metrics[name], state, f"own.metric.{name}")
        self._world.load_state(under(state, "world"))  # type: ignore[attr-defined]

    def close(self) -> None:
        """Delete the esper world."""
        self._context.close()

    def _point_at(self, out: StepRows) -> None:
        """Show the agent the rows that observations and masks are written into; masks allow all to start with."""
        agent = self._agent
        agent.observation = in_form(out.observation, single=self._one_observation)
        if out.action_mask:
            for mask in out.action_mask.values():
                mask.fill(True)
            agent.action_mask = in_form(out.action_mask, single=self._one_action)

    def _check_agent(self) -> None:
        agent, spec = self._agent, self.spec
        if not isinstance(agent, Agent):
            raise ContractError(f"world {spec.env!r}: build() returned {agent!r}; it returns the Agent that it made")
        for name in spec.episode_metrics:
            metric = agent.episode_metrics.get(name)
            if not isinstance(metric, np.ndarray) or metric.shape != (spec.slots,):
                raise ContractError(
                    f"world {spec.env!r} declares the episode metric {name!r}: component Agent, field "
                    f"episode_metrics[{name!r}]: expected one number for each of the {spec.slots} slots, float32 "
                    f"({spec.slots},), got {describe_value(metric)}"
                )

    def _check_written_into(self, out: StepRows) -> None:
        """Refuse arrays put in place of those that were given: what stands in them would reach nobody."""
        for name in FIELDS:
            given, found = getattr(out, name), getattr(self._agent, name)
            if found is not given:
                raise self._replaced(name, given, found, f"agent.{name}[:] = ...")
        self._check_observation_is(out)

    def _check_observation_is(self, out: StepRows) -> None:
        for what in ("observation", "action_mask"):
            rows: Arrays = getattr(out, what)
            if not rows:
                continue
            found = getattr(self._agent, what)
            if self._one_observation if what == "observation" else self._one_action:
                found = {next(iter(rows)): found}
            for name, given in rows.items():
                if not isinstance(found, dict) or found.get(name) is not given:
                    came = found.get(name) if isinstance(found, dict) else found
                    field = what if len(rows) == 1 else f"{what}[{name!r}]"
                    raise self._replaced(field, given, came, f"agent.{field}[rows] = ...")

    def _replaced(self, field: str, given: NDArray[Any], found: Any, remedy: str) -> ContractError:
        return self.place.error(
            field,
            f"the array that was there, {describe_value(given)}",
            f"another one, {describe_value(found)}; write into it: {remedy}",
        )

    def _end_episodes(self, out: StepRows) -> TimeStep:
        ended = np.flatnonzero(self._ended)
        final = {name: array[ended] for name, array in out.observation.items()}
        metrics = self._agent.episode_metrics
        episodes = self._tally.take(
            ended, {name: metrics[name][ended].astype(np.float32) for name in self.spec.episode_metrics}
        )
        for mask in out.action_mask.values():
            mask[ended] = True
        self._begin(ended)
        self._world.observe(ended)
        return TimeStep(episodes, final)

    def _begin(self, rows: NDArray[np.intp]) -> None:
        self._elapsed[rows] = 0
        self._world.reset(rows, SlotDraws([self._generators[row] for row in rows]))
