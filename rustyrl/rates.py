"""The speeds of the present, out of what the learner counts and reports."""

from __future__ import annotations

from collections import deque
from typing import Any

__all__ = ["Rates"]

RECENT_S, RECENT_VERSIONS = 5.0, 4  # what the present is, whichever is longer
COUNTED = ("incarnation", "version", "steps", "received_bytes", "sent_bytes", "stages_s")


class Rates:
    """Remembers the reports of the last seconds."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, dict[str, Any]]] = deque()

    def take(self, report: dict[str, Any], now: float) -> None:
        """Take in a report; ``now`` in seconds of the monotonic clock."""
        recent, version = self._recent, report["version"]
        if recent and recent[-1][1]["incarnation"] != report["incarnation"]:
            recent.clear()
        if len(recent) > 1 and recent[-2][1]["version"] == version:
            recent.pop()  # a pause may be long: the first and the last report of a version are enough
        counted = {key: report[key] for key in COUNTED}
        counted["env_steps"] = {row["incarnation"]: row["env_steps"] for row in report["actors"]}
        recent.append((now, counted))
        while len(recent) > 1:
            then, before = recent[1]
            if then > now - RECENT_S or version - before["version"] < RECENT_VERSIONS:
                break
            recent.popleft()

    def per_s(self, key: str) -> float:
        """How much a count grew per second."""
        if len(self._recent) < 2:
            return 0.0
        (then, before), (now, after) = self._recent[0], self._recent[-1]
        return float(round((after[key] - before[key]) / max(now - then, 1e-9), 1))

    def actor_sps(self, row: dict[str, Any]) -> float:
        """Env steps per second of an actor; since it came, if that is not long ago."""
        if len(self._recent) > 1:
            (then, before), (now, after) = self._recent[0], self._recent[-1]
            first, last = (counted["env_steps"].get(row["incarnation"]) for counted in (before, after))
            if first is not None and last is not None:
                return float(round((last - first) / max(now - then, 1e-9), 1))
        return float(row["sps"])

    def wait_share(self) -> float | None:
        """The part of its time that the learner waited for experience; None if too little is known."""
        if len(self._recent) < 2:
            return None
        (_, before), (_, after) = self._recent[0], self._recent[-1]
        if after["version"] <= before["version"]:
            return None
        spent = {k: v - before["stages_s"].get(k, 0.0) for k, v in after["stages_s"].items()}
        total = sum(spent.values())
        return spent.get("wait", 0.0) / total if total > 0 else None
