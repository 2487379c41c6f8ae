"""Answer one ticket: act and step for T steps, writing everything where the wire will read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import Rollout, no_episodes
from rustyrl.spec import EnvironmentSpec
from rustyrl.stages import Stages
from rustyrl_actors.contract import check_finite
from rustyrl_actors.environment import Arrays, Environment, StepRows, TimeStep, join_episodes, rows_of
from rustyrl_actors.inference import Policy
from rustyrl_actors.pulse import Pulse

__all__ = ["OwnedWorld", "UnrollBuffer", "unroll"]


@dataclass(slots=True)
class OwnedWorld:
    """A world in this actor's care.

    next_batch: the batch that it is ready for; another one means that it must be built anew
    built: the batch that its episodes began with
    now: rows whose ``observation`` and ``action_mask`` are what its agents see and may do now
    """

    index: int
    environment: Environment
    next_batch: int
    now: StepRows
    built: int = 0


@dataclass(slots=True)
class UnrollBuffer:
    """A rollout to write and the views that its steps write through, made once and used again.

    columns: the slots of each world, in the order of the worlds
    rows: for each world its T `StepRows`
    noise: `[T, W, A]`, see `rustyrl_actors.noise`
    bounded: part to `[W, ...]`, the actions of a step as the worlds are given them
    given: for each world its part of them, `[E, ...]`
    """

    rollout: Rollout
    columns: list[slice]
    noise: NDArray[np.float32]
    bounded: Arrays = field(default_factory=dict)
    rows: list[list[StepRows]] = field(init=False)
    given: list[Arrays] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [rows_of(self.rollout, columns) for columns in self.columns]
        self.bounded = self.bounded or {name: np.zeros_like(array[0]) for name, array in self.rollout.action.items()}
        self.given = [{name: array[columns] for name, array in self.bounded.items()} for columns in self.columns]


def unroll(
    worlds: list[OwnedWorld], policy: Policy, buffer: UnrollBuffer, stages: Stages, pulse: Pulse | None = None
) -> Rollout:
    """Step every world T times under one policy (stop 2 of the straight line).

    Args:
        worlds: in the order of the ticket.
        policy: the version that the ticket names.
        buffer: its noise is drawn, its rollout is written.
        stages: gets the seconds spent in ``act`` and ``step``.
        pulse: is told of each step before it is taken.

    Returns:
        The buffer's rollout, complete; the worlds hold their next observations.
    """
    rollout = buffer.rollout
    for world, columns in zip(worlds, buffer.columns, strict=True):
        for name, array in rollout.observation.items():
            array[0, columns] = world.now.observation[name]
        for name, mask in rollout.action_mask.items():
            mask[0, columns] = world.now.action_mask[name]
    ends: list[tuple[int, int, TimeStep]] = []
    act_s = step_s = 0.0
    for t in range(rollout.unroll_length):
        started = time.perf_counter()
        observation = {name: array[t] for name, array in rollout.observation.items()}
        action = {name: array[t] for name, array in rollout.action.items()}
        masks = {name: array[t] for name, array in rollout.action_mask.items()}
        policy.act(observation, buffer.noise[t], action, rollout.behavior_log_prob[t], masks)
        policy.bound(action, buffer.bounded)
        acted = time.perf_counter()
        for world, columns, given, rows in zip(worlds, buffer.columns, buffer.given, buffer.rows, strict=True):
            if pulse is not None:
                pulse.step(world.index, world.next_batch, world.built, t)
            step = _step(world, given, rows[t], t)
            if step.episodes is not None:
                ends.append((t, columns.start, step))
        act_s += acted - started
        step_s += time.perf_counter() - acted
    for world, columns in zip(worlds, buffer.columns, strict=True):
        for name, array in rollout.observation.items():
            world.now.observation[name][...] = array[-1, columns]
        for name, mask in rollout.action_mask.items():
            world.now.action_mask[name][...] = mask[-1, columns]
    _collect_ends(rollout, worlds[0].environment.spec, ends)
    places = [world.environment.place for world in worlds]
    check_finite(rollout, places, [world.index for world in worlds], worlds[0].next_batch)
    stages.add("act", act_s)
    stages.add("step", step_s)
    return rollout


def _step(world: OwnedWorld, action: Arrays, rows: StepRows, t: int) -> TimeStep:
    try:
        return world.environment.step(action, rows)
    except Exception as error:
        error.add_note(
            f"raised by world {world.index} of {world.environment.spec.env!r} in step {t} of batch {world.next_batch}"
        )
        raise


def _collect_ends(rollout: Rollout, spec: EnvironmentSpec, ends: list[tuple[int, int, TimeStep]]) -> None:
    """Join what the steps said of ended episodes, in time order and by slot within a step."""
    index: list[tuple[int, int]] = []
    seen: dict[str, list[NDArray[np.generic]]] = {name: [] for name in rollout.observation}
    for t, first, step in ends:
        if step.episodes is None or step.final_observation is None:
            continue
        slots = step.episodes.slot + np.int32(first)
        cut = rollout.truncated[t, slots]
        if cut.any():
            index += [(t, int(slot)) for slot in slots[cut]]
            for name, final in step.final_observation.items():
                seen[name].append(final[cut])
    rollout.final_index = np.array(index, np.int32).reshape(-1, 2)
    for name, array in rollout.observation.items():
        empty = np.empty((0, *array.shape[2:]), array.dtype)
        rollout.final_observation[name] = np.concatenate(seen[name]) if index else empty
    episodes = [(first, step.episodes) for _, first, step in ends if step.episodes is not None]
    rollout.episodes = join_episodes(episodes) if episodes else no_episodes(spec)
