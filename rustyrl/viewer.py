"""What ``rustyrl top`` shows of a run, and what the keys that are pressed there mean."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.text import Text

from rustyrl.actor_rows import ORDERS, sort_rows
from rustyrl.errors import UsageError
from rustyrl.remote import Remote
from rustyrl.run_folder import find_run, is_live, list_runs
from rustyrl.screen import Aspect, draw
from rustyrl.units import span

__all__ = ["Viewer"]

LATE_S = 2.0  # after so long it is said that the launcher does not answer
SAID_S = 8.0  # for so long an answer stays in the last line
RUNS_EVERY_S = 3.0
PAGE = 10
KEYS = " + - scale  p pause  c checkpoint  r relieve  s stop  o order  q quit  ? help"
HELP = """
  + -          one actor more, one less
  p            pause, and go on after a pause
  c            write a checkpoint
  r            relieve the actor that holds the batch: others get its worlds
  s            stop the run after a last checkpoint; asks first

  tab n        the next of the runs that go on below ./runs
  up down      scroll the actors; page up, page down, home, end
  o            their order: index, held, SPS, CPU, memory, seen
  q Ctrl-C     leave; the run goes on

  A batch is trained once all of its tickets are answered. An actor "holds
  batch" if the others wait for it most of the time; "waited" is the part of
  the last seconds in which they did, "owes" how long its oldest ticket is out,
  "seen" when it last gave a sign of life, "died" how often it was replaced.
  "open" are tickets that are not trained on yet, "waits" is the part of its
  time in which the learner has no batch, "lag" how many versions experience,
  or an actor, is behind.
"""


class Viewer:
    """What is shown and what was pressed; draws on nothing and reads no keys itself."""

    def __init__(self, path: Path, every_s: float) -> None:
        self._every_s = every_s
        self._live = [path]
        self._listed_at = 0.0
        self._scroll = 0
        self._order = "index"
        self._asking = False  # whether the run is really to be stopped
        self._help = False
        self.left = False
        self.remote = self._connect(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remote.close()

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return not is_live(self.remote.path)

    def press(self, key: str) -> None:
        """Do what a key means."""
        if self._asking:
            self._asking = False
            if key in ("y", "Y"):
                self.remote.order({"kind": "stop"})
            return
        if self._help:
            self._help = False
            return
        match key:
            case "q" | "Q" | "\x03":
                self.left = True
            case "?" | "h":
                self._help = True
            case "s":
                self._asking = True
            case "o":
                names = list(ORDERS)
                self._order = names[(names.index(self._order) + 1) % len(names)]
            case "tab" | "n":
                self._next_run()
            case "up" | "down" | "page up" | "page down" | "home" | "end":
                self._move(key)
            case "+" | "=" | "-" | "p" | "c" | "r":
                self._order_launcher(key)

    def lines(self, width: int, height: int) -> list[Text]:
        """The screen."""
        remote = self.remote
        if self._help:
            shown = [Text(line) for line in HELP.strip("\n").splitlines()]
            return [Text.assemble(("rustyrl top", "bold"), "   any key goes back"), Text(), *shown][:height]
        late = ""
        if remote.silent_s > LATE_S:
            late = f"the launcher (process {remote.cluster.pid}) has not answered for {span(remote.silent_s)}"
        if remote.status is None:
            return [Text(late or f"asking the launcher of {remote.path} how the run stands", "bold yellow")]
        place = ""
        if len(self._live) > 1:
            number = self._live.index(remote.path) + 1 if remote.path in self._live else 1
            place = f"{number} of {len(self._live)}, tab: next"
        aspect = Aspect(self._scroll, self._order, place, late, self._footer())
        return draw(remote.status, width, height, aspect)

    def list_runs(self) -> None:
        """Look from time to time which runs go on."""
        if time.monotonic() - self._listed_at < RUNS_EVERY_S:
            return
        self._listed_at = time.monotonic()
        live = [Path(row["run"]) for row in list_runs() if row["live"]]
        here = self.remote.path.resolve()
        self._live = live if any(path.resolve() == here for path in live) else [self.remote.path, *live]

    def _footer(self) -> Text:
        if self._asking:
            return Text(" stop the run after a last checkpoint? y: yes, any other key: no", "reverse bold")
        if self.remote.said and time.monotonic() - self.remote.said_at < SAID_S:
            return Text(f" {self.remote.said}", "bold")
        return Text(KEYS, "dim")

    def _move(self, key: str) -> None:
        status = self.remote.status
        last = len(sort_rows(status, self._order)) - 1 if status else 0
        steps = {"up": -1, "down": 1, "page up": -PAGE, "page down": PAGE, "home": -last, "end": last}
        self._scroll = max(0, min(last, self._scroll + steps[key]))

    def _order_launcher(self, key: str) -> None:
        status = self.remote.status or {"state": "", "held_by": []}
        if key == "r" and not status["held_by"]:
            self.remote.say("relieve: nobody holds the batch now; rustyrl scale --relieve N relieves any")
            return
        match key:
            case "p":
                self.remote.order({"kind": "unpause" if status["state"] == "paused" else "pause"})
            case "c":
                self.remote.order({"kind": "checkpoint"})
            case "r":
                self.remote.order({"kind": "relieve", "index": status["held_by"][0]})
            case _:
                self.remote.order({"kind": "scale", "actors": "-1" if key == "-" else "+1", "now": False})

    def _next_run(self) -> None:
        self._listed_at = 0.0
        self.list_runs()
        here = self.remote.path.resolve()
        paths = [path.resolve() for path in self._live]
        following = self._live[(paths.index(here) + 1) % len(paths)]
        if following.resolve() == here:
            self.remote.say("next run: no other run goes on below ./runs")
            return
        with contextlib.suppress(UsageError):  # it has ended this moment
            remote = self._connect(following)
            self.remote.close()
            self.remote, self._scroll = remote, 0

    def _connect(self, path: Path) -> Remote:
        path, cluster = find_run(path, live=True)
        return Remote(path, cluster, self._every_s)
