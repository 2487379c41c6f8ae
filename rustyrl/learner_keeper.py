"""The learner process of a run, and the one that follows it when it dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from rustyrl.crash import describe_end, write_crash
from rustyrl.processes import Child
from rustyrl.restarts import FROM_OUTSIDE, Restarts

__all__ = ["LearnerDeath", "LearnerKeeper"]

SIGNALED = "signal"  # the reason that a learner gives when it ends because of SIGTERM


@dataclass(frozen=True, slots=True)
class LearnerDeath:
    """A learner that ended before its time.

    cause: in words, with the end of its log
    restart_in_s: None if nothing follows it, because of ``loop``
    record: what is kept of it
    """

    cause: str
    restart_in_s: float | None
    loop: str
    record: Path | None = None


class LearnerKeeper:
    """Starts the learner, keeps what it says of itself, and starts a successor if it dies."""

    def __init__(
        self,
        start: Callable[[int], Child],
        newest_checkpoint: Callable[[], str],
        crashes: Path,
        restarts: int,
        window_s: float,
        incarnation: int,
    ) -> None:
        """Keep the learner of a run.

        Args:
            start: starts a learner process of an incarnation.
            newest_checkpoint: names the one that a successor would begin with, "" if there is none.
            crashes: where records of deaths go.
            restarts: deaths within ``window_s``, or without a new checkpoint, that are followed by another start.
            window_s: see ``restarts``.
            incarnation: of the first learner.
        """
        self._start = start
        self._newest_checkpoint = newest_checkpoint
        self._crashes = crashes
        self._limit = restarts
        self._window_s = window_s
        self._restarts = Restarts(restarts, window_s)
        self._fruitless = 0
        self._checkpoint_then = ""
        self._version_then: int | None = None  # that the present one began with, as far as it is known
        self._restart_at: float | None = None
        self.incarnation = incarnation
        self.child: Child | None = None
        self.peer: bytes | None = None  # on the control socket
        self.listening = False
        self.listened = False  # this one or one before it
        self.ended = ""  # why it says that training is over
        self.said = ""  # what it says that it died of, for a disk that has no room for its log
        self.report: dict[str, Any] = {}
        self.reported_at = 0.0
        self.findings: dict[str, dict[str, Any]] = {}  # by kind, of all incarnations
        self.past: list[dict[str, Any]] = []  # the accounts of earlier incarnations
        self.restarts = 0

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self.child is not None and self.child.running

    @property
    def done(self) -> bool:
        """Whether it says that training is over, and means it."""
        return self.ended not in ("", SIGNALED)

    def start(self) -> None:
        """Start the first, or the next."""
        self._restart_at = None
        if self.child is None:
            self._checkpoint_then = self._newest_checkpoint()
        else:
            self.child.close()
            self.incarnation += 1
        self.peer, self.listening, self.ended, self.said = None, False, "", ""
        self._version_then = None
        first = self.child is None
        self.child = self._start(self.incarnation)
        self.restarts += not first

    def take_report(self, report: dict[str, Any]) -> None:
        """Keep the newest figures."""
        if self._version_then is None:
            self._version_then = report.get("version", 0)
        for finding in report.get("findings", []):
            self.findings.setdefault(finding["kind"], finding)
        self.report = report
        self.reported_at = time.monotonic()

    def turn(self, *, replace: bool) -> LearnerDeath | None:
        """Start a successor that is due; notice an end before its time.

        Args:
            replace: False while the run is being ended.
        """
        now = time.monotonic()
        if self._restart_at is not None and self._restart_at <= now and replace:
            try:
                self.start()
            except OSError as error:
                return self._follow(f"the learner could not be started: {error}", counted=True)
        if self.child is None or self.child.running or self.child.ended_seen:
            return None
        self.child.ended_seen = True
        if not replace:
            return None
        code, tail = self.child.process.returncode, self.child.tail()
        if self.said not in tail:  # the disk may have had room for a part of its log
            tail = f"{tail}\n{self.said}".strip()
        self._close_books()
        what = f"ended with {describe_end(code)}" if self.ended != SIGNALED else "was told to end by SIGTERM"
        record = write_crash(self._crashes, self.child, what, [f"incarnation {self.incarnation}"], tail)
        cause = f"the learner (process {self.child.pid}) {what}{f'; see {record}' if record else ''}\n{tail}"
        grown = self._version_then is not None and self.report.get("version", 0) > self._version_then
        death = self._follow(cause, counted=code not in (0, *FROM_OUTSIDE) or not grown)
        return replace_fields(death, record=record)

    def _follow(self, cause: str, *, counted: bool) -> LearnerDeath:
        """Decide whether another follows, and when."""
        checkpoint = self._newest_checkpoint()
        self._fruitless = self._fruitless + 1 if checkpoint == self._checkpoint_then else 0
        self._checkpoint_then = checkpoint
        pause = self._restarts.died(time.monotonic()) if counted else Restarts(1, 1.0).died(0.0)
        loop = ""
        if pause is None:
            loop = f"the learner died {self._limit + 1} times within {self._window_s:.0f} s"
        elif self._fruitless > self._limit:
            loop = f"the learner died without coming to another checkpoint, for the {self._fruitless}. time"
        if loop:
            return LearnerDeath(cause, None, loop)
        assert pause is not None  # noqa: S101 - else it is a loop
        self._restart_at = time.monotonic() + pause
        return LearnerDeath(cause, pause, "")

    def _close_books(self) -> None:
        """Keep the account of who died: what was outstanding is lost. It knows no actor any more."""
        tickets = self.report.get("tickets")
        if tickets and self.report.get("incarnation") == self.incarnation:
            closed = {**tickets, "lost": tickets["lost"] + tickets["outstanding"], "outstanding": 0}
            version = self.report.get("version", 0)
            self.past.append({"incarnation": self.incarnation, "version": version, "tickets": closed})
        empty = {"issued": 0, "trained": 0, "rejected": {}, "lost": 0, "outstanding": 0}
        self.report = {**self.report, "actors": [], "tickets": empty}
