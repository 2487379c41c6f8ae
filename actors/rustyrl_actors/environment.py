"""The environment contract: what an actor steps, whatever stands behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import EpisodeRows, Rollout
from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.contract import Place

__all__ = ["Environment", "StepRows", "TimeStep", "allocate_rows", "join_episodes", "rows_between", "rows_of"]

Arrays = dict[str, NDArray[np.generic]]
Masks = dict[str, NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows that one step of one environment writes: views of a rollout, E slots wide.

    observation: name to `[E, ...]`, what the next action is chosen from (row t + 1 of the rollout)
    action_mask: part to `[E, choices]` bool for masked parts, what the next action may be (row t + 1)
    reward, terminated, truncated, valid: `[E]`, the outcome of this step (row t)
    """

    observation: Arrays
    action_mask: Masks
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TimeStep:
    """What a step has to say beside the rows that it wrote; both are None in most steps.

    episodes: the M episodes that ended in this step, their ``slot`` counted within the environment
    final_observation: name to `[M, ...]`, what those slots saw before their reset
    """

    episodes: EpisodeRows | None = None
    final_observation: Arrays | None = None


class Environment(Protocol):
    """E slots that are stepped together; a slot whose episode ends is reset within the same step."""

    spec: EnvironmentSpec
    place: Place

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        """Start new episodes in every slot and seed what follows.

        Args:
            seed: all that decides what happens, beside the actions.
            out: its ``observation`` and ``action_mask`` are written; not to be kept.
        """
        ...

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        """Step every slot once and write the outcome into ``out``.

        Args:
            action: part to `[E, ...]` as the action space says, boxes within their bounds.
            out: where the rewards, flags and next observations go. Not to be kept.
        """
        ...

    def save(self) -> Arrays | None:
        """Everything that what follows depends on, beside the actions, as named arrays; None if that cannot be had."""
        ...

    def load(self, state: Arrays) -> None:
        """Go on from what `save` gave in another environment of this spec; raises `ValueError` if it does not fit."""
        ...

    def close(self) -> None:
        """Give back what the environment holds; it is not stepped again."""
        ...


def rows_of(rollout: Rollout, slots: slice) -> list[StepRows]:
    """The rows of each of the T steps of a rollout, for the columns ``slots``."""
    return [
        StepRows(
            observation={name: array[t + 1, slots] for name, array in rollout.observation.items()},
            action_mask={name: array[t + 1, slots] for name, array in rollout.action_mask.items()},
            reward=rollout.reward[t, slots],
            terminated=rollout.terminated[t, slots],
            truncated=rollout.truncated[t, slots],
            valid=rollout.valid[t, slots],
        )
        for t in range(rollout.unroll_length)
    ]


def rows_between(rows: StepRows, slots: slice) -> StepRows:
    """The rows of some slots."""
    return StepRows(
        observation={name: array[slots] for name, array in rows.observation.items()},
        action_mask={name: array[slots] for name, array in rows.action_mask.items()},
        reward=rows.reward[slots],
        terminated=rows.terminated[slots],
        truncated=rows.truncated[slots],
        valid=rows.valid[slots],
    )


def join_episodes(parts: list[tuple[int, EpisodeRows]]) -> EpisodeRows:
    """Episodes of several environments or steps, in this order; each part comes with its environment's first slot."""
    return EpisodeRows(
        slot=np.concatenate([part.slot + np.int32(first) for first, part in parts]),
        episode_return=np.concatenate([part.episode_return for _, part in parts]),
        length=np.concatenate([part.length for _, part in parts]),
        metrics={name: np.concatenate([part.metrics[name] for _, part in parts]) for name in parts[0][1].metrics},
    )


def allocate_rows(spec: EnvironmentSpec) -> StepRows:
    """Rows of their own, for who steps an environment without recording it."""
    return StepRows(
        observation={a.name: np.zeros((spec.slots, *a.shape), a.dtype) for a in spec.observation},
        action_mask={p.name: np.ones((spec.slots, *p.mask.shape), bool) for p in spec.action if p.masked},
        reward=np.zeros(spec.slots, np.float32),
        terminated=np.zeros(spec.slots, bool),
        truncated=np.zeros(spec.slots, bool),
        valid=np.ones(spec.slots, bool),
    )
