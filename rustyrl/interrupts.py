"""Signals that ask a run to end: counted instead of raised, until everything is cleaned up."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupts"]


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP are counted. The first asks for an orderly end, the second for any.

    In another thread than the main one nothing is caught: a script that trains there keeps its own handlers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reason = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if sys.platform != "win32":
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._count) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.reason = self.reason or ("interrupt" if number == signal.SIGINT else "terminate")
