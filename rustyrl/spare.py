"""Processes started ahead of time: they import what they will need, then wait to be told what to be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from setproctitle import setproctitle

__all__ = ["AWAIT", "Spare", "await_orders"]

AWAIT = "await"  # the verb of a process that does so


class _Orders(msgspec.Struct, frozen=True):
    """What a spare process is told: the arguments that it would have been started with, and its log.

    capture: its standard output is not for the log
    """

    arguments: list[str]
    log: str
    capture: bool


class Spare:
    """One of them, which is to become what is started next. Importing torch takes longer than describing a world."""

    def __init__(self, module: str, environment: dict[str, str], *, capture: bool = False) -> None:
        """Start ``python -m module await`` in a process group of its own; it dies with us.

        Args:
            module: whose main function calls `await_orders` for that verb.
            environment: its environment variables.
            capture: whether its standard output will be read by us.

        Raises:
            OSError: there is no room for another process.
        """
        self._capture = capture
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", module, "--parent", str(os.getpid()), AWAIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if capture else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        )

    def adopt(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes] | None:
        """Have it go on with these arguments, its output in that log.

        Returns:
            Its process, the caller's from now on; None if it has ended: one that is started anew will explain why.
        """
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return None
        with contextlib.suppress(OSError), process.stdin as orders:
            orders.write(msgspec.json.encode(_Orders(list(arguments), str(log), self._capture)))
        if process.poll() is None:
            return process
        _end(process)
        return None

    def close(self) -> None:
        """End it, unless it was adopted."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def await_orders() -> list[str]:
    """Wait for what a `Spare` is told, and let the log be ours; the arguments to go on with.

    Ends the process if nobody needs it.
    """
    content = sys.stdin.buffer.read()
    if not content:
        sys.exit(0)
    orders = msgspec.json.decode(content, type=_Orders)
    setproctitle(" ".join([*sys.orig_argv[:3], *orders.arguments]))  # for those who look with ps
    try:
        descriptor = os.open(orders.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError:  # the disk is full, say
        return orders.arguments
    for output in (2,) if orders.capture else (1, 2):
        os.dup2(descriptor, output)
    os.close(descriptor)
    return orders.arguments


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
