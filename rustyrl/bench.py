"""Measuring throughput: a run's processes together, and each kind of them alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from rustyrl.config import Config, Layer, build_config, config_to_toml
from rustyrl.crew import default_actors
from rustyrl.describe import env_arguments
from rustyrl.errors import RunFailedError
from rustyrl.processes import actor_environment, ask_child, learner_environment
from rustyrl.spec import EnvironmentSpec, spec_to_json
from rustyrl.units import count
from rustyrl.weights import policy_spec
from rustyrl.windows import make_part

__all__ = ["BENCH_CARTPOLE", "bench_actor", "bench_cluster", "bench_learner", "bench_scaling", "spell_parts"]
__all__ += ["spell_scaling", "window_rates"]

# What throughput is compared by, ours and others': CartPole with 16 384 env steps a batch.
BENCH_CARTPOLE: Layer = {
    "policy": {"hidden": [64, 64], "activation": "tanh", "trunk": "separate", "normalize": False},
    "batch": {"worlds": 2, "unroll_length": 32, "max_policy_lag": 1},
    "env": {"slots": 256},
    "ppo": {
        "epochs": 4,
        "minibatch_size": 4096,
        "schedule": "constant",
        "learning_rate": 0.0003,
        "stop_kl": 0.0,
        "normalize_value": False,
    },
}
WARM_UP_S = 1.0  # of training before the first window
TIMEOUT_S = 600.0


def bench_actor(config: Config, spec: EnvironmentSpec, seconds: float, windows: int) -> list[dict[str, Any]]:
    """``env_sps, inference_sps, actor_sps, actor_overhead, rollout_bytes`` of one actor and its share of the worlds."""
    actors = default_actors() if config.cluster.actors < 0 else max(1, config.cluster.actors)
    worlds = max(1, config.batch.worlds // actors)
    policy = msgspec.json.encode(policy_spec(config.policy, spec)).decode()
    arguments = [
        *env_arguments("bench", config.run.env, config.env),
        *("--policy-spec", policy, "--worlds", str(worlds), "--unroll-length", str(config.batch.unroll_length)),
        *("--seconds", str(seconds), "--windows", str(windows)),
    ]
    return _measure("rustyrl_actors", arguments, actor_environment())


def bench_learner(config: Config, spec: EnvironmentSpec, seconds: float, windows: int) -> list[dict[str, Any]]:
    """``learner_samples_s, learner_sps, advantages_ms`` of a learner without actors."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "config.toml").write_text(config_to_toml(config))
        (at / "spec.json").write_bytes(spec_to_json(spec))
        arguments = ["bench", "--config", str(at / "config.toml"), "--spec", str(at / "spec.json")]
        arguments += ["--seconds", str(seconds), "--windows", str(windows)]
        return _measure("rustyrl_learner", arguments, learner_environment())


def bench_cluster(config: Config, seconds: float, windows: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train for a while with everything that training has.

    Returns:
        ``trained_sps`` over windows of the learner's clock, ``learner_wait`` and ``start_s`` (from the start of the
        run to its first update); and the summary of the run.

    Raises:
        RunFailedError: it failed, or ended before a window was through.
    """
    endless = build_config(_as_layer(config), {"run": {"total_steps": 10**15, "eval_episodes": 1, "stop_at": []}})
    with tempfile.TemporaryDirectory() as folder:
        at, run = Path(folder) / "config.toml", Path(folder) / "run"
        at.write_text(config_to_toml(endless))
        _train_for(at, run, WARM_UP_S + seconds * windows)
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
        summary = msgspec.json.decode((run / "summary.json").read_bytes())
    rows = [msgspec.json.decode(line) for line in lines]
    rates = window_rates(rows, windows)
    if not rates:
        few = f"{len(rows)} updates in {seconds * windows:.3g} s are too few to measure"
        raise RunFailedError(f"{few}; raise --seconds, or lower batch.unroll_length or batch.worlds")
    timing = summary["timing"] or {}
    parts = [make_part("trained_sps", rates, "env steps/s")]
    if timing:
        parts.append(make_part("learner_wait", [timing["learner_wait"]], "share"))
        parts.append(make_part("busy_cores", [timing["busy_cores"]], "cores"))
    parts.append(make_part("start_s", [summary["seconds"] - rows[-1]["seconds"] + rows[0]["seconds"]], "s"))
    return parts, summary


def _train_for(config: Path, run: Path, seconds: float) -> None:
    """Train as a file says for so long after the first update, then have the run end."""
    command = [sys.executable, "-m", "rustyrl.trial", "--parent", str(os.getpid())]
    log = run.parent / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, "--config", str(config), "--run", str(run)], stdout=subprocess.PIPE, stderr=errors
        )
        try:
            deadline, metrics = time.monotonic() + TIMEOUT_S, run / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                if time.monotonic() > deadline:
                    raise RunFailedError(f"the run made no update within {TIMEOUT_S:.0f} s")
                time.sleep(0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:  # it brings its own processes down
                process.terminate()
                process.wait(TIMEOUT_S)
    if process.returncode:
        cause = said.decode(errors="replace") or log.read_text(errors="replace")
        cause, _, _ = cause.partition("; the last good checkpoint")  # it is gone with its folder
        raise RunFailedError(f"the run failed: {cause}")


def bench_scaling(
    config: Config, actors: Sequence[int], seconds: float, windows: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`bench_cluster` with several numbers of actors.

    Returns:
        ``trained_sps_N`` for each number N, ``scaling_efficiency_N`` (SPS of each actor over that with the fewest) and
        ``scaling_efficiency`` (the last of them); and the summaries.
    """
    parts: list[dict[str, Any]] = []
    summaries = []
    sps: dict[int, float] = {}
    for number in actors:
        with_these = build_config(_as_layer(config), {"cluster": {"actors": number}})
        found, summary = bench_cluster(with_these, seconds, windows)
        trained = next(part for part in found if part["name"] == "trained_sps")
        parts.append({**trained, "name": f"trained_sps_{number}"})
        sps[number] = trained["value"]
        summaries.append(summary)
    fewest = min(actors)
    efficiency = {number: sps[number] / number / (sps[fewest] / fewest) for number in actors}
    parts += [make_part(f"scaling_efficiency_{n}", [share], "share") for n, share in efficiency.items() if n != fewest]
    parts.append(make_part("scaling_efficiency", [efficiency[actors[-1]]], "share"))
    return parts, summaries


