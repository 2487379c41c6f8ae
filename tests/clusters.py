"""Starting whole clusters in tests, for real: wait with a deadline, leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner

from rustyrl.cli import app
from rustyrl.errors import RunFailedError, UsageError

WORLDS = Path(__file__).parent / "worlds"
COUNTING = f"{WORLDS}/counting.py:Counting"
SMALL = ("--set", "batch.worlds=4", "--set", "env.slots=4", "--set", "batch.unroll_length=16")
ENDLESS = ("train", COUNTING, "--total-steps", "1000000000", "--json", *SMALL)
DEADLINE_S = 60.0


def poll(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Wait until the condition gives something true; fail by name when the deadline passes."""
    deadline = time.monotonic() + deadline_s
    pause = 0.01
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(pause)
    return result


def words(process: psutil.Process) -> list[str]:
    """Its command line; one that was started ahead of time has all of it in one piece."""
    return " ".join(process.cmdline()).split()


class Cluster:
    """A ``rustyrl`` process that the test started, and the run folder that it writes."""

    def __init__(
        self,
        run: Path,
        arguments: list[str],
        cwd: Path,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.run = run
        self._said = [cwd / f"{run.name}.{name}" for name in ("out", "err")]  # a pipe that nobody reads would fill up
        with self._said[0].open("wb") as out, self._said[1].open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", "from rustyrl.main import main; main()", *arguments],
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=environment,
            )
        if hasattr(os, "nice"):  # most would train for ever while the test looks at them, which is to go first
            psutil.Process(self.process.pid).nice(10)

    def wait(self, deadline_s: float = 120.0) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of the ended process."""
        self.process.wait(deadline_s)
        return self.process.returncode, *self.said()

    def said(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        out, err = (path.read_text(errors="replace") for path in self._said)
        return out, err

    def rows(self) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_version(self, version: int) -> None:
        """Wait until this policy version has been trained."""

        def trained() -> bool:
            assert self.process.poll() is None, self.wait()
            rows = self.rows()
            return bool(rows) and rows[-1]["policy_version"] >= version

        poll(trained, f"version {version}")

    def children(self, name: str) -> list[psutil.Process]:
        """The running processes of this run of a role: rustyrl_actors or rustyrl_learner."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if name in line and str(self.run) in line:
                found.append(process)
        return found

    def orphans(self) -> list[psutil.Process]:
        """Processes of the run that still run."""
        return [p for p in self.children("rustyrl_") if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def descriptors(self) -> int:
        """How many file descriptors the launcher has open."""
        return psutil.Process(self.process.pid).num_fds()

    def assert_gone(self) -> None:
        """No process and no socket is left of the run."""
        poll(lambda: not self.orphans(), "no orphans", 10.0)
        assert not list((self.run / "sockets").glob("*"))
        control = json.loads((self.run / "cluster.json").read_text())["control"]
        assert not Path(control.removeprefix("ipc://")).parent.exists()

    def kill(self) -> None:
        """Kill whatever is left."""
        if self.process.poll() is None:
            self.process.kill()
        for process in self.orphans():
            process.kill()
        self.process.wait(10)


def rustyrl(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Run a verb to its end: exit code, standard output, standard error."""
    command = [sys.executable, "-c", "from rustyrl.main import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
    return done.returncode, done.stdout, done.stderr


def verb(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    """What a verb prints as JSON, run in this process: an interpreter for each would take most of the time."""
    done = CliRunner().invoke(app, [*arguments, "--run", str(cluster.run), "--json"])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def await_status(
    cluster: Cluster, condition: Callable[[dict[str, Any]], Any], what: str, deadline_s: float = DEADLINE_S
) -> dict[str, Any]:
    """The first status that meets a condition."""
    status: dict[str, Any] = {}

    def met() -> bool:
        assert cluster.process.poll() is None, cluster.wait()
        if not (cluster.run / "cluster.json").exists():
            return False
        status.clear()
        try:
            status.update(verb(cluster, "status"))
        except (UsageError, RunFailedError) as error:
            raise AssertionError(f"{error}\n{cluster.said()[1]}") from None
        return bool(condition(status))

    try:
        poll(met, what, deadline_s)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{status}\n{cluster.said()[1]}") from None
    return status


def await_more(cluster: Cluster, versions: int) -> None:
    """Wait until the run has got so much further."""
    start = verb(cluster, "status")["learner"].get("version", 0)
    await_status(cluster, lambda status: status["learner"].get("version", 0) >= start + versions, f"{versions} more")


def await_learner(cluster: Cluster, incarnation: int) -> dict[str, Any]:
    """Wait until this learner has trained a batch; the status then."""

    def trains(status: dict[str, Any]) -> bool:
        return status["learner"]["incarnation"] == incarnation and status["tickets"].get("trained", 0) > 0

    return await_status(cluster, trains, f"learner {incarnation} to train")


def speed(cluster: Cluster, seconds: float = 6.0) -> float:
    """Env steps trained per second, over some time."""
    figures = []
    for _ in range(2):
        learner = verb(cluster, "status")["learner"]
        figures.append((learner["steps"], time.monotonic()))
        if len(figures) == 1:
            time.sleep(seconds)
    (before, since), (after, now) = figures
    return (after - before) / (now - since)


def contributing(status: dict[str, Any]) -> dict[int, int]:
    """Worlds by index of the actors whose rollouts came in."""
    return {actor["index"]: actor["worlds"] for actor in status["actors"] if actor["rollouts"]}


def assert_balanced(account: dict[str, Any]) -> None:
    """Every ticket of every learner is accounted for, in a status or a summary."""
    for tickets in (account["tickets"], *(before["tickets"] for before in account["tickets_before"])):
        rejected = sum(tickets["rejected"].values())
        assert tickets["issued"] == tickets["trained"] + rejected + tickets["lost"] + tickets["outstanding"], tickets


def end(cluster: Cluster) -> tuple[dict[str, Any], str]:
    """Terminate the run: its summary, whose books balance, and what it said; nothing is left of it."""
    cluster.process.send_signal(signal.SIGTERM)
    code, out, err = cluster.wait()
    assert code == 143, err
    summary = json.loads(out)
    assert_balanced(summary)
    assert summary["tickets"]["trained"] > 0
    cluster.assert_gone()
    return summary, err


@contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """Meanwhile, these processes stand still."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.resume()
