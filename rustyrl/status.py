"""How a cluster stands: everything that `status`, `top`, the exporter and the progress display show."""

from __future__ import annotations

import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from rustyrl.config import Config
from rustyrl.holdups import HoldUps
from rustyrl.judge import Judge
from rustyrl.learner_keeper import LearnerKeeper
from rustyrl.progress import View
from rustyrl.rates import Rates
from rustyrl.spec import EnvironmentSpec
from rustyrl.summary import bottleneck, stage_shares
from rustyrl.supervisor import Berth, Death, Supervisor
from rustyrl.usage import UNKNOWN, Usage

__all__ = ["StatusBoard"]

CURVE_POINTS = 240  # of the learning curve; older ones are thinned out
LISTED_APART = {"kind", "actors", "tickets", "gpu", "silent", "worlds_moved", "worlds_restarted"}
LISTED_APART |= {"recent", "received_bytes", "sent_bytes", "refused_messages", "refused_handshakes"}
CRASHES_SHOWN = 5


class StatusBoard:
    """Gathers what the parts of a launcher know."""

    def __init__(
        self,
        run: Path,
        config: Config,
        spec: EnvironmentSpec,
        learner: LearnerKeeper,
        supervisor: Supervisor,
        judge: Judge,
        before_s: float = 0.0,
    ) -> None:
        """Begin to gather.

        Args:
            run: the run folder.
            config: of the run.
            spec: what is trained.
            learner: and its report.
            supervisor: of the actors of this machine.
            judge: of versions.
            before_s: that a resumed run had taken by its checkpoint.
        """
        self._run = run
        self._config = config
        self._spec = spec
        self._learner = learner
        self._supervisor = supervisor
        self._judge = judge
        self._usage = Usage()
        self._host = socket.gethostname()
        self._started = time.monotonic() - before_s
        self._rates = Rates()
        self._holdups = HoldUps()
        self._curve: list[tuple[int, float]] = []
        self._every = 1  # of so many points one is kept
        self._skipped = 0
        self._crashes: deque[dict[str, Any]] = deque(maxlen=CRASHES_SHOWN)
        self.actor_restarts = 0
        self.prometheus = ""  # where its endpoint is
        self.link = {"address": "", "security": ""}  # where actors of this machine join, and what protects that

    @property
    def seconds(self) -> float:
        """That the run has taken; of a resumed one the time up to its checkpoint is a part."""
        return time.monotonic() - self._started

    def take_report(self, report: dict[str, Any]) -> None:
        """Take in what the learner says of itself."""
        now = time.monotonic()
        self._rates.take(report, now)
        self._holdups.take(report, now)
        self._take_point(report)

    def take_crash(self, what: str, record: Path | None) -> None:
        """Remember that a process died."""
        first = what.splitlines()[0] if what else ""
        first = first.removesuffix(f"; see {record}")
        self._crashes.append({"what": first, "record": str(record or ""), "at_s": round(self.seconds, 1)})

    def take_death(self, death: Death) -> None:
        """Remember that an actor died."""
        if death.expected:
            return
        self.actor_restarts += death.restart_in_s is not None
        self.take_crash(death.cause, death.record)

    def status(self, state: str, auto: dict[str, Any] | None) -> dict[str, Any]:
        """What ``rustyrl status --json`` prints; docs/status.md names every field."""
        report, supervisor = self._learner.report, self._supervisor
        rows = report.get("actors", [])
        berths = {berth.child.incarnation: berth for berth in supervisor.berths if berth.child is not None}
        local = [row["pid"] for row in rows if row["host"] == self._host]
        self._usage.look([*local, *([] if self._learner.child is None else [self._learner.child.pid])])
        actors = [self._describe_actor(row, berths.get(row["incarnation"]), report) for row in rows]
        present = {row["incarnation"] for row in rows}
        absent = [b for b in supervisor.berths if b.child is None or b.child.incarnation not in present]
        return {
            "run": str(self._run),
            "env": self._spec.env,
            "state": state,
            "seconds": round(self.seconds, 3),
            "limits": {"steps": self._config.run.total_steps, "seconds": self._config.run.max_seconds},
            "learner": self._describe_learner(report),
            "actors": actors,
            "actors_absent": [describe_absent(berth) for berth in absent],
            "bottleneck": bottleneck(report, self._config) if state == "running" else "",
            "stage_shares": stage_shares(report.get("recent", {})),
            "held_by": self._holdups.holders(actors, self.wait_share() if state == "running" else None),
            "actors_started": len(supervisor.berths),
            "actors_alive": sum(berth.running for berth in supervisor.berths),
            "actors_wanted": supervisor.wanted,
            "actor_restarts": self.actor_restarts,
            "auto": auto,
            "worlds": self._config.batch.worlds,
            "worlds_moved": report.get("worlds_moved", 0),
            "worlds_restarted": report.get("worlds_restarted", 0),
            "tickets": report.get("tickets", {}),
            "tickets_before": self._learner.past,
            "wire": {
                "received_bytes": report.get("received_bytes", 0),
                "sent_bytes": report.get("sent_bytes", 0),
                "received_bytes_s": self._rates.per_s("received_bytes"),
                "sent_bytes_s": self._rates.per_s("sent_bytes"),
                "refused_messages": report.get("refused_messages", {}),
                "refused_handshakes": report.get("refused_handshakes", 0),
            },
            "link": self.link,
            "machine": self._usage.machine(),
            "gpu": report.get("gpu"),
            "curve": self._curve,
            "crashes": list(self._crashes),
            "eval": self._judge.evaluation,
            "prometheus": self.prometheus,
            "goal": [str(condition) for condition in self._judge.goal],
        }

    def view(self, state: str) -> View:
        """What the progress display shows."""
        report = self._learner.report
        ready = sum(1 for actor in report.get("actors", []) if actor["ready"])
        return View(
            env=self._spec.env,
            state=state,
            run=str(self._run),
            seconds=self.seconds,
            left=self._left(),
            learner=report,
            actors_alive=ready,
            actors_started=max(ready, self._supervisor.wanted),
            evaluation=self._judge.evaluation,
        )

    def wait_share(self) -> float | None:
        """The part of the recent time that the learner waited for experience; None if too little is known."""
        return self._rates.wait_share()

    def sps(self) -> float:
        """Trained env steps per second, recently."""
        return self._rates.per_s("steps")

    def _describe_learner(self, report: dict[str, Any]) -> dict[str, Any]:
        keeper = self._learner
        known = {k: v for k, v in report.items() if k not in LISTED_APART}
        pid = keeper.child.pid if keeper.child is not None else None
        wait = self.wait_share()
        return {
            **known,
            "pid": pid,
            "running": keeper.running,
            "incarnation": keeper.incarnation,
            "restarts": keeper.restarts,
            "findings": list(keeper.findings.values()),
            "sps": self.sps(),
            "wait_share": None if wait is None else round(wait, 4),
            "silent_s": round(time.monotonic() - keeper.reported_at, 3) if keeper.reported_at else None,
            **(self._usage.of(pid) if pid is not None else {}),
        }

    def _describe_actor(self, row: dict[str, Any], berth: Berth | None, report: dict[str, Any]) -> dict[str, Any]:
        held = round(self._holdups.share(row["incarnation"]), 3)
        return {
            **row,
            "sps": self._rates.actor_sps(row),
            "mean_sps": row["sps"],
            "held_share": held,
            "lag": report["version"] - row["version"] if row["version"] >= 0 else None,
            "started": berth is not None,
            "leaving": berth is not None and berth.leaving,
            "restarts": berth.replaced if berth is not None else 0,
            **(self._usage.of(row["pid"]) if row["host"] == self._host else UNKNOWN),
        }

    def _take_point(self, report: dict[str, Any]) -> None:
        """Go on with the learning curve; every second point goes when there are too many."""
        mean = report.get("training", {}).get("return_mean")
        if mean is None:
            return
        while self._curve and self._curve[-1][0] > report["steps"]:  # a learner that began further back
            self._curve.pop()
        if self._curve and self._curve[-1][0] == report["steps"]:
            return
        self._skipped += 1
        if self._skipped >= self._every:
            self._skipped = 0
            self._curve.append((report["steps"], mean))
        if len(self._curve) > CURVE_POINTS:
            self._curve = self._curve[::2]
            self._every *= 2

    def _left(self) -> str:
        run, report, estimates = self._config.run, self._learner.report, []
        if run.max_seconds:
            estimates.append(run.max_seconds - self.seconds)
        if run.total_steps and (sps := report.get("trained_sps")):
            estimates.append((run.total_steps - report.get("steps", 0)) / sps)
        if estimates:
            return f"{max(0.0, min(estimates)):.0f} s"
        if run.total_steps:
            return f"{run.total_steps - report.get('steps', 0):,} steps"
        return "until " + (" and ".join(str(condition) for condition in self._judge.goal) or "stopped")


def describe_absent(berth: Berth) -> dict[str, Any]:
    """An actor that the learner does not know: one that starts, or will be started again."""
    wait = None if berth.restart_at is None else round(max(0.0, berth.restart_at - time.monotonic()), 3)
    running = berth.child if berth.running else None
    return {
        "index": berth.index,
        "pid": None if running is None else running.pid,
        "restarts": berth.replaced,
        "restart_in_s": wait,
        "leaving": berth.leaving,
    }
