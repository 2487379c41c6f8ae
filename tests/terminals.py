"""A terminal that a test holds the other end of (Unix)."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

from clusters import poll


class Terminal:
    """``rustyrl ...`` on a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path, width: int = 80, height: int = 24) -> None:
        self._ours, theirs = pty.openpty()
        self._theirs = theirs  # kept open, so that it can be looked at afterwards
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.modes = termios.tcgetattr(theirs)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "TERM")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from rustyrl.main import main; main()", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env={**environment, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
        )
        self.drawn = ""

    def read(self) -> str:
        """Everything that was drawn so far."""
        while select.select([self._ours], [], [], 0.02)[0]:
            self.drawn += os.read(self._ours, 65536).decode(errors="replace")
        return self.drawn

    def screen(self) -> str:
        """The newest whole screen, without colors."""
        frames = self.read().split("\x1b[H")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frames[-1])

    def await_text(self, text: str) -> None:
        """Wait until the screen holds a text."""
        poll(lambda: text in self.screen() or self.process.poll() is not None, f"{text!r} on the screen", 30.0)
        assert text in self.screen(), self.screen()

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait(self) -> int:
        """The exit code; the terminal is as it was."""
        poll(lambda: (self.read(), self.process.poll() is not None)[1], "its end", 30.0)
        self.read()
        assert termios.tcgetattr(self._theirs) == self.modes
        assert self.drawn.rfind("\x1b[?1049l") > self.drawn.rfind("\x1b[?1049h") >= 0  # the screen from before
        assert self.drawn.rfind("\x1b[?25h") > self.drawn.rfind("\x1b[?25l") >= 0  # the cursor
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._ours)
        os.close(self._theirs)
