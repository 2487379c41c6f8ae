"""Greedy evaluation of versions in update order; the first that meets the goal is confirmed.

Each evaluation is a process of the actor package, which alone steps worlds: what ``rustyrl eval`` runs.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rustyrl.condition import Condition, meets
from rustyrl.config import Config
from rustyrl.describe import evaluate_arguments
from rustyrl.errors import RunFailedError
from rustyrl.processes import Child, actor_environment, start_child
from rustyrl.run_folder import Best
from rustyrl.spare import Spare

__all__ = ["Candidate", "Judge"]

LIMIT_S = 120.0  # how long an evaluation may take
FINAL_SEED = 2**31  # seeds that no version was chosen by


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that training figures suggest may meet the goal."""

    version: int
    policy: Path


class Judge:
    """Evaluates candidates one at a time, so that the outcome follows from their order and not from timing."""

    def __init__(self, config: Config, goal: tuple[Condition, ...], log: Path) -> None:
        self.goal = goal
        self.evaluation: dict[str, Any] | None = None
        self.confirmed: Candidate | None = None
        self.best: Best | None = None
        self._config = config
        self._log = log
        self._waiting: deque[Candidate] = deque()
        self.judged: set[int] = set()  # versions
        self._running: tuple[Candidate, Child, float] | None = None
        self._last: Child | None = None  # evaluates what is kept
        self._spare: Spare | None = None

    @property
    def pending(self) -> list[int]:
        """Versions that are being evaluated, or wait for it."""
        running = [] if self._running is None else [self._running[0].version]
        return running + [candidate.version for candidate in self._waiting]

    @property
    def descriptors(self) -> list[int]:
        """What becomes readable when an evaluation ends."""
        running = [] if self._running is None else [self._running[1]]
        running += [] if self._last is None else [self._last]
        return [child.descriptor for child in running if child.descriptor >= 0 and child.running]

    def add(self, candidate: Candidate) -> None:
        """Queue a version; versions come in update order."""
        self._waiting.append(candidate)

    def prepare(self) -> None:
        """Have a process ready for an evaluation; where there is no goal, only what is kept is ever evaluated."""
        if self.goal and self._spare is None and self._last is None:
            with contextlib.suppress(OSError):  # an evaluation will start its own, or say why not
                self._spare = Spare("rustyrl_actors", actor_environment(), capture=True)

    def turn(self) -> Candidate | None:
        """Start what can be started; the candidate whose evaluation has just ended, if one has.

        Raises:
            RunFailedError: the evaluation failed, with its traceback.
        """
        ended = None
        if self._running is not None:
            candidate, child, deadline = self._running
            if not child.running:
                self._running = None
                self._weigh(candidate, _read(child))
                ended = candidate
            elif time.monotonic() > deadline:
                raise RunFailedError(f"the evaluation of version {candidate.version} took more than {LIMIT_S:.0f} s")
        if self._waiting and self._running is None and self.confirmed is None:
            candidate = self._waiting.popleft()
            child = self._start(candidate.policy, candidate.version)
            self._running = (candidate, child, time.monotonic() + LIMIT_S)
        return ended

    def begin_final(self, policy: Path) -> None:
        """Begin to evaluate the policy that is kept, on seeds that nothing was chosen by."""
        self._last = self._start(policy, FINAL_SEED)

    def final(self, policy: Path, meanwhile: Callable[[], bool]) -> dict[str, Any] | None:
        """Evaluate the policy that is kept, calling ``meanwhile`` while it runs; None once that gives True.

        Raises:
            RunFailedError: the evaluation failed or took too long.
        """
        if self._last is None:
            self.begin_final(policy)
        child = self._last
        assert child is not None  # noqa: S101 - begun above
        deadline = time.monotonic() + LIMIT_S
        # A pipe holds 64 KiB, an evaluation's figures are some hundred bytes: it can end before it is read.
        while child.running:
            if meanwhile():
                child.close()
                return None
            if time.monotonic() > deadline:
                child.close()
                raise RunFailedError(f"the final evaluation took more than {LIMIT_S:.0f} s")
        return _read(child)

    def close(self) -> None:
        """Kill an evaluation that still runs, and what was to be one."""
        if self._running is not None:
            self._running[1].close()
        if self._last is not None:
            self._last.close()
        if self._spare is not None:
            self._spare.close()

    def _weigh(self, candidate: Candidate, figures: dict[str, Any]) -> None:
        self.evaluation = figures
        self.judged.add(candidate.version)
        missing = sum(condition.shortfall(figures) for condition in self.goal)
        best = Best(candidate.version, -missing, float(figures["return_mean"]))
        if self.best is None or (best.score, best.return_mean) > (self.best.score, self.best.return_mean):
            self.best = best
        if self.goal and meets(self.goal, figures):
            self.confirmed = candidate

    def _start(self, policy: Path, version: int) -> Child:
        run = self._config.run
        seed = (run.seed << 32) + version
        arguments = evaluate_arguments(run.env, self._config.env, policy, run.eval_episodes, seed)
        spare, self._spare = self._spare, None
        asked = ["rustyrl_actors", *arguments]
        return start_child("evaluation", asked, self._log, actor=True, capture=True, spare=spare)


def _read(child: Child) -> dict[str, Any]:
    output = child.process.stdout.read() if child.process.stdout is not None else b""
    code, tail = child.process.returncode, child.tail()
    child.close()
    if code:
        raise RunFailedError(f"the evaluation ended with code {code}:\n{tail}")
    try:
        return msgspec.json.decode(output, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise RunFailedError(f"the evaluation printed no result ({error}):\n{tail}") from None
