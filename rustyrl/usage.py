"""What processes and the machine use of its cores and memory."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

from rustyrl.processes import available_cores

__all__ = ["UNKNOWN", "Usage"]

UNKNOWN: dict[str, Any] = {"cpu_percent": None, "memory_bytes": None, "threads": None}
FRESH_S = 0.5  # figures are shares of a time that must not be too short


class Usage:
    """Looks at processes by their id, and remembers how each stood when it was looked at before."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}
        self._figures: dict[int, dict[str, Any]] = {}
        self._machine: dict[str, Any] = {}
        self._looked_at = 0.0
        psutil.cpu_percent()

    def look(self, pids: list[int]) -> None:
        """Measure anew, unless it was done a moment ago; ids of processes of this machine."""
        now = time.monotonic()
        if now - self._looked_at < FRESH_S and all(pid in self._figures for pid in pids):
            return
        self._looked_at = now
        self._processes = {pid: process for pid, process in self._processes.items() if pid in pids}
        self._figures = {pid: self._measure(pid) for pid in pids}
        try:
            memory = psutil.virtual_memory()
        except OSError:  # out of file descriptors
            return
        self._machine = {
            "cores": available_cores(),
            "cpu_percent": psutil.cpu_percent(),
            "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            "memory_bytes": memory.total - memory.available,
            "memory_total_bytes": memory.total,
        }

    def of(self, pid: int) -> dict[str, Any]:
        """``cpu_percent`` (of one core), ``memory_bytes`` (resident) and ``threads``; None where it is not known."""
        return self._figures.get(pid) or UNKNOWN

    def machine(self) -> dict[str, Any]:
        """``cores`` that may be used, ``cpu_percent``, ``load``, ``memory_bytes`` and ``memory_total_bytes``."""
        return self._machine

    def _measure(self, pid: int) -> dict[str, Any]:
        try:
            known = pid in self._processes
            process = self._processes.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                recent = process.cpu_percent()
                return {
                    "cpu_percent": recent if known else mean_cpu_percent(process),
                    "memory_bytes": process.memory_info().rss,
                    "threads": process.num_threads(),
                }
        except (psutil.Error, OSError):
            return {}


def mean_cpu_percent(process: psutil.Process) -> float:
    """The share of one core since it was started: all that there is to say at the first look."""
    times = process.cpu_times()
    lived = time.time() - process.create_time()
    return float(round(100 * (times.user + times.system) / max(lived, 0.1), 1))
