"""When a run has reached what it is for, and from when on it is worth looking."""

from __future__ import annotations

from rustyrl.condition import Condition, parse_condition
from rustyrl.config import RunConfig
from rustyrl.spec import EnvironmentSpec

__all__ = ["evaluation_conditions", "goal_conditions"]


def goal_conditions(run: RunConfig, spec: EnvironmentSpec) -> tuple[Condition, ...]:
    """What ends the run when an evaluation meets all of it: ``--stop-at``, else the world's own goal.

    Empty if neither is there, or if a budget is set without ``--stop-at``.
    """
    if run.stop_at:
        return tuple(parse_condition(text) for text in run.stop_at)
    if run.total_steps or run.max_seconds:
        return ()
    return tuple(parse_condition(text) for text in spec.goal)


def evaluation_conditions(run: RunConfig, spec: EnvironmentSpec) -> tuple[Condition, ...]:
    """What training episodes must reach before a version is evaluated.

    The world's ``evaluate_from`` where its own goal is asked for, else the goal with slack; empty without a goal.
    """
    goal = goal_conditions(run, spec)
    if goal and not run.stop_at and spec.evaluate_from:
        return tuple(parse_condition(text) for text in spec.evaluate_from)
    return tuple(condition.relaxed() for condition in goal)
