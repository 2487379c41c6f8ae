"""The table of actors on the screen: who they are, how fast, how far behind, and what is special about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from rustyrl.panels import is_down
from rustyrl.units import count, percent, short, size, span

__all__ = ["ORDERS", "actor_lines", "notes", "sort_rows"]

SILENT_S = 3.0  # a second is usual: who has nothing to do says once a second that it lives
NOTE_WIDTH = 12  # which the last column is to have at least
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading, its width, what it shows; the less its ``rank``, the longer it stays."""

    heading: str
    width: int
    rank: int
    show: Callable[[Row], str]
    left: bool = False


COLUMNS = (
    Column("actor", 5, 0, lambda row: str(row["index"])),
    Column("host", 14, 10, lambda row: row.get("host", "-"), left=True),
    Column("process", 7, 6, lambda row: str(row["pid"] or "-")),
    Column("worlds", 6, 4, lambda row: count(row.get("worlds"))),
    Column("SPS", 6, 1, lambda row: short(row.get("sps"))),
    Column("version", 9, 9, lambda row: count(row["version"]) if row.get("version", -1) >= 0 else "-"),
    Column("lag", 3, 2, lambda row: count(row.get("lag"))),
    Column("owes", 6, 11, lambda row: span(row["owes_s"]) if row.get("owes_s") else "-"),
    Column("waited", 6, 12, lambda row: percent(row.get("held_share"))),
    Column("rollouts", 10, 13, lambda row: count(row.get("rollouts"))),
    Column("CPU", 5, 5, lambda row: "-" if row.get("cpu_percent") is None else f"{row['cpu_percent']:.0f} %"),
    Column("memory", 8, 7, lambda row: size(row.get("memory_bytes"))),
    Column("threads", 7, 14, lambda row: count(row.get("threads"))),
    Column("seen", 5, 3, lambda row: _ago(row.get("silent_s"))),
    Column("died", 4, 8, lambda row: count(row["restarts"])),
)
ORDERS: dict[str, Callable[[Row], Any]] = {
    "index": lambda row: row["index"],
    "held": lambda row: (-row.get("held_share", -1.0), -row.get("owes_s", 0.0)),
    "SPS": lambda row: row.get("sps", -1.0),
    "CPU": lambda row: -(row.get("cpu_percent") or 0.0),
    "memory": lambda row: -(row.get("memory_bytes") or 0),
    "seen": lambda row: -row.get("silent_s", 1e9),
}


def actor_lines(status: dict[str, Any], width: int, room: int | None, scroll: int, order: str) -> list[Text]:
    """A heading and a line for each actor, as many as there is ``room`` for, and how many more there are."""
    rows = sort_rows(status, order)
    if not rows:
        return [Text("no actors: they start, or rustyrl scale N starts some", "dim")]
    hosts = {row["host"] for row in status["actors"]}
    columns = _choose(width, first=("host",) if len(hosts) > 1 else ())
    heading = Text("  ".join(_fit(column, column.heading) for column in columns), "dim")
    shown = rows
    if room is not None and len(rows) > room - 1:
        kept = max(1, room - 2)
        scroll = max(0, min(scroll, len(rows) - kept))
        shown = rows[scroll : scroll + kept]
    lines = [heading, *(_line(row, columns, status, stale=is_down(status)) for row in shown)]
    if len(shown) < len(rows):
        below = len(rows) - scroll - len(shown)
        parts = [f"{scroll} above"] * bool(scroll) + [f"{below} more"] * bool(below)
        lines.append(Text(f"… {', '.join(parts)}", "dim"))
    return lines


def sort_rows(status: dict[str, Any], order: str) -> list[Row]:
    """The actors, those that the learner does not know (yet) among them."""
    rows = [*status["actors"], *status["actors_absent"]]
    return sorted(sorted(rows, key=ORDERS["index"]), key=ORDERS[order])


def notes(row: Row, held_by: list[int]) -> list[tuple[str, str]]:
    """What is special about an actor, and the style to say it in."""
    if "host" not in row:
        if row["restart_in_s"] is not None:
            return [(f"again in {math.ceil(row['restart_in_s'])} s", "red")]
        return [("leaving" if row["leaving"] else "starting" if row["pid"] else "gone", "yellow")]
    found = []
    if row["index"] in held_by:
        found.append(("holds batch", "bold yellow"))
    if not row["ready"]:
        found.append(("starting", "yellow"))
    if row["silent_s"] > SILENT_S:
        found.append(("silent", "yellow"))
    if row["leaving"]:
        found.append(("leaving", "yellow"))
    if row["relieved"]:
        found.append(("relieved", "yellow"))
    elif row["ready"] and not row["worlds"] and not row["leaving"]:
        found.append(("idle", "dim"))
    if not row["started"]:
        found.append(("joined by hand", "dim"))
    return found


def _choose(width: int, first: tuple[str, ...]) -> list[Column]:
    """The columns that fit, those of the lowest rank first."""
    left, chosen = width - NOTE_WIDTH, []
    for column in sorted(COLUMNS, key=lambda column: -1 if column.heading in first else column.rank):
        if column.width + 2 > left:
            break
        left -= column.width + 2
        chosen.append(column)
    return [column for column in COLUMNS if column in chosen]


def _line(row: Row, columns: list[Column], status: dict[str, Any], *, stale: bool) -> Text:
    found = notes(row, status["held_by"])
    style = "dim" if stale or row.get("relieved") else ""
    line = Text("  ".join(_fit(column, column.show(row)) for column in columns), style)
    for place, (note, note_style) in enumerate(found):
        line.append(", " if place else "  ")
        line.append(note, note_style)
    return line


def _ago(seconds: float | None) -> str:
    """When a sign of life came last."""
    return "now" if seconds is not None and seconds < 1 else span(seconds)


def _fit(column: Column, value: str) -> str:
    if len(value) > column.width:
        value = value[: column.width - 1] + "…"
    return value.ljust(column.width) if column.left else value.rjust(column.width)
