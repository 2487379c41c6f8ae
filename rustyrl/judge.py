"""Greedy evaluation of versions in update order; the first that meets the goal is confirmed.

Each evaluation is a process of the actor package, which alone steps worlds: what ``rustyrl eval`` runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rustyrl.condition import Condition, meets, parse_condition
from rustyrl.config import Config
from rustyrl.errors import RunFailedError
from rustyrl.processes import Child, await_end, start_child
from rustyrl.spec import EnvironmentSpec

__all__ = ["Candidate", "Judge", "goal_of"]

FINAL_S = 120.0  # how long the last evaluation may take
TURN_S = 0.1
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
        self.best_version: int | None = None
        self._best_score: tuple[float, float] = (float("-inf"), float("-inf"))
        self._config = config
        self._log = log
        self._waiting: deque[Candidate] = deque()
        self._running: tuple[Candidate, Child] | None = None

    def add(self, candidate: Candidate) -> None:
        """Queue a version; versions come in update order."""
        self._waiting.append(candidate)

    def turn(self) -> Candidate | None:
        """Start what can be started; the candidate whose evaluation has just ended, if one has.

        Raises:
            RunFailedError: the evaluation failed, with its traceback.
        """
        ended = None
        if self._running is not None and not self._running[1].running:
            ended, child = self._running
            self._running = None
            self._weigh(ended, _read(child))
        if self._waiting and self._running is None and self.confirmed is None:
            candidate = self._waiting.popleft()
            self._running = (candidate, self._start(candidate.policy, candidate.version))
        return ended

    def final(self, policy: Path, give_up: Callable[[], bool]) -> dict[str, Any] | None:
        """Evaluate the policy that is kept; None if that is given up.

        Raises:
            RunFailedError: the evaluation failed or took too long.
        """
        child = self._start(policy, FINAL_SEED)
        deadline = time.monotonic() + FINAL_S
        # A pipe holds 64 KiB, an evaluation's figures are some hundred bytes: it can end before it is read.
        while await_end([child], time.monotonic() + TURN_S):
            if give_up():
                child.close()
                return None
            if time.monotonic() > deadline:
                child.close()
                raise RunFailedError(f"the final evaluation took more than {FINAL_S:.0f} s")
        return _read(child)

    def close(self) -> None:
        """Kill an evaluation that still runs."""
        if self._running is not None:
            self._running[1].close()

    def _weigh(self, candidate: Candidate, figures: dict[str, Any]) -> None:
        self.evaluation = figures
        score = (-sum(condition.shortfall(figures) for condition in self.goal), float(figures["return_mean"]))
        if score > self._best_score:
            self._best_score, self.best_version = score, candidate.version
        if meets(self.goal, figures):
            self.confirmed = candidate

    def _start(self, policy: Path, version: int) -> Child:
        run = self._config.run
        settings = msgspec.json.encode(self._config.env).decode()
        arguments = ["rustyrl_actors", "evaluate", run.env, "--env-config", settings, "--policy", str(policy)]
        arguments += ["--episodes", str(run.eval_episodes), "--seed", str((run.seed << 32) + version)]
        return start_child("evaluation", arguments, self._log, actor=True, capture=True)


def goal_of(config: Config, spec: EnvironmentSpec) -> tuple[Condition, ...]:
    """What ends the run when an evaluation meets it: ``--stop-at``, else the world's goal unless a budget is set."""
    run = config.run
    if run.stop_at:
        return tuple(parse_condition(text) for text in run.stop_at)
    if run.total_steps or run.max_seconds:
        return ()
    return tuple(parse_condition(text) for text in spec.goal)


def _read(child: Child) -> dict[str, Any]:
    output = child.process.stdout.read() if child.process.stdout is not None else b""
    code, tail = child.process.returncode, child.tail()
    child.close()
    if code:
        raise RunFailedError(f"the evaluation ended with code {code}:\n{tail}")
    return msgspec.json.decode(output, type=dict[str, Any])
