"""The run folder: one owner at a time, everything of a run in one place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from rustyrl.config import Config, config_to_toml
from rustyrl.errors import UsageError
from rustyrl.sockets import has_ipc
from rustyrl.spec import EnvironmentSpec, spec_to_json

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # not Windows
    msvcrt = None  # type: ignore[assignment]

__all__ = [
    "RUNS",
    "Best",
    "ClusterFile",
    "RunFolder",
    "find_run",
    "is_live",
    "list_runs",
    "new_run_path",
    "read_best",
    "read_cluster",
    "write_atomic",
]

T = TypeVar("T")

RUNS = Path("runs")
MAX_IPC_PATH = 90  # a Unix socket's path has room for 107 bytes; ours adds a name


class ClusterFile(msgspec.Struct, frozen=True):
    """``cluster.json``: how the verbs reach the launcher, and what became of it. Mode 0600."""

    env: str
    state: str
    pid: int
    control: str
    link: str
    incarnation: int
    started: float


class Best(msgspec.Struct, frozen=True):
    """The evaluated version that came nearest to the goal; ``score`` is 0 where it met it, else negative."""

    version: int
    score: float
    return_mean: float


class RunFolder:
    """A run folder that this process owns until it is closed."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path.resolve()
        self._sockets: Path | None = None
        self._before: dict[str, bytes] = {}
        self._created = not self.path.is_dir() or _is_empty(self.path)
        try:
            self._check(resume)
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "logs").mkdir(exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write to the run folder {self.path}: {error.strerror}") from None
        if not _try_lock(self._lock):
            os.close(self._lock)
            raise UsageError(f"{self.path} belongs to a run that is going on; choose another --run")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up ownership; sockets are removed, everything else stays."""
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        os.close(self._lock)

    def discard(self) -> None:
        """Undo `write_inputs`: remove the folder if it is new, else put back what stood there."""
        if self._created:
            shutil.rmtree(self.path, ignore_errors=True)
        for name, content in self._before.items():
            write_atomic(self.path / name, content)

    def write_inputs(self, config: Config, spec: EnvironmentSpec) -> None:
        """Write ``config.toml`` and ``spec.json``."""
        for name in ("config.toml", "spec.json"):
            if (self.path / name).exists():
                self._before[name] = (self.path / name).read_bytes()
        write_atomic(self.path / "config.toml", config_to_toml(config).encode())
        write_atomic(self.path / "spec.json", spec_to_json(spec))

    def write_cluster(self, cluster: ClusterFile) -> None:
        """Write ``cluster.json``."""
        write_atomic(self.path / "cluster.json", msgspec.json.encode(cluster), mode=0o600)

    def write_best(self, best: Best) -> None:
        """Write ``best.json``: which checkpoint came nearest to the goal, so that it is kept across a resume."""
        write_atomic(self.path / "best.json", msgspec.json.encode(best))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_atomic(self.path / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2))

    def install_policy(self, source: Path) -> Path:
        """Make a checkpoint's policy the run's ``policy.safetensors``."""
        target = self.path / "policy.safetensors"
        write_atomic(target, source.read_bytes())
        return target

    def newest_policy(self) -> Path | None:
        """The policy of the newest checkpoint."""
        found = sorted((self.path / "checkpoints").glob("[0-9]*/policy.safetensors"))
        return found[-1] if found else None

    def next_incarnation(self) -> int:
        """One more than the last learner of this folder had."""
        before = read_cluster(self.path)
        return 0 if before is None else before.incarnation + 1

    def socket_address(self, name: str) -> str:
        """An ipc address in a folder that only this user can enter; any free port of loopback where there is no ipc."""
        if not has_ipc():
            return "tcp://127.0.0.1:*"
        if self._sockets is None:
            self._sockets = self.path / "sockets"
            if len(os.fsencode(self._sockets)) > MAX_IPC_PATH:
                self._sockets = Path(tempfile.mkdtemp(prefix="rustyrl-"))
            shutil.rmtree(self._sockets, ignore_errors=True)  # of a launcher that was killed
            self._sockets.mkdir(mode=0o700)
        return f"ipc://{self._sockets / name}"

    def _check(self, resume: bool) -> None:
        ours = (self.path / "config.toml").exists() and (self.path / "spec.json").exists()
        if resume and not ours:
            raise UsageError(f"{self.path} holds no run to resume")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is not a folder")
        if not resume and self.path.exists() and not _is_empty(self.path):
            if is_live(self.path):
                raise UsageError(f"{self.path} belongs to a run that is going on; choose another --run")
            what = "holds a run already; continue it with --resume" if ours else "is not empty and not a run"
            raise UsageError(f"{self.path} {what}, or choose another --run")


def new_run_path(env: str) -> Path:
    """A folder name for a new run, below `RUNS`."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", env.rpartition(":")[2] or env).strip("-").lower()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RUNS / f"{name}-{stamp}"
    number = 2
    while path.exists():
        path = RUNS / f"{name}-{stamp}-{number}"
        number += 1
    return path


def list_runs(root: Path = RUNS) -> list[dict[str, Any]]:
    """Every run below a folder, newest first: ``run, env, state, started`` and its summary, if it has one."""
    rows: list[dict[str, Any]] = []
    for path in root.glob("*/cluster.json"):
        cluster = read_cluster(path.parent)
        if cluster is None:
            continue
        live = is_live(path.parent)
        state = cluster.state if live or cluster.state in ("finished", "failed", "stopped") else "killed"
        row: dict[str, Any] = {"run": str(path.parent), "env": cluster.env, "state": state, "live": live}
        row["started"] = cluster.started
        with contextlib.suppress(OSError, ValueError, RecursionError):
            row["summary"] = msgspec.json.decode((path.parent / "summary.json").read_bytes())
        rows.append(row)
    return sorted(rows, key=lambda row: row["started"], reverse=True)


def find_run(run: Path | None, *, live: bool) -> tuple[Path, ClusterFile]:
    """The run that a verb means: the one given, else the newest.

    Raises:
        UsageError: there is none, or it is over and a live one is needed.
    """
    if run is None:
        rows = [row for row in list_runs() if row["live"] or not live]
        if not rows:
            raise UsageError(f"no {'run is going on' if live else 'run'} below {RUNS.resolve()}; name one with --run")
        run = Path(rows[0]["run"])
    cluster = read_cluster(run)
    if cluster is None:
        raise UsageError(f"{run} is not a run folder (it has no readable cluster.json)")
    if live and not is_live(run):
        raise UsageError(f"the run {run} is over ({cluster.state})")
    return run, cluster


def read_cluster(path: Path) -> ClusterFile | None:
    """Read ``cluster.json``; None if there is none to read."""
    return _read(path / "cluster.json", ClusterFile)


def read_best(path: Path) -> Best | None:
    """Read ``best.json``; None if there is none to read."""
    return _read(path / "best.json", Best)


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def is_live(path: Path) -> bool:
    """Whether a process owns the folder."""
    try:
        descriptor = os.open(path / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _is_empty(path: Path) -> bool:
    """Whether a folder holds nothing but what a launcher makes before it writes anything of its run."""
    return all(entry.name in ("lock", "logs", "sockets") for entry in path.iterdir()) and not is_live(path)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError):  # of ValueError are msgspec's errors and bytes that are no text
        return None


def _try_lock(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
