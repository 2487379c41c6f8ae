"""What a person, a pipe or nobody sees while a run goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rustyrl.figures import EPISODE_FIGURES

__all__ = ["LiveProgress", "PlainProgress", "Progress", "View", "make_progress"]

PLAIN_EVERY_S, PLAIN_SHARE = 2.0, 0.02  # the latter of the time since the start


@dataclass(frozen=True, slots=True)
class View:
    """What there is to show of a run at one moment."""

    env: str
    state: str
    run: str
    seconds: float
    left: str
    learner: dict[str, Any]
    actors_alive: int
    actors_started: int
    evaluation: dict[str, Any] | None


class Progress(Protocol):
    """Shows views and messages."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, view: View) -> None:
        """Show how things stand."""
        ...

    def say(self, message: str) -> None:
        """Say something that stays on screen."""
        ...


class LiveProgress:
    """A display that is redrawn in place, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, view: View) -> None:
        """Redraw."""
        table = Table.grid(padding=(0, 2))
        for name, value in _cells(view):
            table.add_row(Text(name, style="dim"), value)
        title = Text.assemble((f"rustyrl {view.env}", "bold"), f"  {view.state}  {_clock(view.seconds)}")
        self._live.update(Group(title, table, Text(view.run, style="dim")))

    def say(self, message: str) -> None:
        """Print above the display."""
        self._console.print(escape(message), highlight=False)


class PlainProgress:
    """A line every two seconds, for pipes and logs; later on less often, as nobody watches for hours."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, view: View) -> None:
        """Print a line, if the last is old enough."""
        now = time.monotonic()
        if now - self._last < max(PLAIN_EVERY_S, (now - self._started) * PLAIN_SHARE):
            return
        self._last = now
        self.say(
            f"{_clock(view.seconds)} {view.state}: " + ", ".join(f"{name} {value}" for name, value in _cells(view))
        )

    def say(self, message: str) -> None:
        """Print."""
        self._console.print(escape(message), highlight=False, soft_wrap=True)


def make_progress(*, to_stderr: bool) -> Progress:
    """The display that fits where the output goes."""
    console = Console(emoji=False, stderr=to_stderr)
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else PlainProgress(console)


def _cells(view: View) -> list[tuple[str, str]]:
    training = view.learner.get("training", {})
    cells = [
        ("steps", f"{view.learner.get('steps', 0):,}"),
        ("trained SPS", f"{view.learner.get('trained_sps', 0.0):,.0f}"),
        ("policy version", str(view.learner.get("version", 0))),
        ("actors", f"{view.actors_alive}/{view.actors_started}"),
    ]
    for name in ("return_mean", "success_rate", "crash_rate", "length_mean"):
        if name in training:
            cells.append((f"training {name.replace('_', ' ')}", f"{training[name]:.4g}"))
    if view.evaluation is not None:
        unshown = {"episodes", *EPISODE_FIGURES} - {"return_mean"}
        shown = [(k, v) for k, v in view.evaluation.items() if k not in unshown]
        cells.append(("last evaluation", ", ".join(f"{k} {v:.4g}" for k, v in shown if v is not None)))
    cells.append(("left", view.left))
    return cells


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:d}:{rest:02d}"
