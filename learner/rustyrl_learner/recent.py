"""Where the time of the newest updates went: what `rustyrl.verdict` judges by."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

__all__ = ["RecentUpdates"]

WINDOW = 64  # updates
WARM_UP = 3  # updates whose batches were collected while processes started


@dataclass(frozen=True, slots=True)
class _Update:
    seconds: float
    cpu_s: float
    steps: int
    actors: int
    learner_s: dict[str, float]
    actor_s: dict[str, float]


class RecentUpdates:
    """Sums over the newest updates, kept as they come."""

    def __init__(self) -> None:
        self._updates: deque[_Update] = deque()
        self._sums: dict[str, Counter[str]] = {"learner_s": Counter(), "actor_s": Counter()}
        self._totals: Counter[str] = Counter()
        self._seen = 0
        self._ended = time.monotonic()
        self._cpu_s = time.process_time()

    def add(self, steps: int, actors: int, learner_s: dict[str, float], actor_s: dict[str, float]) -> None:
        """Count an update that ends now.

        Args:
            steps: trained on.
            actors: that answered for its batch.
            learner_s: seconds of the training thread by stage, since the update before.
            actor_s: seconds of the actors by stage, summed over them; ``cpu`` is their processor time.
        """
        now, cpu_s = time.monotonic(), time.process_time()
        update = _Update(now - self._ended, cpu_s - self._cpu_s, steps, actors, learner_s, actor_s)
        self._ended, self._cpu_s, self._seen = now, cpu_s, self._seen + 1
        if self._seen <= WARM_UP:
            return
        if self._updates and actors != self._updates[-1].actors:  # it was scaled: what was before says nothing of now
            self._updates.clear()
            self._totals.clear()
            for sums in self._sums.values():
                sums.clear()
        self._updates.append(update)
        self._count(update, 1)
        if len(self._updates) > WINDOW:
            self._count(self._updates.popleft(), -1)

    def skip(self) -> None:
        """Leave out the time until now, in which training was held."""
        self._ended, self._cpu_s = time.monotonic(), time.process_time()

    def report(self) -> dict[str, Any]:
        """Sums over the newest updates, at most 64: ``updates, seconds, cpu_s, steps, actors, learner_s, actor_s``.

        ``actors`` is how many there are; all others are 0 or empty before the fourth update.
        """
        return {
            "updates": len(self._updates),
            "seconds": self._totals["seconds"],
            "cpu_s": self._totals["cpu_s"],
            "steps": int(self._totals["steps"]),
            "actors": self._updates[-1].actors if self._updates else 0,
            **{name: dict(sums) for name, sums in self._sums.items()},
        }

    def _count(self, update: _Update, sign: int) -> None:
        self._totals.update({name: sign * getattr(update, name) for name in ("seconds", "cpu_s", "steps")})
        for name, sums in self._sums.items():
            for stage, seconds in getattr(update, name).items():
                sums[stage] += sign * seconds
