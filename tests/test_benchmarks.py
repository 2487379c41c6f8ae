"""Benchmarks run: with a tiny budget, so that they are there when they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_flight_goal_times_a_run_and_writes_its_result(tmp_path):
    result = tmp_path / "result.json"
    tiny = ["--total-steps=300", "--actors=1", "--set=batch.worlds=2", "--set=env.slots=8", "--set=run.eval_episodes=2"]
    command = [sys.executable, BENCHMARKS / "flight_goal.py", "--seeds", "1", "--json", result, "--", *tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(result.read_text())
    assert content["rows"][0]["stopped_by"] == "total_steps"
    assert content["rows"][0]["wall_s"] > 0
    assert "wall_s: median" in done.stdout


def test_pilot_table_flies_the_pilot_on_both_worlds(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, BENCHMARKS / "pilot_table.py", "--episodes", "3", "--json", result]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [(row["world"], row["flown_by"]) for row in rows] == [("drone", "pilot"), ("drone-windy", "pilot")]
    assert "| drone-windy | pilot |" in done.stdout


def test_world_overhead_accounts_for_the_whole_step(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, BENCHMARKS / "world_overhead.py", "--rounds", "1", "--json", result]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [row["env"] for row in rows] == ["cartpole", "cartpole-object", "drone", "drone-object"]
    for row in rows:
        parts = sum(row[f"{part}_us"] for part in ("tick", "observe", "reset", "framework"))
        assert abs(parts - row["step_us"]) < 0.1
        assert 0 < row["share"] < 1
