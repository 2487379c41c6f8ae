"""The actor processes of this machine: as many as are wanted, and a new one for each that dies or stands still."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rustyrl.black_box import BlackBox
from rustyrl.crash import describe_deed, describe_end, write_crash
from rustyrl.errors import ContractError
from rustyrl.processes import Child
from rustyrl.restarts import FROM_OUTSIDE, Restarts

__all__ = ["Berth", "Death", "Supervisor"]

LAST_WORDS_S = 0.3  # for a stuck actor to print where it is, before it is killed


@dataclass(slots=True)
class Berth:
    """An actor index, the process that has it, and how it fared.

    replaced: how often another process took its place
    restart_at: when the next process is due, None if none is
    heard_at: when the learner heard it last, or it was given the time to come
    known: whether the present learner has heard it
    silent_at: when it was found to be silent for too long, None if it is not
    """

    index: int
    restarts: Restarts
    child: Child | None = None
    leaving: bool = False
    replaced: int = 0
    restart_at: float | None = None
    heard_at: float = 0.0
    known: bool = False
    silent_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self.child is not None and self.child.running


@dataclass(frozen=True, slots=True)
class Death:
    """An actor process that ended, or could not be started, and what follows.

    cause: in words, with the end of its log
    expected: it was asked to leave, or ended well
    restart_in_s: None if it is not replaced
    loop: what died too often to go on, "" if nothing did
    """

    index: int
    child: Child | None
    cause: str
    expected: bool
    restart_in_s: float | None
    loop: str
    record: Path | None


class Supervisor:
    """Starts actors, counts who is there, replaces who died or is stuck, and sends away who is too many."""

    def __init__(
        self,
        start: Callable[[int], Child],
        crashes: Path,
        restarts: int,
        window_s: float,
        lease_s: float = 60.0,
        start_s: float = 60.0,
        seed: int = 0,
    ) -> None:
        self._start = start
        self._crashes = crashes
        self._limit = restarts
        self._window_s = window_s
        self._lease_s = lease_s
        self._start_s = max(start_s, lease_s)
        self._seed = seed
        self._failed: list[Death] = []  # starts, since the last turn
        self._worlds: dict[int, Restarts] = {}  # deaths with this world in hand, whoever had it
        self.wanted = 0
        self.berths: list[Berth] = []

    @property
    def children(self) -> list[Child]:
        """Every process that was started and not yet given back."""
        return [berth.child for berth in self.berths if berth.child is not None]

    @property
    def any_running(self) -> bool:
        """Whether an actor runs, or is to be started again."""
        return any(berth.running or berth.restart_at is not None for berth in self.berths)

    def scale(self, wanted: int, retire: Callable[[Child], None]) -> None:
        """Have so many actors: ``retire`` the highest indices that are too many; start what is missing."""
        self.wanted = wanted
        staying = [berth for berth in self.berths if not berth.leaving]
        for berth in sorted(staying, key=lambda berth: berth.index)[wanted:]:
            berth.leaving = True
            berth.restart_at = None
            if berth.child is not None and berth.running:
                retire(berth.child)
        taken = {berth.index for berth in self.berths}
        free = (index for index in range(wanted + len(taken)) if index not in taken)
        for _ in range(wanted - len(staying)):
            berth = Berth(next(free), Restarts(self._limit, self._window_s))
            self.berths.append(berth)
            self._failed += self._fill(berth, time.monotonic())

    def hear(self, present: set[int], silent: set[int]) -> None:
        """Take in which incarnations the learner hears (``present``), and which it gave up because it did not.

        Who is ``silent``, or has not come to the learner in the time that starting may take, is stuck or stopped, and
        ended.
        """
        now = time.monotonic()
        for berth in self.berths:
            if berth.child is None or berth.silent_at is not None:
                continue
            if berth.child.incarnation in present:
                berth.heard_at, berth.known = now, True
            limit_s = self._lease_s if berth.known else self._start_s  # imports take the time that they take
            if berth.child.incarnation in silent or now - berth.heard_at > limit_s:
                berth.silent_at = now
                if hasattr(signal, "SIGUSR1"):
                    berth.child.signal(signal.SIGUSR1)  # have it print where it is; a stopped one cannot

    def await_hello(self) -> None:
        """There is another learner, and everybody has the time of a start to come to it."""
        for berth in self.berths:
            berth.heard_at, berth.known = time.monotonic(), False

    def turn(self, *, replace: bool) -> list[Death]:
        """Start who is due, notice who ended since the last turn, and end who is stuck.

        Args:
            replace: False while the run is being ended.
        """
        now = time.monotonic()
        deaths, self._failed = self._failed, []
        for berth in self.berths:
            child = berth.child
            if child is not None and not child.running and not child.ended_seen:
                child.ended_seen = True
                deaths.append(self._bury(berth, child, now, replace))
            elif berth.restart_at is not None and berth.restart_at <= now and replace:
                deaths += self._fill(berth, now)
            elif child is not None and berth.silent_at is not None and now - berth.silent_at > LAST_WORDS_S:
                child.kill()
        gone = [b for b in self.berths if b.leaving and (b.child is None or b.child.ended_seen)]  # and was reported
        for berth in gone:
            if berth.child is not None:
                berth.child.close()
            self.berths.remove(berth)
        return deaths

    def _fill(self, berth: Berth, now: float) -> list[Death]:
        """Start the process of a berth."""
        berth.restart_at = None
        try:
            child = self._start(berth.index)
        except OSError as error:  # out of processes, descriptors or memory
            cause = f"actor {berth.index} could not be started: {error}"
            pause = berth.restarts.died(now)
            if pause is None:
                return [Death(berth.index, None, cause, False, None, f"actor {berth.index}", None)]
            berth.restart_at = now + pause
            return [Death(berth.index, None, cause, False, pause, "", None)]
        if berth.child is not None:
            berth.child.close()
            berth.replaced += 1
        berth.child, berth.heard_at, berth.known, berth.silent_at = child, now, False, None
        return []

    def _bury(self, berth: Berth, child: Child, now: float, replace: bool) -> Death:
        code, tail, box = child.process.returncode, child.tail(), child.black_box
        silent = berth.silent_at is not None
        sent_home = code == 0 and (box is None or box.deed().idle)  # else a world ended the process
        expected = berth.leaving or sent_home
        pause: float | None = None
        loop = ""
        if not expected and code != ContractError.exit_code and replace:  # with that, no other actor could go on
            if code in FROM_OUTSIDE and not silent and box is not None and box.answered:  # it was well until then
                pause = Restarts(1, 1.0).died(now)
            else:
                pause, loop = self._count(berth, box, now)
        if pause is not None:
            berth.restart_at = now + pause
        what = f"ended with {describe_end(code)}"
        if silent:
            what = f"was killed: it had given no sign of life for {self._lease_s:.0f} s"
        lines = describe_deed(box, self._seed)
        record = None if expected else write_crash(self._crashes, child, what, lines, tail)
        cause = "\n".join([f"{child.name} (process {child.pid}) {what}", *lines[:1], tail])
        return Death(berth.index, child, cause, expected, pause, loop, record)

    def _count(self, berth: Berth, box: BlackBox | None, now: float) -> tuple[float | None, str]:
        """Count a death against its index and its world: the pause before the next, and what died too often."""
        standstill_s = self._lease_s if berth.silent_at is not None else 0.0
        pause = berth.restarts.died(now, standstill_s)
        deed = box.deed() if box is not None else None
        if pause is None:
            return None, f"actor {berth.index}"
        if deed is not None and not deed.idle:
            world = self._worlds.setdefault(deed.world, Restarts(self._limit, self._window_s))
            if world.died(now, standstill_s) is None:
                return None, f"the actor that had world {deed.world}"
        return pause, ""
