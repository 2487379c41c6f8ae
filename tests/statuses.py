"""Statuses of runs: one that a real run gave, and what can become of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded_status.json"


def recorded(**changes: Any) -> dict[str, Any]:
    """Four actors that learn to balance a pole."""
    return {**json.loads(RECORDED.read_text()), **changes}


def with_actors(count: int) -> dict[str, Any]:
    """The same with another number of actors, all of one kind."""
    status = recorded(actors_wanted=count, actors_started=count, actors_alive=count, worlds=2 * count)
    row = status["actors"][0]
    status["actors"] = [{**row, "index": index, "pid": 5000 + 37 * index} for index in range(count)]
    return status


def slow() -> dict[str, Any]:
    """Actor 2 holds the batch."""
    waits = "the learner waits 83% of the time: world-bound (94% of the actors' work is stepping worlds)"
    status = recorded(held_by=[2], bottleneck=f"{waits}; faster worlds would help")
    status["actors"][2].update(held_share=0.97, owes_s=2.1, holds=True)
    status["learner"].update(wait_share=0.83)
    return status


def recovering() -> dict[str, Any]:
    """The learner has died."""
    crash = {"what": "the learner (process 4000) ended with signal 9 (SIGKILL)", "record": "/crash.txt", "at_s": 42.0}
    books = {"incarnation": 0, "version": 113, "tickets": {**recorded()["tickets"], "lost": 8, "outstanding": 0}}
    status = recorded(state="recovering", crashes=[crash], tickets_before=[books])
    status["learner"].update(running=False, pid=None, restarts=0, silent_s=1.4, cpu_percent=None, memory_bytes=None)
    return status


def starting() -> dict[str, Any]:
    """Nobody has reported anything yet."""
    status = recorded(state="starting", seconds=0.4, actors=[], tickets={}, curve=[])
    known = ("pid", "running", "incarnation", "restarts", "sps", "wait_share", "silent_s", "cpu_percent", "findings")
    status["learner"] = {key: status["learner"][key] for key in (*known, "memory_bytes", "threads")}
    status["learner"].update(sps=0.0, wait_share=None, silent_s=None)
    absent = {"index": 0, "pid": 4001, "restarts": 0, "restart_in_s": None, "leaving": False}
    status["actors_absent"] = [absent, {**absent, "index": 1, "pid": None, "restarts": 3, "restart_in_s": 1.5}]
    return status


def crowded() -> dict[str, Any]:
    """Sixty-four actors on four hosts, a GPU, large numbers, and everything that can be special about an actor."""
    status = with_actors(64)
    for row in status["actors"]:
        if host := row["index"] % 4:
            row.update(host=f"node-{host}.cluster.example", cpu_percent=None, memory_bytes=None, threads=None)
    rows = status["actors"]
    rows[3].update(ready=False, worlds=0, version=-1, lag=None)
    rows[5].update(leaving=True)
    rows[7].update(held_share=0.98, owes_s=2.1)
    rows[9].update(relieved=True, worlds=0)
    rows[11].update(silent_s=14.2)
    rows[12].update(worlds=0)
    rows[63].update(index=1000, started=False)
    absent = {"index": 64, "pid": None, "restarts": 3, "restart_in_s": 1.5, "leaving": False}
    gpu = {"name": "NVIDIA H200", "memory_bytes": 3 << 30, "memory_total_bytes": 139 << 30, "ours_bytes": 1 << 30}
    status.update(held_by=[7], actors_absent=[absent], gpu={**gpu, "busy_percent": 45}, seconds=93784.2)
    status.update(auto={"lowest": 1, "highest": 64}, goal=["return_mean>=475", "success_rate>=0.995"])
    status["eval"] = {
        "episodes": 400,
        "return_mean": 489.2,
        "return_std": 3.0,
        "length_mean": 489,
        "success_rate": None,
    }
    status["learner"].update(steps=1234567890, version=120563, sps=1234567.0, trained_sps=987654.0, device="cuda")
    status["learner"].update(lag_steps={"0": 100, "1": 5000, "2": 800, "3": 20})
    status["tickets"].update(issued=1234567, trained=1234000, rejected={"warm-up": 64, "stale": 3}, lost=12)
    status["wire"].update(received_bytes=10**12, received_bytes_s=1.1e9, refused_messages={"malformed": 4})
    return copy.deepcopy(status)
