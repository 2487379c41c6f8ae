"""Where a system lacks what Linux has, there is another way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import SMALL, WORLDS

from rustyrl import configure, run_folder, train
from rustyrl.logs import LogKeeper

WITHOUT = """
import os, signal, subprocess, sys, tempfile
import esper, gymnasium, numpy, psutil, rich.live, typer, zmq  # they know where they run
for name in ("SIGKILL", "SIGUSR1", "SIGHUP"):
    delattr(signal, name)
for name in ("memfd_create", "pidfd_open", "sched_getaffinity", "getloadavg", "setpriority"):
    delattr(os, name)
for name in ("fcntl", "resource"):
    sys.modules[name] = None
import rustyrl.cli, rustyrl_actors.__main__, rustyrl_learner.__main__
from pathlib import Path
from rustyrl.black_box import BlackBox
from rustyrl.processes import available_cores
from rustyrl.run_folder import RunFolder
from rustyrl.usage import Usage
box = BlackBox.create()
box.note(3, 4, 5, 6)
assert box.deed().world == 3
box.close()
assert available_cores() >= 1
usage = Usage()
usage.look([os.getpid()])
assert usage.machine()["load"] is None
with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run", resume=False):
    pass
"""


def test_every_module_works_without_what_only_some_systems_have() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_unix_sockets_everything_goes_over_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "has_ipc", lambda: False)
    layer = {"run": {"env": f"{WORLDS}/counting.py:Counting", "total_steps": 2000, "eval_episodes": 5}}
    settings = [setting.split("=") for setting in SMALL[1::2]]
    for name, value in settings:
        section, key = name.split(".")
        layer.setdefault(section, {})[key] = int(value)
    config, _ = configure(layer)
    summary = train(config, tmp_path / "run")
    assert summary["steps"] >= 2000
    assert summary["tickets"]["lost"] == 0


def test_a_log_that_grows_is_cut_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "actor-0.log"
    keeper = LogKeeper(tmp_path, largest_bytes=1000)
    with log.open("ab", buffering=0) as written:
        written.write(b"a" * 900)
        keeper.look()
        assert log.stat().st_size == 900
        written.write(b"b" * 200)
        keeper.look()
        assert log.stat().st_size == 0
        written.write(b"c" * 10)
        assert log.read_bytes() == b"c" * 10  # no hole where the old text was
        assert (tmp_path / "actor-0.log.1").read_bytes() == b"a" * 900 + b"b" * 200
        written.write(b"d" * 1000)
        keeper.look()
        assert (tmp_path / "actor-0.log.1").read_bytes() == b"c" * 10 + b"d" * 1000


def test_logs_are_looked_at_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "learner.log"
    log.write_bytes(b"x" * 2000)
    keeper = LogKeeper(tmp_path, largest_bytes=1000)
    keeper.turn()
    assert log.stat().st_size == 2000
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6.0)
    keeper.turn()
    assert log.stat().st_size == 0
