"""How many actors a run is to have, by how fast it trains: climbs while it pays, and remembers what did not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rustyrl.errors import UsageError

__all__ = ["AutoScale", "Reading", "parse_range"]

HUNGRY = 0.25  # a learner that waits more than this part of its time could use a third more actors
FULL = 0.05  # one that waits less may have too many
CHANCE = 1.03  # a ratio of speeds that may be chance: fewer actors may cost it
WORTH = (
    0.15  # of the speed that they would bring if nothing held them up, more actors must bring so much, beyond chance
)
SETTLE_S = 10.0  # after actors have come or gone, before anything is measured
MEASURE_S, LONGEST_MEASURE_S = 10.0, 60.0  # what a speed is averaged over; longer if it varies
UPDATES = 3  # that settling and measuring take at least: those that began before are of the actors before
STEADY = 0.02  # a mean whose standard error is this part of it is good enough
FORGET_S = 300.0  # before what did not pay is tried again; doubled each time that it does not,
LONGEST_S = 3600.0  # up to this: worlds, policies and what else the machine does change


@dataclass(frozen=True, slots=True)
class Reading:
    """What a learner had done by a moment: counts that grow.

    at: seconds of any clock
    version: updates
    steps: env steps trained
    waited_s: for experience, of its ``spent_s``
    present: actors that are ready now
    """

    at: float
    version: int
    steps: int
    waited_s: float
    spent_s: float
    present: int

    @classmethod
    def of(cls, report: dict[str, Any], at: float) -> Reading:
        """From what a learner reports of itself."""
        stages = report["stages_s"]
        present = sum(1 for actor in report["actors"] if actor["ready"])
        return cls(at, report["version"], report["steps"], stages.get("wait", 0.0), sum(stages.values()), present)


@dataclass(slots=True)
class _Measurement:
    """What was trained since ``start``: at which speed, update by update, and how steadily."""

    start: Reading
    updates: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, speed: float) -> None:
        self.updates += 1
        self.total += speed
        self.squares += speed * speed

    def error(self) -> float:
        """The standard error of the mean speed, as a part of it."""
        mean = self.total / self.updates
        variance = max(0.0, self.squares / self.updates - mean * mean)
        return math.sqrt(variance / self.updates) / max(mean, 1e-9)


class AutoScale:
    """Decides from readings that it is given; it has no clock and starts nothing."""

    def __init__(self, lowest: int, highest: int) -> None:
        self.lowest = lowest
        self.highest = highest
        self._newest: Reading | None = None
        self._changed: Reading | None = None  # when the actors that there are became so many
        self._measurement: _Measurement | None = None  # once they have settled
        self._trial: tuple[int, float] | None = None  # a change from how many actors, and how fast they were
        self._growing = True
        self._barred: dict[tuple[int, int], tuple[float, float]] = {}  # a change: until when, and for how long

    def interrupt(self) -> None:
        """Training does not go on: what is being measured is measured anew when it does."""
        self._newest = None

    def decide(self, actors: int, reading: Reading) -> int | None:
        """Say how many actors there are to be, None for as many as there are.

        Args:
            actors: how many are wanted until now.
            reading: the newest one, again and again until there is another.
        """
        if not self.lowest <= actors <= self.highest:
            self._trial = None
            return self._change(min(max(actors, self.lowest), self.highest))
        measured = self._measure(reading)
        if measured is None:
            return None
        speed, wait_share = measured
        if self._trial is not None:
            (before, speed_before), self._trial = self._trial, None
            paid = _pays(actors / before, speed / speed_before)
            self._bar(reading.at, *((actors, before) if paid else (before, actors)))  # it need not be tried
            if not paid:
                return self._change(before)
            self._growing = actors > before
        for wanted in self._moves(actors, wait_share):
            if self._barred.get((actors, wanted), (0.0, 0.0))[0] <= reading.at:
                self._trial = (actors, speed)
                return self._change(wanted)
        self._measurement = _Measurement(reading)  # once more
        return None

    def _measure(self, reading: Reading) -> tuple[float, float] | None:
        """Env steps per second, and the part of its time that the learner waited; from one update's end to another's.

        None until enough is known; begins anew when actors come or go, and when another learner goes further back.
        """
        before, self._newest = self._newest, reading
        if before is None or reading.present != before.present or reading.version < before.version:
            self._changed, self._measurement = reading, None
        if self._changed is None:
            self._changed = reading
        if before is None or reading.version == before.version:
            return None
        if self._measurement is None:
            self._measurement = _Measurement(reading) if _lasted(self._changed, reading, SETTLE_S) else None
            return None
        start = self._measurement.start
        self._measurement.add((reading.steps - before.steps) / max(reading.at - before.at, 1e-9))
        steady = self._measurement.error() < STEADY or reading.at - start.at > LONGEST_MEASURE_S
        if not steady or not _lasted(start, reading, MEASURE_S):
            return None
        spent_s = reading.spent_s - start.spent_s
        wait_share = (reading.waited_s - start.waited_s) / spent_s if spent_s > 0 else 0.0
        return (reading.steps - start.steps) / (reading.at - start.at), wait_share

    def _moves(self, actors: int, wait_share: float) -> list[int]:
        """What to try, the best first: a third more or a quarter less, then an eighth, or one."""
        fine = max(1, actors // 8)
        more = [actors + max(1, actors // 3), actors + fine] if wait_share > HUNGRY else []
        less = [actors - max(1, actors // 4), actors - fine] if not FULL <= wait_share <= HUNGRY else []
        moves = more + less if self._growing else less + more
        within = [min(max(wanted, self.lowest), self.highest) for wanted in moves]
        return [wanted for wanted in within if wanted != actors]

    def _change(self, actors: int) -> int:
        self._changed = self._measurement = None
        return actors

    def _bar(self, now: float, before: int, after: int) -> None:
        _, period = self._barred.get((before, after), (0.0, FORGET_S / 2))
        period = min(2 * period, LONGEST_S)
        self._barred[before, after] = (now + period, period)


def parse_range(text: str) -> AutoScale:
    """Read ``MIN:MAX``; raises `UsageError`."""
    lowest, colon, highest = text.partition(":")
    if not colon or not lowest.isdigit() or not highest.isdigit() or not 1 <= int(lowest) <= int(highest) <= 1000:
        raise UsageError(f"auto takes MIN:MAX, two numbers of actors from 1 to 1000, got {text!r}")
    return AutoScale(int(lowest), int(highest))


def _pays(actors: float, speed: float) -> bool:
    """Whether a change is kept that made actors and speed so many times what they were."""
    return speed >= max(CHANCE, 1 + WORTH * (actors - 1)) if actors > 1 else speed >= 1 / CHANCE


def _lasted(start: Reading, end: Reading, seconds: float) -> bool:
    return end.at - start.at >= seconds and end.version - start.version >= UPDATES
