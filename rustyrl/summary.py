"""What a run comes to: ``summary.json``, and what ``rustyrl train --json`` prints."""

from __future__ import annotations

from typing import Any

from rustyrl.config import Config
from rustyrl.learner_keeper import LearnerKeeper
from rustyrl.processes import available_cores
from rustyrl.verdict import Timing, judge

__all__ = ["bottleneck", "stage_shares", "summarize", "timing_figures"]


MOST_PREDICTED = 32  # numbers of actors


def summarize(
    env: str,
    run: str,
    seconds: float,
    policy_version: int,
    stopped_by: str,
    evaluation: dict[str, Any] | None,
    learner: LearnerKeeper,
    actor_restarts: int,
    config: Config,
) -> dict[str, Any]:
    """The summary of a run that has ended.

    ``threads`` says how many ``lanes`` an update is computed in, how many threads of torch (``of``) each has, and
    whether its perceptrons are ``compiled``.

    Args:
        env: what was trained.
        run: its folder.
        seconds: that it took, up to the checkpoint that it was resumed from included.
        policy_version: the one that is kept.
        stopped_by: goal, budget, or who wanted it.
        evaluation: of that policy, None if there was none.
        learner: with its last report.
        actor_restarts: actors that were replaced.
        config: of the run.
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
        "device": report.get("device", ""),
        "threads": report.get("threads", {}),
        "bottleneck": bottleneck(report, config),
        "timing": timing_figures(report, config),
        "eval": evaluation,
        "tickets": report.get("tickets", {}),
        "tickets_before": learner.past,
        "worlds_restarted": report.get("worlds_restarted", 0),
        "learner_restarts": learner.restarts,
        "actor_restarts": actor_restarts,
        "findings": list(learner.findings.values()),
    }


def bottleneck(report: dict[str, Any], config: Config) -> str:
    """What limits the run and what would change that, by what its learner reports; "" while too little is known."""
    timing = _timing(report, config)
    return "" if timing is None else judge(timing).text


def timing_figures(report: dict[str, Any], config: Config) -> dict[str, Any] | None:
    """What `bottleneck` is computed from, of the newest updates; None while too little is known.

    Returns:
        ``sps``, ``learner_wait`` (share), ``learning_s`` and ``collecting_s`` of a batch, ``busy_cores``, ``cores``,
        ``actors``, ``limit``, and ``sps_by_actors``: what so many actors are expected to give.
    """
    timing = _timing(report, config)
    if timing is None:
        return None
    numbers = {*range(1, min(timing.worlds, MOST_PREDICTED) + 1), timing.actors, timing.worlds}
    return {
        "sps": round(timing.steps / timing.seconds, 1),
        "learner_wait": round(timing.wait, 4),
        "learning_s": round(timing.learning_s, 6),
        "collecting_s": round(timing.collecting_s(timing.actors), 6),
        "busy_cores": round(timing.cpu_s / timing.seconds, 3),
        "cores": timing.cores,
        "actors": timing.actors,
        "limit": judge(timing).limit,
        "sps_by_actors": {str(n): round(timing.predict_sps(n), 1) for n in sorted(numbers)},
    }


def stage_shares(recent: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The shares of the stages in the time of the ``learner`` and of all ``actors``, over the newest updates."""
    shares = {}
    for side, name in (("learner", "learner_s"), ("actors", "actor_s")):
        spent = {stage: seconds for stage, seconds in recent.get(name, {}).items() if stage != "cpu"}
        total = sum(spent.values())
        shares[side] = {stage: round(seconds / total, 4) for stage, seconds in spent.items()} if total else {}
    return shares


def _timing(report: dict[str, Any], config: Config) -> Timing | None:
    lag = config.batch.max_policy_lag
    return Timing.of(report.get("recent", {}), config.batch.worlds, available_cores(), lag)
