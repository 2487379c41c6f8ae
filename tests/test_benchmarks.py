"""Benchmarks run: with a tiny budget, so that they are there when they are needed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rustyrl.bench_wire import (
    ENDS,
    STEPS,
    bench_spec,
    bench_weights,
    end_episodes,
    fill_rollout,
    measure_wire,
    size_name,
)
from rustyrl.rollout import RolloutOrigin, Ticket
from rustyrl.weights import encode_weights
from rustyrl.wire import RolloutHeader, decode_header, decode_rollout, encode_rollout
from rustyrl_learner.ingest import admit

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(folder: Path, script: str, *arguments: str, after: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """What a benchmark wrote as JSON, and what it printed."""
    result = folder / "result.json"
    command = [sys.executable, BENCHMARKS / script, *arguments, "--json", result, *after]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text()), done.stdout


def test_flight_goal_times_a_run_and_writes_its_result(tmp_path):
    tiny = ["--total-steps=300", "--actors=1", "--set=batch.worlds=2", "--set=env.slots=8", "--set=run.eval_episodes=2"]
    content, said = run(tmp_path, "flight_goal.py", "--seeds", "1", after=["--", *tiny])
    assert content["rows"][0]["stopped_by"] == "total_steps"
    assert content["rows"][0]["wall_s"] > 0
    assert "wall_s: median" in said


def test_pilot_table_flies_the_pilot_on_both_worlds(tmp_path):
    content, said = run(tmp_path, "pilot_table.py", "--episodes", "3")
    rows = content["rows"]
    assert [(row["world"], row["flown_by"]) for row in rows] == [("drone", "pilot"), ("drone-windy", "pilot")]
    assert "| drone-windy | pilot |" in said


def test_world_overhead_accounts_for_the_whole_step(tmp_path):
    rows = run(tmp_path, "world_overhead.py", "--rounds", "1")[0]["rows"]
    assert [row["env"] for row in rows] == ["cartpole", "cartpole-object", "drone", "drone-object"]
    for row in rows:
        parts = sum(row[f"{part}_us"] for part in ("tick", "observe", "reset", "framework"))
        assert abs(parts - row["step_us"]) < 0.1
        assert 0 < row["share"] < 1


def test_summed_costs_compares_training_with_its_parts(tmp_path):
    content, said = run(tmp_path, "summed_costs.py", "--rounds", "1", "--seconds", "0.3", "--env", "cartpole")
    (row,) = content["rows"]
    for suffix in ("", "_alone"):
        allowed = content["cores"] / (1 / row[f"actor_sps{suffix}"] + 1 / row[f"learner_sps{suffix}"])
        assert row[f"allowed_sps{suffix}"] == pytest.approx(allowed, rel=1e-3)
        assert row[f"share{suffix}"] == pytest.approx(row["trained_sps"] / allowed, rel=1e-2)
        assert row[f"share{suffix}"] > 0
    assert "cartpole         median" in said


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs Unix")
def test_in_turn_compares_clusters_of_which_one_goes_on_at_a_time(tmp_path):
    tiny = "batch.worlds=2 env.slots=8 ppo.minibatch_size=128 cluster.actors=1"
    variants = [f"--variant={tiny}", f"--variant={tiny} cluster.actor_niceness=0 RUSTYRL_COMPILED=0"]
    content, said = run(tmp_path, "in_turn.py", "--rounds", "2", "--seconds", "0.4", *variants)
    first, second = content["rows"]
    assert first["ratio"] == 1
    assert all(row["sps"] > 0 and row["busy_cores"] > 0 and row["ratio"] > 0 for row in content["rows"])
    assert second["variant"].endswith("RUSTYRL_COMPILED=0")
    assert f"times: {tiny}" in said


@pytest.mark.slow
def test_policy_lag_compares_lags_with_and_without_vtrace(tmp_path):
    tiny = ["--seeds", "1", "--env", "cartpole", "--lag", "2", "--total-steps", "20000"]
    content, said = run(tmp_path, "policy_lag.py", *tiny, "--jobs", "2", "--plot", str(tmp_path / "lag.svg"))
    assert [(row["lag"], row["vtrace"]) for row in content["rows"]] == [(2, "off"), (2, "on")]
    plain, corrected = content["runs"]
    assert plain["importance_max"] > 1  # there was something to correct,
    assert plain["return_overall"] != corrected["return_overall"]  # and it made a difference
    assert "| cartpole | 2 | on |" in said
    assert "<polyline" in (tmp_path / "lag.svg").read_text()


@pytest.mark.slow
def test_default_settings_train_with_nothing_but_a_budget(tmp_path):
    tiny = ["--seeds", "1", "--env", "CartPole-v1", "--total-steps", "4000"]
    content, said = run(tmp_path, "default_settings.py", *tiny)
    (row,) = content["rows"]
    assert row["runs"][0]["steps"] >= 4000
    assert row["solved"] == 0  # nobody balances a pole after two updates
    assert "| CartPole-v1 | 475 |" in said


def test_wire_compares_our_links_with_raw_ones(tmp_path):
    tiny = ["--seconds", "0.05", "--windows", "2", "--actors", "5", "--weights-bytes", "50000"]
    content, said = run(tmp_path, "wire.py", *tiny)
    assert [row["size"] for row in content["rows"]] == ["64KB", "1MB", "8MB"]
    for row in content["rows"]:
        assert row["raw_mb_s"] > 0
        assert all(row[f"{stream}_to_raw"] > 0 for stream in ("decoded", "finite", "admitted"))
        assert row["admitted_to_raw"] > 0
        assert row["stages_us"]["encode"] > 0
    assert 0 < content["weights"]["ms_p50"] <= content["weights"]["ms_p99"] <= content["weights"]["ms_max"]
    assert "to 5 actors: p50" in said


def test_the_wire_s_parts_have_their_names_and_units():
    parts = measure_wire([64 << 10, 8 << 20], 0.05, 3, weights_bytes=20_000, actors=6)
    assert [(part["name"], part["unit"]) for part in parts] == [
        ("wire_mb_s_64KB", "MB/s"),
        ("wire_mb_s_8MB", "MB/s"),
        ("weights_ms_p50", "ms"),
        ("weights_ms_p99", "ms"),
    ]
    assert all(part["value"] > 0 and part["spread"] >= 0 for part in parts)


@pytest.mark.parametrize(("size", "name"), [(64 << 10, "64KB"), (1 << 20, "1MB"), (8 << 20, "8MB")])
def test_the_rollouts_of_the_wire_s_benchmark_have_their_size_and_would_be_admitted(size, name):
    spec = bench_spec(size)
    rollout = fill_rollout(spec, 0)
    end_episodes(rollout, ENDS, 3)
    end_episodes(rollout, 5, 2)
    rollout.origin = RolloutOrigin(spec.fingerprint, "main", Ticket(0, 0, (0,)), 0, 0, 1)
    header, blob = encode_rollout(rollout)
    assert abs(len(blob) / size - 1) < 0.02
    assert size_name(size) == name
    message = decode_header(header)
    assert isinstance(message, RolloutHeader)
    admit(decode_rollout(message, blob), spec, STEPS, 0)


def test_the_weights_of_the_wire_s_benchmark_have_their_size():
    assert abs(len(encode_weights(bench_weights(1 << 20))) / (1 << 20) - 1) < 0.02


def test_peers_compares_throughput_and_lists_who_is_absent(tmp_path):
    nobody = tmp_path / "python"  # an interpreter that can import nothing
    nobody.write_text("#!/bin/sh\nexit 1\n")
    nobody.chmod(0o755)
    names = [f"--only={name}" for name in ("rustyrl", "stable_baselines3", "sample_factory")]
    work = ["--rounds", "1", "--total-steps", "512", "--slots", "8", "--unroll-length", "16", "--warm-up", "2"]
    content, said = run(tmp_path, "peers.py", *work, *names, "--python", f"sample_factory={nobody}")
    ours, other = content["rows"]
    assert (ours["name"], other["name"]) == ("rustyrl", "stable_baselines3")
    assert other["ratios"]["rustyrl"] == round(ours["sps"] / other["sps"], 2)
    assert set(content["absent"]) == {"sample_factory"}
    assert "stable-baselines3" in other["versions"]
    assert "| stable_baselines3 |" in said
    assert "pip install" in said
