"""Profiles of a run: of every process, loadable, with our functions in them; and what happens where they cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import COUNTING, ENDLESS, SMALL, await_more, await_status, contributing, end, poll, rustyrl, verb

from rustyrl import configure, train
from rustyrl.errors import UsageError
from rustyrl.processes import Child
from rustyrl.profiler import Profiler, free_path

FEW = ("--set", "run.eval_episodes=4", *SMALL)


def frames(path: Path) -> set[str]:
    """The functions of a speedscope profile, which has samples."""
    content = json.loads(path.read_text())
    assert sum(len(profile["samples"]) for profile in content["profiles"]) > 0
    return {frame["name"].rpartition(".")[2] for frame in content["shared"]["frames"]}


def watchers(run: Path) -> list[psutil.Process]:
    """The py-spy processes of a run."""
    lines = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [p for p, line in lines if "record" in line and any(str(run) in word for word in line)]


def test_a_profiled_run_leaves_loadable_profiles_of_every_process_also_of_a_later_actor(start):
    cluster = start(*ENDLESS, "--actors", "1", "--profile")
    cluster.await_version(12)
    profile = cluster.run / "profile"
    verb(cluster, "scale", "+1")
    poll(lambda: len(watchers(cluster.run)) == 3, "a py-spy beside the actor that came later")
    await_status(cluster, lambda status: 1 in contributing(status), "rollouts of it")
    await_more(cluster, 100)
    end(cluster)
    assert {path.name for path in profile.iterdir()} == {
        "actor-0.speedscope.json",
        "actor-1.speedscope.json",
        "learner.speedscope.json",
        "learner-updates.trace.json",
    }
    assert "main" in frames(profile / "actor-1.speedscope.json")
    assert {"run_actor", "unroll"} <= frames(profile / "actor-0.speedscope.json")
    assert {"_update_once", "ppo_update"} <= frames(profile / "learner.speedscope.json")
    events = json.loads((profile / "learner-updates.trace.json").read_text())["traceEvents"]
    assert sum("ppo_update" in event["name"] for event in events) == 4  # updates 5 to 8
    assert any(event.get("cat") == "cpu_op" for event in events)
    assert not watchers(cluster.run)


def test_py_spy_ends_with_a_launcher_that_is_killed(start):
    cluster = start(*ENDLESS, "--actors", "1", "--profile")
    poll(lambda: len(watchers(cluster.run)) == 2, "two py-spies")
    cluster.process.kill()
    poll(lambda: not watchers(cluster.run), "no py-spy left", 15.0)


@pytest.mark.slow
def test_a_run_of_a_few_updates_still_has_a_trace_of_those_that_there_were(start):
    cluster = start("train", COUNTING, "--actors", "1", "--total-steps", str(6 * 256), "--profile", "--json", *FEW)
    assert cluster.wait()[0] == 0
    events = json.loads((cluster.run / "profile" / "learner-updates.trace.json").read_text())["traceEvents"]
    assert any("ppo_update" in event["name"] for event in events)


def test_missing_py_spy_is_bad_use_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("rustyrl.profiler.shutil.which", lambda *_, **__: None)
    config, _ = configure({"run": {"env": "cartpole"}})
    with pytest.raises(UsageError, match=r"pip install 'rustyrl\[profile\]'"):
        train(config, tmp_path / "run", profile=True)
    assert not (tmp_path / "run").exists()


def test_the_flag_is_in_the_help():
    assert "--profile" in rustyrl("train", "--help")[1]


def fake_py_spy(folder: Path, script: str) -> str:
    path = folder / "py-spy"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, children: int = 1) -> tuple[list[str], Path]:
    """What a profiler with another py-spy says of some processes until they end, and where it writes."""
    monkeypatch.setattr("rustyrl.profiler.shutil.which", lambda *_, **__: fake_py_spy(folder, script))
    monkeypatch.setattr("rustyrl.profiler.SETTLE_S", 0.01)
    said: list[str] = []
    profiler = Profiler(folder / "profile", said.append)
    pause = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours = [Child(f"actor {i}", subprocess.Popen(pause), folder / "log", -1) for i in range(children)]
    try:

        def settled() -> bool:
            profiler.turn(ours)
            return bool(said)

        poll(settled, "something is said")
        for _ in range(20):
            profiler.turn(ours)
            time.sleep(0.01)
    finally:
        for child in ours:
            child.close()
        profiler.close()
    return said, folder / "profile"


def test_where_ptrace_is_not_permitted_that_is_said_once(tmp_path, monkeypatch):
    script = "echo 'Permission Denied: Try running again with elevated permissions' >&2; exit 1"
    said, profile = watched(tmp_path, monkeypatch, script, children=3)
    assert len(said) == 1
    assert "does not permit py-spy" in said[0]
    assert "training goes on" in said[0]
    assert not list(profile.iterdir())


def test_a_py_spy_that_fails_is_tried_again_and_given_up_with_its_reason(tmp_path, monkeypatch):
    script = f"echo try >> {tmp_path}/tries; echo 'Error: no Python here' >&2; exit 1"
    said, _ = watched(tmp_path, monkeypatch, script)
    assert len((tmp_path / "tries").read_text().splitlines()) == 5
    assert len(said) == 1
    assert "no profile of the actor 0" in said[0]
    assert said[0].endswith("Error: no Python here")


@pytest.mark.slow
def test_training_goes_on_where_ptrace_is_not_permitted(tmp_path, monkeypatch, capfd):
    fake = fake_py_spy(tmp_path, "echo 'Permission Denied: Try running again' >&2; exit 1")
    which = {"py-spy": fake}
    monkeypatch.setattr("rustyrl.profiler.shutil.which", lambda name, **_: which[name])
    layer: dict[str, dict[str, Any]] = {
        "run": {"env": COUNTING, "total_steps": 3000, "eval_episodes": 4},
        "batch": {"worlds": 4, "unroll_length": 16},
        "env": {"slots": 4},
        "cluster": {"actors": 1},
    }
    config, _ = configure(layer)
    summary = train(config, tmp_path / "run", profile=True)
    assert summary["stopped_by"] == "total_steps"
    assert "does not permit py-spy" in capfd.readouterr().err
    assert {path.name for path in (tmp_path / "run" / "profile").iterdir()} == {"learner-updates.trace.json"}


def test_a_process_that_follows_another_does_not_overwrite_its_profile(tmp_path):
    names = []
    for _ in range(3):
        names.append(free_path(tmp_path, "actor-0", ".json").name)
        (tmp_path / names[-1]).touch()
    assert names == ["actor-0.json", "actor-0.2.json", "actor-0.3.json"]
