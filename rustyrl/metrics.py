"""The metrics that Prometheus can have of a run, and where in the status their values are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["FIGURES", "PREFIX", "Figure"]

PREFIX = "rustyrl_"
STATES = ("starting", "running", "paused", "recovering", "stopping", "evaluating")
Status = dict[str, Any]
Samples = list[tuple[dict[str, str], Any]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric: its name without ``rustyrl_``, what it means, and its values by label; ``_total`` makes a counter."""

    name: str
    meaning: str
    samples: Callable[[Status], Samples]


def single(*path: str) -> Callable[[Status], Samples]:
    """The one value at a place in the status."""
    return lambda status: [({}, _at(status, path))]


def each_actor(key: str, scale: float = 1.0) -> Callable[[Status], Samples]:
    """A value for each actor."""
    return lambda status: [
        ({"actor": str(row["index"])}, None if row[key] is None else row[key] * scale) for row in status["actors"]
    ]


def by_label(label: str, *path: str) -> Callable[[Status], Samples]:
    """The values of a mapping at a place in the status, by its keys."""
    return lambda status: [({label: str(key)}, value) for key, value in (_at(status, path) or {}).items()]


def _at(status: Status, path: tuple[str, ...]) -> Any:
    found: Any = status
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _percent(samples: Callable[[Status], Samples]) -> Callable[[Status], Samples]:
    return lambda status: [(labels, None if value is None else value / 100) for labels, value in samples(status)]


FIGURES = (
    Figure("state", "1 for the state that the run is in", lambda s: [({"state": k}, k == s["state"]) for k in STATES]),
    Figure(
        "run_seconds",
        "that the run has taken, up to the checkpoint that it was resumed from included",
        single("seconds"),
    ),
    Figure("learner_up", "whether the learner's process runs", single("learner", "running")),
    Figure("learner_restarts_total", "learners that followed a dead one", single("learner", "restarts")),
    Figure("policy_version", "updates that made the newest policy", single("learner", "version")),
    Figure("trained_steps_total", "env steps trained on", single("learner", "steps")),
    Figure("trained_steps_per_second", "env steps trained per second now", single("learner", "sps")),
    Figure("learner_wait_ratio", "part of its time that the learner waits", single("learner", "wait_share")),
    Figure("learner_stage_seconds_total", "the learner's time by stage", by_label("stage", "learner", "stages_s")),
    Figure("update_stage_seconds", "of the newest update, by stage", by_label("stage", "learner", "update_s")),
    Figure("lag_steps_total", "env steps trained on by policy lag", by_label("lag", "learner", "lag_steps")),
    Figure("loss", "of the newest update, by what was measured", by_label("figure", "learner", "losses")),
    Figure("training", "of the newest training episodes", by_label("figure", "learner", "training")),
    Figure("evaluation", "of the last evaluated version", by_label("figure", "eval")),
    Figure("learner_cpu_ratio", "cores that the learner keeps busy", _percent(single("learner", "cpu_percent"))),
    Figure("learner_memory_bytes", "resident memory of the learner", single("learner", "memory_bytes")),
    Figure("worlds", "worlds of the run", single("worlds")),
    Figure("worlds_moved_total", "moves of a world to another actor", single("worlds_moved")),
    Figure(
        "worlds_restarted_total",
        "worlds that began new episodes, moved or resumed without their state",
        single("worlds_restarted"),
    ),
    Figure("actors", "actors that are ready", lambda s: [({}, sum(row["ready"] for row in s["actors"]))]),
    Figure("actors_wanted", "actors that this machine is to have", single("actors_wanted")),
    Figure("actor_restarts_total", "actors that followed a dead one", single("actor_restarts")),
    Figure("actor_steps_total", "env steps that came from an actor", each_actor("env_steps")),
    Figure("actor_steps_per_second", "env steps of an actor per second now", each_actor("sps")),
    Figure("actor_policy_version", "that an actor has", each_actor("version")),
    Figure("actor_policy_lag", "versions that an actor is behind", each_actor("lag")),
    Figure("actor_worlds", "worlds that an actor owns", each_actor("worlds")),
    Figure("actor_held_ratio", "part of the time that all others waited for it", each_actor("held_share")),
    Figure("actor_silent_seconds", "since its last sign of life", each_actor("silent_s")),
    Figure("actor_cpu_ratio", "cores that an actor keeps busy", each_actor("cpu_percent", 0.01)),
    Figure("actor_memory_bytes", "resident memory of an actor", each_actor("memory_bytes")),
    Figure("tickets_issued_total", "tickets given to actors", single("tickets", "issued")),
    Figure("tickets_trained_total", "tickets trained on", single("tickets", "trained")),
    Figure("tickets_lost_total", "tickets gone with their actor", single("tickets", "lost")),
    Figure("tickets_rejected_total", "answers refused", by_label("reason", "tickets", "rejected")),
    Figure("tickets_outstanding", "tickets not yet trained on", single("tickets", "outstanding")),
    Figure("received_bytes_total", "from actors", single("wire", "received_bytes")),
    Figure("sent_bytes_total", "to actors", single("wire", "sent_bytes")),
    Figure("refused_messages_total", "that answer no ticket", by_label("reason", "wire", "refused_messages")),
    Figure("machine_cores", "that may be used", single("machine", "cores")),
    Figure("machine_cpu_ratio", "of the time of all cores", _percent(single("machine", "cpu_percent"))),
    Figure("machine_memory_bytes", "in use", single("machine", "memory_bytes")),
    Figure("machine_memory_total_bytes", "there is", single("machine", "memory_total_bytes")),
    Figure("gpu_memory_bytes", "in use", single("gpu", "memory_bytes")),
    Figure("gpu_memory_total_bytes", "there is", single("gpu", "memory_total_bytes")),
    Figure("gpu_busy_ratio", "of the time", _percent(single("gpu", "busy_percent"))),
)
