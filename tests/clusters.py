"""Starting whole clusters in tests, for real: wait with a deadline, leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

WORLDS = Path(__file__).parent / "worlds"
DEADLINE_S = 60.0


def poll(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Wait until the condition gives something true; fail by name when the deadline passes."""
    deadline = time.monotonic() + deadline_s
    pause = 0.01
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(pause)
    return result


class Cluster:
    """A ``rustyrl`` process that the test started, and the run folder that it writes."""

    def __init__(self, run: Path, arguments: list[str], cwd: Path) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from rustyrl.cli import main; main()", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            text=True,
        )

    def wait(self, deadline_s: float = 120.0) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of the ended process."""
        out, err = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out, err

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

    def assert_gone(self) -> None:
        """No process and no socket is left of the run."""
        poll(lambda: not self.orphans(), "no orphans", 5.0)
        assert not list((self.run / "sockets").glob("*"))

    def kill(self) -> None:
        """Kill whatever is left."""
        if self.process.poll() is None:
            self.process.kill()
        for process in self.orphans():
            process.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait(10)


def rustyrl(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Run a verb to its end: exit code, standard output, standard error."""
    command = [sys.executable, "-c", "from rustyrl.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
    return done.returncode, done.stdout, done.stderr


SMALL = ("--set", "batch.worlds=4", "--set", "env.slots=4", "--set", "batch.unroll_length=16")
