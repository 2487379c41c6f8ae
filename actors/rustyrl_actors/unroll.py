"""Answer one ticket: act and step for T steps, writing everything where the wire will read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import EpisodeRows, Rollout
from rustyrl.stages import Stages
from rustyrl_actors.environment import Arrays, Environment, StepRows, TimeStep, rows_of
from rustyrl_actors.inference import Policy

__all__ = ["OwnedWorld", "UnrollBuffer", "unroll"]


@dataclass(slots=True)
class OwnedWorld:
    """A world in this actor's care.

    next_batch: the batch that it is ready for; another one means that it must be built anew
    observation: name to `[E, ...]`, what its agents see now
    """

    index: int
    environment: Environment
    next_batch: int
    observation: Arrays


@dataclass(slots=True)
class UnrollBuffer:
    """A rollout to write and the views that its steps write through, made once and used again.

    columns: the slots of each world, in the order of the worlds
    rows: for each world its T `StepRows`
    noise: `[T, W, A]`, see `rustyrl_actors.noise`
    clipped: `[W, ...]`, the actions as the environments are given them
    """

    rollout: Rollout
    columns: list[slice]
    noise: NDArray[np.float32]
    clipped: NDArray[np.generic]
    rows: list[list[StepRows]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [rows_of(self.rollout, columns) for columns in self.columns]


def unroll(worlds: list[OwnedWorld], policy: Policy, buffer: UnrollBuffer, stages: Stages) -> Rollout:
    """Step every world T times under one policy (stop 2 of the straight line).

    Args:
        worlds: in the order of the ticket.
        policy: the version that the ticket names.
        buffer: its noise is drawn, its rollout is written.
        stages: gets the seconds spent in ``act`` and ``step``.

    Returns:
        The buffer's rollout, complete; the worlds hold their next observations.
    """
    rollout, action_name = buffer.rollout, policy.spec.action.name
    for world, columns in zip(worlds, buffer.columns, strict=True):
        for name, array in rollout.observation.items():
            array[0, columns] = world.observation[name]
    ends: list[tuple[int, int, TimeStep]] = []
    act_s = step_s = 0.0
    for t in range(rollout.unroll_length):
        started = time.perf_counter()
        observation = {name: array[t] for name, array in rollout.observation.items()}
        action = rollout.action[action_name][t]
        policy.act(observation, buffer.noise[t], action, rollout.behavior_log_prob[t])
        given = policy.clip(action, buffer.clipped)
        acted = time.perf_counter()
        for world, columns, rows in zip(worlds, buffer.columns, buffer.rows, strict=True):
            step = _step(world, given[columns], rows[t], t)
            if step.episodes is not None:
                ends.append((t, columns.start, step))
        act_s += acted - started
        step_s += time.perf_counter() - acted
    for world, columns in zip(worlds, buffer.columns, strict=True):
        for name, array in rollout.observation.items():
            world.observation[name][...] = array[-1, columns]
    _collect_ends(rollout, ends)
    stages.add("act", act_s)
    stages.add("step", step_s)
    return rollout


def _step(world: OwnedWorld, action: NDArray[np.generic], rows: StepRows, t: int) -> TimeStep:
    try:
        return world.environment.step(action, rows)
    except Exception as error:
        error.add_note(
            f"raised by world {world.index} of {world.environment.spec.env!r} in step {t} of batch {world.next_batch}"
        )
        raise


def _collect_ends(rollout: Rollout, ends: list[tuple[int, int, TimeStep]]) -> None:
    """Join what the steps said of ended episodes, in time order and by slot within a step."""
    finals = [(t, first, s.final_slots, s.final_observation) for t, first, s in ends if s.final_slots is not None]
    rollout.final_index = np.array(
        [(t, first + slot) for t, first, slots, _ in finals for slot in slots], np.int32
    ).reshape(-1, 2)
    for name, array in rollout.observation.items():
        seen = [final[name] for _, _, _, final in finals if final is not None]
        empty = np.empty((0, *array.shape[2:]), array.dtype)
        rollout.final_observation[name] = np.concatenate(seen) if seen else empty
    episodes = [(first, step.episodes) for _, first, step in ends if step.episodes is not None]
    rollout.episodes = _join_episodes(rollout, episodes)


def _join_episodes(rollout: Rollout, parts: list[tuple[int, EpisodeRows]]) -> EpisodeRows:
    if not parts:
        names = rollout.episodes.metrics.keys()
        none = np.empty(0, np.float32)
        empty = np.empty(0, np.int32)
        return EpisodeRows(empty, none, empty, dict.fromkeys(names, none))
    return EpisodeRows(
        slot=np.concatenate([part.slot + np.int32(first) for first, part in parts]),
        episode_return=np.concatenate([part.episode_return for _, part in parts]),
        length=np.concatenate([part.length for _, part in parts]),
        metrics={name: np.concatenate([part.metrics[name] for _, part in parts]) for name in parts[0][1].metrics},
    )
