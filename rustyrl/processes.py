"""Child processes: started with a log of their own, watched, and always brought down."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rustyrl.errors import RunFailedError, UsageError
from rustyrl.spare import Spare

if TYPE_CHECKING:
    from rustyrl.black_box import BlackBox  # numpy: whoever starts the first process has no time for it

__all__ = [
    "Child",
    "actor_environment",
    "ask_child",
    "available_cores",
    "await_end",
    "learner_environment",
    "spare_learner",
    "start_child",
]

TAIL_BYTES = 16384
TRACEBACK = "Traceback (most recent call last)"
CHAINED = ("another exception occurred:", "the direct cause of the following exception:")  # what joins two of them
DUMP = re.compile(  # what faulthandler prints
    r"(?:Fatal Python error.*\n\n)?(?:(?:Current thread|Thread) 0x.*\(most recent call first\):\n(?:  .*(?:\n|$))+\n?)+"
)


@dataclass(slots=True)
class Child:
    """A process of ours.

    descriptor: becomes readable when it ends (Linux), else it is -1
    black_box: what an actor says of itself as it goes along
    incarnation: tells it from every other process that has or had its name
    log_start: where in the log its own lines begin, behind those of a process before it
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    descriptor: int
    ended_seen: bool = field(default=False)
    black_box: BlackBox | None = None
    incarnation: int = 0
    log_start: int = 0

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

    def kill(self) -> None:
        """End it at once if it still runs, even if it is stopped."""
        if self.running:
            self.process.kill()

    def tail(self) -> str:
        """The end of its log: a traceback, if it died of one, or where its threads stood, if it was asked."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return last_words(file.read().decode(errors="replace").strip())
        return ""

    def close(self) -> None:
        """Kill it if it still runs, and give back what watching it took."""
        self.kill()
        self.process.wait(timeout=10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        if self.black_box is not None:
            self.black_box.close()


def start_child(
    name: str,
    arguments: list[str],
    log: Path,
    *,
    actor: bool,
    capture: bool = False,
    black_box: BlackBox | None = None,
    incarnation: int = 0,
    niceness: int = 0,
    traced: bool = False,
    spare: Spare | None = None,
) -> Child:
    """Start ``python -m`` with these arguments in a process group of its own: Ctrl-C reaches the launcher alone.

    Not in a session of its own: Linux may share cores out by session before it looks at niceness (sched(7), autogroup).
    It learns our process id and dies with us. Its standard error, and its standard output unless it is to be
    captured, go to the log.

    Args:
        name: what it is called in messages.
        arguments: the module, then its arguments.
        log: is appended to.
        actor: for an actor or for a learner, whose environment variables differ.
        capture: have its standard output in ``process.stdout``.
        black_box: for it to inherit; it is closed with the child.
        incarnation: what tells it from others of its name.
        niceness: how much it steps back behind others for the cores, 0 to 19 (Unix).
        traced: a profiler that we start will look into it.
        spare: becomes it, if it can; it is of the same module and environment, and there is no ``black_box``.

    Raises:
        OSError: there is no room for another process or file.
    """
    environment = actor_environment() if actor else learner_environment()
    module, *rest = arguments
    told = ["--parent", str(os.getpid()), *(["--traced"] if traced else []), *rest]
    if black_box is not None:
        told += ["--black-box", str(black_box.descriptor)]
    with _open_log(log) as output:
        log_start = output.tell()
        adopted = None if spare is None else spare.adopt(told, log)
        process = adopted or subprocess.Popen(
            [sys.executable, "-m", module, *told],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else output,
            stderr=output,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            process_group=0,
            pass_fds=() if black_box is None else (black_box.descriptor,),
        )
    if niceness:
        _step_back(process.pid, niceness)
    descriptor = -1
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without pidfd: its end is seen at the next turn instead
            descriptor = os.pidfd_open(process.pid)
    return Child(name, process, log, descriptor, black_box=black_box, incarnation=incarnation, log_start=log_start)


def _step_back(process: int, niceness: int) -> None:
    """Let us go before a process where there are too few cores."""
    if hasattr(os, "setpriority"):
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, process, min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness))


def ask_child(
    what: str, module: str, arguments: Sequence[str], environment: dict[str, str], limit_s: float | None
) -> bytes:
    """What ``python -m module`` with these arguments prints; it dies with us.

    Args:
        what: runs there, as messages call it.
        module: the module.
        arguments: the verb, then its arguments.
        environment: its environment variables.
        limit_s: how long it may take; None is for ever.

    Raises:
        UsageError: it says that it was used badly.
        RunFailedError: it failed otherwise, or took too long.
    """
    command = [sys.executable, "-m", module, "--parent", str(os.getpid()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"{what} took more than {limit_s:.0f} s to {arguments[0]}") from None
    message = done.stderr.decode(errors="replace").strip()
    if done.returncode == UsageError.exit_code:
        raise UsageError(message.removeprefix("error: "))
    if done.returncode:
        raise RunFailedError(f"{what} failed:\n{message}")
    return done.stdout


def _open_log(path: Path) -> IO[bytes]:
    """Append to a log; a full disk is no reason to start nothing."""
    try:
        return path.open("ab")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return open(os.devnull, "ab")  # noqa: PTH123 - no path of ours
        raise


def last_words(text: str) -> str:
    """From the last traceback on, with those that led to it, or from the last dump of stacks; else the last lines."""
    start = text.rfind(TRACEBACK)
    while start > 0 and text[:start].rstrip().endswith(CHAINED) and (before := text.rfind(TRACEBACK, 0, start)) >= 0:
        start = before
    start = max([start, *(dump.start() for dump in DUMP.finditer(text))])
    return text[start:] if start >= 0 else "\n".join(text.splitlines()[-5:])


def await_end(children: list[Child], deadline: float) -> list[Child]:
    """Wait until all have ended or the monotonic deadline has passed; returns those that still run."""
    while (left := [child for child in children if child.running]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@contextmanager
def spare_learner() -> Iterator[Spare | None]:
    """A process that imports torch while other things are done; None if it cannot be had.

    Nothing else takes so long before a run trains.
    """
    spare = None
    with contextlib.suppress(OSError):
        spare = Spare("rustyrl_learner", learner_environment())
    try:
        yield spare
    finally:
        if spare is not None:
            spare.close()


def learner_environment() -> dict[str, str]:
    """Keep freed memory in the process (glibc): an update allocates the same megabytes over and over.

    Giving them back and faulting them in again cost a fifth of an update on the CPU. Torch has threads of its own
    (``run.threads``); numpy's would only be in their way.
    """
    kept = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", **os.environ}


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
