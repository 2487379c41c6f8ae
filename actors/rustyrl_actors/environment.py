"""The environment contract: what an actor steps, whatever stands behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import EpisodeRows, Rollout
from rustyrl.spec import EnvironmentSpec

__all__ = ["Environment", "StepRows", "TimeStep", "allocate_rows", "rows_of"]

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows that one step of one environment writes: views of a rollout, E slots wide.

    observation: name to `[E, ...]`, what the next action is chosen from (row t + 1 of the rollout)
    reward, terminated, truncated, valid: `[E]`, the outcome of this step (row t)
    """

    observation: Arrays
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TimeStep:
    """What a step has to say beside the rows that it wrote; both are None in most steps.

    final_slots: `[K]` int, the slots truncated in this step
    final_observation: name to `[K, ...]`, what they saw before their reset
    episodes: the episodes that ended in this step, their ``slot`` counted within the environment
    """

    final_slots: NDArray[np.intp] | None = None
    final_observation: Arrays | None = None
    episodes: EpisodeRows | None = None


class Environment(Protocol):
    """E slots that are stepped together; a slot whose episode ends is reset within the same step."""

    spec: EnvironmentSpec

    def reset(self, seed: tuple[int, ...], observation: Arrays) -> None:
        """Start new episodes in every slot, write their first observation, and seed what follows."""
        ...

    def step(self, action: NDArray[np.generic], out: StepRows) -> TimeStep:
        """Step every slot once and write the outcome into ``out``.

        Args:
            action: `[E, ...]` as the action space says, boxes already clipped to their bounds.
            out: where the rewards, flags and next observations go. Not to be kept.
        """
        ...

    def close(self) -> None:
        """Give back what the environment holds; it is not stepped again."""
        ...


def rows_of(rollout: Rollout, slots: slice) -> list[StepRows]:
    """The rows of each of the T steps of a rollout, for the columns ``slots``."""
    return [
        StepRows(
            observation={name: array[t + 1, slots] for name, array in rollout.observation.items()},
            reward=rollout.reward[t, slots],
            terminated=rollout.terminated[t, slots],
            truncated=rollout.truncated[t, slots],
            valid=rollout.valid[t, slots],
        )
        for t in range(rollout.unroll_length)
    ]


def allocate_rows(spec: EnvironmentSpec) -> StepRows:
    """Rows of their own, for who steps an environment without recording it."""
    return StepRows(
        observation={a.name: np.zeros((spec.slots, *a.shape), a.dtype) for a in spec.observation},
        reward=np.zeros(spec.slots, np.float32),
        terminated=np.zeros(spec.slots, bool),
        truncated=np.zeros(spec.slots, bool),
        valid=np.ones(spec.slots, bool),
    )
