"""Checkpoints written while training goes on: the training thread copies, a thread of its own writes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rustyrl_learner import checkpoint
from rustyrl_learner.checkpoint import Counters, WorldsNotPackedError
from rustyrl_learner.gathering import KeptWorld

__all__ = ["CheckpointWriter", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """How the writing of one checkpoint ended.

    path: None if it could not be written
    problem: why not
    worlds: how many it holds
    incomplete: it lacks worlds that go on
    lost: why those that were copied are not in it, "" if they are
    """

    counters: Counters
    path: Path | None
    problem: str = ""
    worlds: int = 0
    incomplete: bool = False
    lost: str = ""

    @property
    def exact(self) -> bool:
        """Whether what goes on from it comes to the same bits."""
        return bool(self.worlds) and not self.incomplete

    @property
    def version(self) -> int:
        """Of the policy."""
        return self.counters.policy_version


@dataclass(frozen=True, slots=True)
class _Job:
    counters: Counters
    policy: bytes
    tensors: dict[str, Tensor]
    protected: set[int]
    worlds: Mapping[int, KeptWorld]
    incomplete: bool
    exact: frozenset[int]


class CheckpointWriter:
    """Writes in the order that it was asked, and removes old checkpoints once a newer one is whole."""

    def __init__(self, folder: Path, kept: int, fingerprint: str, incarnation: int) -> None:
        self._folder = folder
        self._kept = kept
        self._fingerprint = fingerprint
        self._incarnation = incarnation
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._ended: queue.Queue[Written] = queue.Queue()
        self._waiting = 0
        self._begun_at = 0.0
        self.write_s = 0.0  # how long the newest took to write
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._waiting > 0

    @property
    def writing_s(self) -> float:
        """How long ago the newest one was begun that is still being written; 0 if there is none."""
        return time.monotonic() - self._begun_at if self._waiting else 0.0

    def begin(
        self,
        counters: Counters,
        policy: bytes,
        tensors: dict[str, Tensor],
        protected: set[int],
        worlds: Mapping[int, KeptWorld] | None = None,
        *,
        incomplete: bool = False,
        exact: frozenset[int] = frozenset(),
    ) -> None:
        """Copy the tensors and have them written.

        Args:
            counters: how far training has come.
            policy: as actors read it.
            tensors: all other state.
            protected: versions whose checkpoints are not removed for it.
            worlds: that stand there.
            incomplete: these are not all that go on.
            exact: versions whose checkpoints are removed for an exact one only.
        """
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._waiting += 1
        self._begun_at = time.monotonic()
        self._jobs.put(_Job(counters, policy, copies, protected, worlds or {}, incomplete, exact))

    def ended(self, timeout_s: float = 0.0) -> list[Written]:
        """Those that were written, or could not be, since the last call; waits for the first if there is none."""
        found: list[Written] = []
        deadline = time.monotonic() + timeout_s
        while self._waiting:
            try:
                found.append(self._ended.get(timeout=max(0.0, deadline - time.monotonic()) if not found else 0.0))
            except queue.Empty:
                break
            self._waiting -= 1
        return found

    def close(self, timeout_s: float) -> None:
        """End the thread, within a limit, after what it was asked to write."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = time.monotonic()
            try:
                written = self._write(job)
                protected = job.protected if written.exact else job.protected | job.exact
                checkpoint.prune(self._folder, self._kept, protected, written.version)
            except Exception as error:  # whatever it was, training goes on and the training thread says so
                self._ended.put(Written(job.counters, None, f"{type(error).__name__}: {error}"))
            else:
                self.write_s = time.monotonic() - started
                self._ended.put(written)

    def _write(self, job: _Job) -> Written:
        """One checkpoint, without its worlds if they cannot be written: they never cost what was learned."""
        try:
            path = self._save(job, job.worlds, incomplete=job.incomplete)
        except WorldsNotPackedError as error:
            path = self._save(job, {}, incomplete=True)
            return Written(job.counters, path, incomplete=True, lost=str(error))
        return Written(job.counters, path, worlds=len(job.worlds), incomplete=job.incomplete)

    def _save(self, job: _Job, worlds: Mapping[int, KeptWorld], *, incomplete: bool) -> Path:
        return checkpoint.save(
            self._folder,
            job.counters,
            job.policy,
            job.tensors,
            self._fingerprint,
            self._incarnation,
            worlds,
            incomplete=incomplete,
        )
