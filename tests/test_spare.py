"""A process that was started ahead becomes what it is told to be, and is never left over."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from rustyrl.describe import env_arguments
from rustyrl.main import main
from rustyrl.processes import actor_environment, start_child
from rustyrl.spare import Spare
from rustyrl.spec import read_spec


@pytest.fixture
def spare() -> Spare:
    return Spare("rustyrl_actors", actor_environment(), capture=True)


def child_of(spare: Spare) -> subprocess.Popen[bytes]:
    process = spare._process
    assert process is not None
    return process


def test_a_spare_process_becomes_the_child_that_is_asked_for(spare: Spare, tmp_path: Path) -> None:
    ahead = child_of(spare).pid
    arguments = ["rustyrl_actors", *env_arguments("describe", "cartpole", {"slots": 3})]
    child = start_child("describer", arguments, tmp_path / "log", actor=True, capture=True, spare=spare)
    try:
        assert child.pid == ahead
        assert child.process.stdout is not None
        assert read_spec(child.process.stdout.read()).slots == 3
        assert child.process.wait(10) == 0
    finally:
        child.close()
    spare.close()  # it is ours no more, and nothing happens


def test_its_log_is_the_childs_from_then_on(spare: Spare, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    arguments = ["rustyrl_actors", *env_arguments("describe", "no-such-world", {})]
    child = start_child("describer", arguments, log, actor=True, capture=True, spare=spare)
    try:
        assert child.process.wait(10) == 2
        assert "no-such-world" in child.tail()
    finally:
        child.close()
    assert log.read_text().startswith("before\n")


def test_one_that_died_is_replaced_by_a_start_anew(spare: Spare, tmp_path: Path) -> None:
    ahead = child_of(spare)
    ahead.kill()
    ahead.wait(10)
    arguments = ["rustyrl_actors", *env_arguments("describe", "cartpole", {})]
    child = start_child("describer", arguments, tmp_path / "log", actor=True, capture=True, spare=spare)
    try:
        assert child.pid != ahead.pid
        assert child.process.stdout is not None
        assert read_spec(child.process.stdout.read()).env == "cartpole"
    finally:
        child.close()


def test_a_learner_that_cannot_be_imported_says_why_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(0.5)\nraise ImportError('libcudart.so is missing')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    spare = Spare("rustyrl_learner", {**os.environ, "PYTHONPATH": path})
    child = start_child("learner", ["rustyrl_learner", "doctor"], tmp_path / "log", actor=False, spare=spare)
    try:
        assert child.process.wait(20) == 1
        assert "libcudart.so is missing" in child.tail()
    finally:
        child.close()


def test_one_that_nobody_needs_ends(spare: Spare) -> None:
    pid = child_of(spare).pid
    spare.close()
    spare.close()
    assert not psutil.pid_exists(pid)


def test_one_whose_maker_dies_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from rustyrl.processes import actor_environment\n"
        "from rustyrl.spare import Spare\n"
        "spare = Spare('rustyrl_actors', actor_environment())\n"
        "print(spare._process.pid, flush=True)\n"
        "os._exit(9)\n"  # closes nothing
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).stdout
    pid = int(told)
    with contextlib.suppress(psutil.NoSuchProcess):  # or it raises that it still runs
        psutil.Process(pid).wait(10)


def test_a_run_uses_it_and_leaves_none(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rustyrl.trial", "--config", str(tmp_path / "config.toml"), "--run", str(run)]
    (tmp_path / "config.toml").write_text(
        '[run]\nenv = "cartpole"\ntotal_steps = 4096\nstop_at = ["return_mean>=1"]\neval_every = 1\neval_episodes = 2\n'
        "[batch]\nworlds = 1\nunroll_length = 64\n"
    )
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    assert msgspec.json.decode((run / "summary.json").read_bytes())["stopped_by"] == "goal"
    log = (run / "logs" / "learner.log").read_text()
    assert "Traceback" not in log
    left = [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "early"),
    [
        (["train", "cartpole"], True),
        (["learner"], True),
        (["train", "--help"], False),
        (["status", "train"], False),
        ([], False),
    ],
)
def test_the_command_line_has_a_learner_start_before_it_imports_all_else(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], early: bool
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    seen: list[Spare | None] = []

    def run(spare: Spare | None) -> None:
        seen.append(spare)
        if spare is not None:
            started.append(child_of(spare))
            assert started[-1].poll() is None

    monkeypatch.setattr("rustyrl.cli.main", run)
    monkeypatch.setattr(sys, "argv", ["rustyrl", *arguments])
    main()
    assert [spare is not None for spare in seen] == [early]
    assert all(process.returncode is not None for process in started)  # it was not adopted


COUNTING = """
import atexit, subprocess, sys
begun = []
class Counted(subprocess.Popen):
    def __init__(self, args, **more):
        begun.append(args)
        super().__init__(args, **more)
subprocess.Popen = Counted
atexit.register(lambda: print("learners:", sum("rustyrl_learner" in args for args in begun), file=sys.stderr))
from rustyrl.main import main
main()
"""


def test_a_run_goes_on_in_the_learner_that_was_started_first(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNTING, "train", "cartpole", "--total-steps", "2000", "--run", "run", "--json"]
    command += ["--set", "run.eval_episodes=4", "--actors", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "learners: 1\n" in done.stderr