def window_rates(rows: Sequence[dict[str, Any]], windows: int) -> list[float]:
    """Trained env steps a second in each of ``windows`` parts of equal time, after a warm-up; [] if there are too few.

    Args:
        rows: of ``metrics.jsonl``.
        windows: how many parts.
    """
    trained = [row for row in rows if "policy_loss" in row]
    trained = [row for row in trained if row["seconds"] >= trained[0]["seconds"] + WARM_UP_S]
    if len(trained) < windows + 1:
        return []
    first, last = trained[0]["seconds"], trained[-1]["seconds"]
    edges = [first + (last - first) * i / windows for i in range(windows + 1)]
    at = [min(trained, key=lambda row: abs(row["seconds"] - edge)) for edge in edges]
    pairs = [(a, b) for a, b in itertools.pairwise(at) if b["seconds"] > a["seconds"]]
    return [(b["steps"] - a["steps"]) / (b["seconds"] - a["seconds"]) for a, b in pairs]


def spell_parts(parts: Sequence[dict[str, Any]], config: Config) -> str:
    """What the figures of processes that were measured alone mean for a run."""
    value = {part["name"]: part["value"] for part in parts}
    said = []
    if "actor_sps" in value:
        step, act = 1 / value["env_sps"], 1 / value["inference_sps"]
        whole = 1 / value["actor_sps"]
        main, sps = "stepping" if step > act else "choosing", count(round(value["actor_sps"]))
        said.append(
            f"an actor's time goes to stepping worlds ({step / whole:.0%}) and choosing actions ({act / whole:.0%}): "
            f"{main} limits it to {sps} env steps/s on one core"
        )
    if "learner_sps" in value:
        sps, epochs = count(round(value["learner_sps"])), config.ppo.epochs
        said.append(f"a learner that never waits trains on {sps} env steps/s with {epochs} epochs")
    if "wire_mb_s_1MB" in value:
        said.append(f"one machine's wire carries {value['wire_mb_s_1MB']:,.0f} MB/s in messages of 1 MB")
    return "; ".join(said)


def spell_scaling(parts: Sequence[dict[str, Any]], summaries: Sequence[dict[str, Any]]) -> str:
    """What several numbers of actors come to."""
    sps = {p["name"].removeprefix("trained_sps_"): p["value"] for p in parts if p["name"].startswith("trained_sps_")}
    best = max(sps, key=lambda number: sps[number])
    efficiency = statistics.median([p["value"] for p in parts if p["name"] == "scaling_efficiency"])
    most = f"most env steps/s come from {best} actor{'s' if best != '1' else ''}"
    last = summaries[-1]["bottleneck"]
    return f"{most}; with the most of them each gives {efficiency:.0%} of what it does with the fewest; {last}"


def _as_layer(config: Config) -> Layer:
    layer: Layer = msgspec.to_builtins(config)
    return layer


def _measure(module: str, arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    content = ask_child("the measurement", module, arguments, environment, TIMEOUT_S)
    return msgspec.json.decode(content, type=list[dict[str, Any]])
