"""``rustyrl train --profile``: py-spy beside every process of a run, whenever it starts, gone when that ends.

py-spy reads another process's memory from outside, so nothing is slower than it would be, and it ends with what it
watches. The learner's own trace of some updates is `rustyrl_learner.trace`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rustyrl.errors import UsageError
from rustyrl.processes import Child

__all__ = ["Profiler", "find_py_spy", "free_path"]

SAMPLES_S = 100  # samples a second
LONGEST_S = 600  # of a process's life that is recorded: some 60 000 samples of a thread are what a viewer bears
SETTLE_S = 0.5  # a process that has only just begun is not a Python yet
TRIES = 5
WRITE_S = 10.0  # for what was recorded to be written once the process has ended


@dataclass(slots=True)
class _Watch:
    """A process and the py-spy beside it; ``py_spy`` is None before the first try and between two."""

    child: Child
    path: Path
    due: float
    py_spy: subprocess.Popen[bytes] | None = None
    tries: int = 0


class Profiler:
    """Starts a py-spy for each process that it is shown, once; the profiles are written when the processes end."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Write into ``folder``, which is made; what keeps a profile from being made is said, and is no error.

        Raises:
            UsageError: py-spy is not installed.
        """
        self._py_spy = find_py_spy()
        self._folder = folder
        self._say = say
        self._watches: dict[int, _Watch] = {}
        self._forbidden = False
        folder.mkdir(exist_ok=True)

    def turn(self, children: list[Child]) -> None:
        """Look after every process that there is now."""
        for child in children:
            before = self._watches.get(child.pid)
            if before is None or before.child is not child:
                path = free_path(self._folder, child.name.replace(" ", "-"), ".speedscope.json")
                with contextlib.suppress(OSError):
                    path.touch()  # it is taken
                self._watches[child.pid] = _Watch(child, path, time.monotonic() + SETTLE_S)
        for watch in self._watches.values():
            if watch.py_spy is not None and watch.py_spy.poll() is not None:
                self._take_end(watch)
            elif watch.py_spy is None and watch.child.running and time.monotonic() > watch.due and not self._forbidden:
                self._begin(watch)

    def close(self) -> None:
        """Have everything written, and no py-spy left; called when the processes have ended."""
        recording = [watch for watch in self._watches.values() if watch.py_spy is not None]
        deadline = time.monotonic() + WRITE_S
        for watch in recording:
            assert watch.py_spy is not None  # noqa: S101 - see above
            try:
                watch.py_spy.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                watch.py_spy.kill()
                watch.py_spy.wait(WRITE_S)
                self._say(f"no profile of the {watch.child.name}: py-spy did not write it within {WRITE_S:.0f} s")
            self._take_end(watch)
        for watch in self._watches.values():
            with contextlib.suppress(OSError):
                if not watch.path.stat().st_size:
                    watch.path.unlink()  # nothing came of it

    def _begin(self, watch: _Watch) -> None:
        watch.tries += 1
        command = [self._py_spy, "record", "--pid", str(watch.child.pid), "--nonblocking", "--threads"]
        command += ["--rate", str(SAMPLES_S), "--duration", str(LONGEST_S)]
        command += ["--format", "speedscope", "--output", str(watch.path)]
        try:
            with self._log(watch).open("wb") as said:
                watch.py_spy = _start(command, said)
        except OSError as error:
            self._give_up(watch, str(error))

    def _take_end(self, watch: _Watch) -> None:
        """What became of a py-spy that has ended: a profile, another try, or a reason."""
        assert watch.py_spy is not None  # noqa: S101 - else nothing ended
        code, watch.py_spy = watch.py_spy.returncode, None
        said = ""
        with contextlib.suppress(OSError):
            said = self._log(watch).read_text(errors="replace").strip()
            self._log(watch).unlink()
        watch.due = float("inf")
        if code == 0:
            return
        if "permission denied" in said.lower() or "operation not permitted" in said.lower():
            if not self._forbidden:
                self._say(
                    "this machine does not permit py-spy to look into other processes (ptrace), so there are no "
                    f"speedscope profiles; training goes on. It takes root or CAP_SYS_PTRACE: {last_line(said)}"
                )
            self._forbidden = True
        elif watch.child.running and watch.tries < TRIES:
            watch.due = time.monotonic() + SETTLE_S
        else:
            self._give_up(watch, last_line(said) or f"it ended with {code}")

    def _give_up(self, watch: _Watch, reason: str) -> None:
        watch.due = float("inf")
        self._say(f"no profile of the {watch.child.name} (process {watch.child.pid}): py-spy: {reason}")

    def _log(self, watch: _Watch) -> Path:
        return watch.path.with_suffix(".log")


def find_py_spy() -> str:
    """The py-spy of this environment, else the one on the path; raises `UsageError`."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("py-spy", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise UsageError("--profile needs py-spy: pip install 'rustyrl[profile]'")
    return found


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """``stem`` and ``suffix``, with a number between them if that is taken."""
    names = (f"{stem}{f'.{number}' if number > 1 else ''}{suffix}" for number in itertools.count(1))
    return next(path for path in (folder / name for name in names) if not path.exists())


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _start(command: list[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C is for the launcher, and the profile is written when the process has ended."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
    )
