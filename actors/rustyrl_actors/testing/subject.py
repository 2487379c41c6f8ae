"""What a check looks at, and what it raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import EpisodeRows
from rustyrl_actors.catalog import EnvironmentSource
from rustyrl_actors.environment import Arrays, TimeStep, allocate_rows
from rustyrl_actors.testing.trial import ActionDraws, Trace, run_trial

__all__ = ["Cut", "DoesNotApplyError", "Subject", "ViolationError", "cut_ends", "force_end", "forced_ends"]


class ViolationError(Exception):
    """What a world does wrong, in words, and how to mend it."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


class DoesNotApplyError(Exception):
    """Why a check says nothing about this kind of environment."""


@dataclass(slots=True)
class Subject:
    """An environment under test, the seed of its trials, and how many steps a trial has."""

    source: EnvironmentSource
    seed: int
    steps: int
    usual: Trace | None = None

    @property
    def style(self) -> str:
        """column, object or gym."""
        return "gym" if self.source.info is None else "column" if self.source.resizable else "object"

    def draws(self) -> ActionDraws:
        """The actions of every trial."""
        return ActionDraws(self.source.spec, self.steps, self.seed)

    def trial(self, seed: int | None = None, **settings: Any) -> Trace:
        """One run of a new environment."""
        environment = self.source.make()
        try:
            given = (self.seed if seed is None else seed, 0, 0)
            return run_trial(environment, given, settings.pop("draws", None) or self.draws(), self.steps, **settings)
        finally:
            environment.close()

    def trace(self) -> Trace:
        """The usual trial, run once."""
        if self.usual is None:
            self.usual = self.trial()
        return self.usual


def force_end(environment: Any) -> None:
    """Let every episode reach its step limit in the next step."""
    if isinstance(environment._elapsed, int):
        environment._elapsed = environment.spec.max_episode_steps
    else:
        environment._elapsed[:] = environment.spec.max_episode_steps


@dataclass(frozen=True, slots=True)
class Cut:
    """The episodes that ended in a step and, of those that were cut, slots and last observations."""

    slot: NDArray[np.int32]
    episodes: EpisodeRows
    final_observation: Arrays


def cut_ends(trace: Trace) -> list[Cut]:
    """The episodes of a trial that were cut, step by step."""
    return [_cut(step, trace.rollout.truncated[t]) for t, step in trace.ends]


def forced_ends(subject: Subject, steps: int = 2, poison: int = 0xCB) -> list[Cut]:
    """Cut every episode in every step of a new environment, into rows that were filled with ``poison`` before."""
    environment = subject.source.make()
    rows = allocate_rows(subject.source.spec)
    draws, found = subject.draws(), []
    try:
        environment.reset((subject.seed, 0, 0), rows)
        for t in range(steps):
            action = draws.at(t, rows.action_mask)
            for array in rows.observation.values():
                array.view(np.uint8)[...] = poison
            force_end(environment)
            step = environment.step(action, rows)
            if step.episodes is not None:
                found.append(_cut(step, rows.truncated))
    finally:
        environment.close()
    return found


def _cut(step: TimeStep, truncated: NDArray[np.bool_]) -> Cut:
    assert step.episodes is not None  # noqa: S101 - the caller looked
    cut = truncated[step.episodes.slot]
    final = {name: array[cut] for name, array in (step.final_observation or {}).items()}
    return Cut(step.episodes.slot[cut], step.episodes, final)
