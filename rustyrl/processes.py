"""Child processes: started with a log of their own, watched, and always brought down."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Child", "actor_environment", "available_cores", "await_end", "start_child"]

TAIL_BYTES = 8192


@dataclass(slots=True)
class Child:
    """A process of ours. ``descriptor`` becomes readable when it ends (Linux), else it is -1."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    descriptor: int
    ended_seen: bool = field(default=False)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.running:
            self.process.send_signal(number)

    def tail(self) -> str:
        """The end of its log: a traceback, if it died of one."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace").strip()
            start = text.rfind("Traceback (most recent call last)")
            return text[start:] if start >= 0 else "\n".join(text.splitlines()[-5:])
        return ""

    def close(self) -> None:
        """Kill it if it still runs, and give back what watching it took."""
        if self.running:
            self.process.kill()
        self.process.wait(timeout=10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def start_child(name: str, arguments: list[str], log: Path, *, actor: bool, capture: bool = False) -> Child:
    """Start ``python -m`` with these arguments in a session of its own, so that Ctrl-C reaches the launcher alone.

    It learns our process id and dies with us. Its standard error, and its standard output unless it is to be
    captured, go to the log.
    """
    environment = actor_environment() if actor else learner_environment()
    module, *rest = arguments
    command = [sys.executable, "-m", module, "--parent", str(os.getpid()), *rest]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else output,
            stderr=output,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    descriptor = -1
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without pidfd: its end is seen at the next turn instead
            descriptor = os.pidfd_open(process.pid)
    return Child(name, process, log, descriptor)


def await_end(children: list[Child], deadline: float) -> list[Child]:
    """Wait until all have ended or the monotonic deadline has passed; returns those that still run."""
    while (left := [child for child in children if child.running]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def learner_environment() -> dict[str, str]:
    """Keep freed memory in the process (glibc): an update allocates the same megabytes over and over.

    Giving them back and faulting them in again cost a fifth of an update on the CPU.
    """
    kept = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    return {**kept, **os.environ}


def actor_environment() -> dict[str, str]:
    """One BLAS thread: an actor's products are small, and the cores belong to other actors and the learner."""
    return {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "VECLIB_MAXIMUM_THREADS": "1",
    }


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
