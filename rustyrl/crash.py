"""What is kept of a process that died: how it ended, what it was doing, and the end of its log."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np

from rustyrl.black_box import BlackBox
from rustyrl.processes import Child

__all__ = ["describe_deed", "describe_end", "write_crash"]

SHOWN_SLOTS = 16  # whose actions a record holds


def describe_end(code: int) -> str:
    """An exit code in words."""
    names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
    return f"signal {-code} ({names.get(-code, 'unnamed')})" if code < 0 else f"code {code}"


def describe_deed(box: BlackBox | None, seed: int) -> list[str]:
    """What an actor was doing, a fact a line: world, seed, step, slots and their last actions."""
    if box is None:
        return []
    deed = box.deed()
    if deed.idle:
        return [f"it was waiting for tickets, having answered {box.answered}"]
    at = "was being built or reset" if deed.step < 0 else f"was in env step {deed.step} of the unroll"
    lines = [
        f"world {deed.world} {at} for batch {deed.batch}",
        f"its seed: {(seed, deed.world, deed.built)} (run seed, world, batch that its episodes began with)",
    ]
    for name, action in (box.last_action() or {} if deed.step >= 0 else {}).items():
        shown = np.array2string(action[:SHOWN_SLOTS], precision=6, separator=", ", threshold=1 << 12)
        more = f" (of {len(action)})" if len(action) > SHOWN_SLOTS else ""
        lines.append(f"last action, part {name!r}, slots 0 to {min(len(action), SHOWN_SLOTS) - 1}{more}:\n{shown}")
    return lines


def write_crash(folder: Path, child: Child, what: str, lines: list[str], tail: str) -> Path | None:
    """Keep what is known of a death: the log of a process goes on with its successor.

    Returns:
        The record; None if it could not be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = folder / f"{child.name.replace(' ', '-')}-{stamp}-{child.pid}.txt"
    text = "\n".join([f"{child.name}, process {child.pid}, {what}", *lines])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n\n{tail}\n", encoding="utf-8")
    except OSError:
        return None
    return path
