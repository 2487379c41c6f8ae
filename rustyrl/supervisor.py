"""The actor processes of this machine: as many as are wanted, and a new one for each that dies."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rustyrl.errors import ContractError
from rustyrl.processes import Child

__all__ = ["Berth", "Death", "Supervisor"]

FIRST_PAUSE_S = 0.25  # before the first restart; doubled with each that follows within the window
LONGEST_PAUSE_S = 2.0
EXPLAINED = (0, ContractError.exit_code)  # sent home, or a world that no other actor could go on with: not replaced


@dataclass(slots=True)
class Berth:
    """An actor index, the process that has it, and how it fared.

    deaths: monotonic times of those within the window; restart_at: when the next process is due, None if none is
    """

    index: int
    child: Child | None = None
    leaving: bool = False
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)
    restart_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self.child is not None and self.child.running


@dataclass(frozen=True, slots=True)
class Death:
    """An actor process that ended, and what follows.

    expected: it was asked to leave; restart_in_s: None if it is not replaced; loop: it died too often to go on
    """

    index: int
    pid: int
    code: int
    tail: str
    expected: bool
    restart_in_s: float | None
    loop: bool
    record: Path | None


class Supervisor:
    """Starts actors, counts who is there, replaces who died, and sends away who is too many."""

    def __init__(self, start: Callable[[int], Child], crashes: Path, restarts: int, window_s: float) -> None:
        self._start = start
        self._crashes = crashes
        self._restarts = restarts
        self._window_s = window_s
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
        """Have so many actors: start what is missing now, ``retire`` the highest indices that are too many."""
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
            index = next(free)
            self.berths.append(Berth(index, self._start(index)))

    def turn(self, *, replace: bool) -> list[Death]:
        """Notice who ended since the last turn, and start whose pause is over.

        Args:
            replace: False while the run is being ended.
        """
        now = time.monotonic()
        deaths = []
        for berth in self.berths:
            child = berth.child
            if child is not None and not child.running and not child.ended_seen:
                child.ended_seen = True
                deaths.append(self._bury(berth, child, now, replace))
            elif berth.restart_at is not None and berth.restart_at <= now and replace:
                if child is not None:
                    child.close()
                berth.restart_at = None
                berth.restarts += 1
                berth.child = self._start(berth.index)
        gone = [b for b in self.berths if b.leaving and (b.child is None or b.child.ended_seen)]  # and was reported
        for berth in gone:
            if berth.child is not None:
                berth.child.close()
            self.berths.remove(berth)
        return deaths

    def _bury(self, berth: Berth, child: Child, now: float, replace: bool) -> Death:
        code, tail = child.process.returncode, child.tail()
        pause: float | None = None
        loop = False
        if not berth.leaving and code not in EXPLAINED and replace:
            berth.deaths.append(now)
            while berth.deaths and berth.deaths[0] < now - self._window_s:
                berth.deaths.popleft()
            loop = len(berth.deaths) > self._restarts
            if not loop:
                pause = min(FIRST_PAUSE_S * 2 ** (len(berth.deaths) - 1), LONGEST_PAUSE_S)
                berth.restart_at = now + pause
        record = self._write_crash(berth, child, code, tail) if code and not berth.leaving else None
        return Death(berth.index, child.pid, code, tail, berth.leaving, pause, loop, record)

    def _write_crash(self, berth: Berth, child: Child, code: int, tail: str) -> Path:
        """Keep what is known of a death: the log of an actor goes on with its successor."""
        self._crashes.mkdir(parents=True, exist_ok=True)
        names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
        how = f"signal {-code} ({names.get(-code, 'unnamed')})" if code < 0 else f"code {code}"
        path = self._crashes / f"actor-{berth.index}-{time.strftime('%Y%m%d-%H%M%S')}-{child.pid}.txt"
        path.write_text(f"actor {berth.index}, process {child.pid}, ended with {how}\n\n{tail}\n", encoding="utf-8")
        return path
