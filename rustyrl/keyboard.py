"""Keys, one at a time, while nothing else reads them; the terminal is given back as it was."""

from __future__ import annotations

import os
import select
import sys
import time
from types import TracebackType
from typing import Any, Self

if sys.platform == "win32":
    import msvcrt
else:
    import termios

__all__ = ["Keyboard", "split_keys"]

SEQUENCES = {"[A": "up", "OA": "up", "[B": "down", "OB": "down", "[5~": "page up", "[6~": "page down"}
SEQUENCES |= {"[H": "home", "OH": "home", "[1~": "home", "[F": "end", "OF": "end", "[4~": "end"}
WINDOWS = {"H": "up", "P": "down", "I": "page up", "Q": "page down", "G": "home", "O": "end"}
NAMES = {"\t": "tab", "\r": "enter", "\n": "enter", "\x1b": "escape"}
WINDOWS_POLL_S = 0.02


class Keyboard:
    """Standard input without echo and without waiting for the end of a line; Ctrl-C stays a signal."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if sys.platform != "win32":
            descriptor = sys.stdin.fileno()
            self._before = termios.tcgetattr(descriptor)
            changed = termios.tcgetattr(descriptor)
            changed[3] &= ~(termios.ICANON | termios.ECHO)
            changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
            changed[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the screen in disorder
            termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.platform != "win32" and self._before is not None:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)

    def read(self, timeout_s: float) -> list[str]:
        """The keys that were pressed, by name where they have one; waits so long for the first.

        Raises:
            EOFError: the terminal is gone.
        """
        if sys.platform == "win32":
            return _read_windows(timeout_s)
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        if not ready:
            return []
        try:
            pressed = os.read(sys.stdin.fileno(), 256)
        except OSError as error:
            raise EOFError(str(error)) from None
        if not pressed:
            raise EOFError("the terminal is gone")
        return split_keys(pressed.decode(errors="ignore"))


def split_keys(text: str) -> list[str]:
    """Single keys out of what a terminal sends for them; sequences that are not known are left out."""
    keys, place = [], 0
    while place < len(text):
        character = text[place]
        place += 1
        if character == "\x1b" and text[place : place + 1] in ("[", "O") and len(text) > place + 1:
            end = place + 1
            while end < len(text) - 1 and not "@" <= text[end] <= "~":
                end += 1
            name = SEQUENCES.get(text[place : end + 1])
            place = end + 1
            keys += [name] if name else []
        else:
            keys.append(NAMES.get(character, character))
    return keys


def _read_windows(timeout_s: float) -> list[str]:
    keys: list[str] = []
    if sys.platform == "win32":
        deadline = time.monotonic() + timeout_s
        while not msvcrt.kbhit() and time.monotonic() < deadline:
            time.sleep(WINDOWS_POLL_S)
        while msvcrt.kbhit():
            character = msvcrt.getwch()
            if character in ("\0", "\xe0"):
                keys += [name] if (name := WINDOWS.get(msvcrt.getwch())) else []
            else:
                keys.append(NAMES.get(character, character))
    return keys
