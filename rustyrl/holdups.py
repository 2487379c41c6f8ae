"""Which actors hold the others up: those that a batch waits for when all others have answered."""

from __future__ import annotations

from collections import deque
from typing import Any

__all__ = ["HoldUps"]

WINDOW_S = 5.0  # what the shares are over
LONGEST_S = 1.0  # for which one report may stand
MINORITY = 1 / 3  # of the actors that have worlds; the others are held up by no more than these, or by one
HELD_SHARE = 0.5  # of the time: who is twice as slow as the others holds them up for half of it
WAIT_SHARE = 0.3  # of the learner's time; if it waits less, it is the learner that holds up


class HoldUps:
    """Remembers for some seconds who was waited for, from the learner's reports."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, frozenset[int]]] = deque()  # when, for how long, incarnations
        self._learner = -1  # incarnation

    def take(self, report: dict[str, Any], now: float) -> None:
        """Take in a report; ``now`` in seconds of the monotonic clock."""
        if report["incarnation"] != self._learner:
            self._learner = report["incarnation"]
            self._seen.clear()
        lasted = min(now - self._seen[-1][0], LONGEST_S) if self._seen else 0.0
        self._seen.append((now, lasted, awaited(report.get("actors", []))))
        while self._seen and self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()

    def share(self, incarnation: int) -> float:
        """The part of the last seconds in which nobody was waited for but this actor, and perhaps a few others."""
        total = sum(lasted for _, lasted, _ in self._seen)
        held = sum(lasted for _, lasted, holders in self._seen if incarnation in holders)
        return held / total if total > 0 else 0.0

    def holders(self, actors: list[dict[str, Any]], wait_share: float | None) -> list[int]:
        """The indices of those that hold the batch up, the worst first; ``actors`` are rows of the status."""
        if wait_share is None or wait_share < WAIT_SHARE:
            return []
        guilty = [row for row in actors if row["held_share"] >= HELD_SHARE and not row["relieved"] and row["worlds"]]
        return [row["index"] for row in sorted(guilty, key=lambda row: (-row["held_share"], row["index"]))]


def awaited(rows: list[dict[str, Any]]) -> frozenset[int]:
    """The incarnations that owe the next batch its tickets, if most others have answered theirs."""
    members = [row for row in rows if row["ready"] and (row["worlds"] or row["holds"])]
    holding = [row["incarnation"] for row in members if row["holds"]]
    few = len(members) > 1 and len(holding) <= max(1, int(len(members) * MINORITY))
    return frozenset(holding) if few else frozenset()
