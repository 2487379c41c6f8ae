"""What a run comes to: ``summary.json``, and what ``rustyrl train --json`` prints."""

from __future__ import annotations

from typing import Any

from rustyrl.learner_keeper import LearnerKeeper

__all__ = ["bottleneck", "summarize"]


def summarize(
    env: str,
    run: str,
    seconds: float,
    policy_version: int,
    stopped_by: str,
    evaluation: dict[str, Any] | None,
    learner: LearnerKeeper,
    actor_restarts: int,
) -> dict[str, Any]:
    """The summary of a run that has ended.

    Args:
        env: what was trained.
        run: its folder.
        seconds: from its start to its end.
        policy_version: the one that is kept.
        stopped_by: goal, budget, or who wanted it.
        evaluation: of that policy, None if there was none.
        learner: with its last report.
        actor_restarts: actors that were replaced.
    """
    report = learner.report
    return {
        "env": env,
        "run": run,
        "steps": report.get("steps", 0),
        "seconds": round(seconds, 3),
        "trained_sps": round(report.get("trained_sps", 0.0), 1),
        "policy_version": policy_version,
        "stopped_by": stopped_by,
        "bottleneck": bottleneck(report.get("stages_s", {})),
        "eval": evaluation,
        "tickets": report.get("tickets", {}),
        "tickets_before": learner.past,
        "learner_restarts": learner.restarts,
        "actor_restarts": actor_restarts,
        "findings": list(learner.findings.values()),
    }


def bottleneck(stages_s: dict[str, float]) -> str:
    """Which side the other waits for, by the learner's own clock."""
    total = sum(stages_s.values())
    if not total:
        return "unknown"
    waiting = stages_s.get("wait", 0.0) / total
    side = "actors" if waiting > 0.5 else "learner"
    return f"{side} (the learner waits for experience {waiting:.0%} of the time)"
