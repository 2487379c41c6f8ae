"""``rustyrl top``: a running cluster on the whole screen, with keys to steer it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.control import Control
from rich.screen import Screen
from rich.text import Text

from rustyrl.interrupts import Interrupts
from rustyrl.keyboard import Keyboard
from rustyrl.run_folder import read_cluster
from rustyrl.screen import spell
from rustyrl.units import clock, count
from rustyrl.viewer import Viewer

__all__ = ["describe_end", "top"]

KEY_WAIT_S = 0.05  # the longest wait for a key: the launcher's answers are looked for so often
REDRAW_S = 1.0  # without news; for ages


def top(path: Path, every_s: float, console: Console) -> str:
    """Show a run until it is over, the user leaves or a signal comes; returns what to say at the end.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        SystemExit: a signal to end.
    """
    with Interrupts() as interrupts, Viewer(path, every_s) as shown:
        with Keyboard() as keyboard, console.screen():
            with contextlib.suppress(EOFError):
                _show(shown, keyboard, console, interrupts)
        said = describe_end(shown.remote.path) if shown.over else f"{shown.remote.path} goes on"
    if interrupts.reason == "interrupt":
        raise KeyboardInterrupt
    if interrupts.reason:
        raise SystemExit(143)
    return said


def describe_end(path: Path) -> str:
    """How a run that is over ended."""
    cluster = read_cluster(path)
    if cluster is None or cluster.state == "failed":
        return f"{path} failed; what there is to know is in {path / 'logs'}"
    if cluster.state != "finished":
        return f"{path} was killed while it was {cluster.state}; rustyrl train --resume --run {path} goes on with it"
    summary: dict[str, Any] = {}
    with contextlib.suppress(OSError, msgspec.DecodeError):
        summary = msgspec.json.decode((path / "summary.json").read_bytes())
    if not summary:
        return f"{path} is over"
    how = f"stopped by {summary['stopped_by']} after {clock(summary['seconds'])} and {count(summary['steps'])} steps"
    return f"{path} is over: {how}; the policy is {path / 'policy.safetensors'}"


def _show(shown: Viewer, keyboard: Keyboard, console: Console, interrupts: Interrupts) -> None:
    """Draw when something is new, until there is nothing more to draw."""
    drawn_at, size, looked_at = 0.0, console.size, 0.0
    while not shown.left and not interrupts.count:
        if time.monotonic() - looked_at > REDRAW_S / 2:
            looked_at = time.monotonic()
            shown.list_runs()
            if shown.over:
                return
        news = shown.remote.turn()
        if news or size != console.size or time.monotonic() - drawn_at > REDRAW_S:
            drawn_at, size = time.monotonic(), console.size
            with console:  # one write
                console.control(Control.home())
                lines = Text("\n").join(spell(shown.lines(size.width, size.height), console.encoding))
                console.print(Screen(lines), end="", no_wrap=True, overflow="crop", crop=True)
        for key in keyboard.read(KEY_WAIT_S):
            shown.press(key)
            drawn_at = 0.0
