"""How many actors a run is to have, by what the learner waits for: climbs while it pays, and remembers what did not."""

from __future__ import annotations

from dataclasses import dataclass

from rustyrl.errors import UsageError

__all__ = ["AutoScale", "parse_range"]

HUNGRY = 0.25  # a learner that waits more than this part of its time may want more actors
FULL = 0.05  # one that waits less may have too many
WORTH = 1.03  # a change must bring, or may cost, this ratio of speeds
SETTLE_S = 10.0  # for actors to start or leave, before anything is measured
MEASURE_S = 10.0  # what a speed is averaged over
FORGET_S = 300.0  # before what did not pay is tried again; doubled each time that it does not


@dataclass(slots=True)
class _Trial:
    """A change that is being tried: from how many actors, and how fast they were."""

    before: int
    sps: float


class AutoScale:
    """Decides from measurements that it is given; it has no clock and starts nothing."""

    def __init__(self, lowest: int, highest: int) -> None:
        self.lowest = lowest
        self.highest = highest
        self._changed_at: float | None = None
        self._measured: list[float] = []
        self._trial: _Trial | None = None
        self._barred: dict[tuple[int, int], tuple[float, float]] = {}  # a change: until when, and for how long

    def decide(self, now: float, actors: int, wait_share: float | None, sps: float) -> int | None:
        """Say how many actors there are to be, None for as many as there are.

        Args:
            now: seconds of any clock.
            actors: how many there are.
            wait_share: the part of its time that the learner waits for experience, None if it is not known.
            sps: env steps trained per second now.
        """
        if not self.lowest <= actors <= self.highest:
            self._trial = None
            return self._change(now, min(max(actors, self.lowest), self.highest))
        if self._changed_at is None:
            self._changed_at = now
        if wait_share is None or now - self._changed_at < SETTLE_S:
            return None
        self._measured.append(sps)
        if now - self._changed_at < SETTLE_S + MEASURE_S:
            return None
        speed = sum(self._measured) / len(self._measured)
        if self._trial is not None:
            trial, self._trial = self._trial, None
            if not _paid(trial, actors, speed):
                self._bar(now, trial.before, actors)
                return self._change(now, trial.before)
        if wait_share > HUNGRY and actors < self.highest:
            wanted = min(actors + max(1, int(actors * wait_share / 2)), self.highest)
            wanted = actors + 1 if self._is_barred(now, actors, wanted) else wanted
        elif wait_share < FULL and actors > self.lowest:
            wanted = actors - 1
        else:
            wanted = actors
        if wanted == actors or self._is_barred(now, actors, wanted):
            self._measured.clear()
            self._changed_at = now - SETTLE_S  # measure once more
            return None
        self._trial = _Trial(actors, speed)
        return self._change(now, wanted)

    def _change(self, now: float, actors: int) -> int:
        self._changed_at = now
        self._measured.clear()
        return actors

    def _bar(self, now: float, before: int, after: int) -> None:
        _, period = self._barred.get((before, after), (0.0, FORGET_S / 2))
        self._barred[before, after] = (now + 2 * period, 2 * period)

    def _is_barred(self, now: float, before: int, after: int) -> bool:
        until, _ = self._barred.get((before, after), (0.0, 0.0))
        return now < until


def parse_range(text: str) -> AutoScale:
    """Read ``MIN:MAX``; raises `UsageError`."""
    lowest, colon, highest = text.partition(":")
    if not colon or not lowest.isdigit() or not highest.isdigit() or not 1 <= int(lowest) <= int(highest) <= 1000:
        raise UsageError(f"auto takes MIN:MAX, two numbers of actors from 1 to 1000, got {text!r}")
    return AutoScale(int(lowest), int(highest))


def _paid(trial: _Trial, actors: int, speed: float) -> bool:
    """Whether more actors made it faster, or fewer no slower."""
    return speed >= trial.sps * WORTH if actors > trial.before else speed * WORTH >= trial.sps
