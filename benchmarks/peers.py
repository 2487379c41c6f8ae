"""Throughput beside other libraries on the same work: PPO on a Gymnasium environment, in trained env steps per second.

    python benchmarks/peers.py --rounds 3 --python sample_factory=venvs/sf/bin/python --json peers.json

Everyone learns CartPole-v1 with two tanh layers of 64 for the actor and as many for the critic, 128 environments,
batches of 16384 env steps, 4 epochs of minibatches of 4096, Adam, float32, on the CPU; options ask for other work. All
take turns, one window each a round, so that what else the machine does hits them alike; a ratio is the median over
rounds of rustyrl's figure by the other's of the same round: of its column world, of Gymnasium's batch, where there are
such, and of the same single environments that the others step.

A window is a process of its own. Its clock runs from the end of update ``--warm-up`` to the end of the last, by the
steps and times of the ends of updates: imports, processes that start and first allocations do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium

ADAPTERS = Path(__file__).parent.absolute() / "peers"
sys.path.append(str(ADAPTERS))

from single import has_batch, single_id  # noqa: E402
from training import RUSTYRL  # noqa: E402
from work import ENTROPY, GAE_LAMBDA, GAMMA, MAX_GRADIENT_NORM, RATE, VALUE, Work  # noqa: E402

from rustyrl.verify import machine  # noqa: E402

OURS = ("rustyrl", "rustyrl_gym", "rustyrl_gym_single")
COLUMNS = {"CartPole-v1": "cartpole"}  # our own worlds that step all rows at once
WORLDS = 2


@dataclass(frozen=True)
class Peer:
    """Another library: what its adapter imports, and how to get it."""

    module: str
    install: str

    def is_importable(self, python: str) -> bool:
        """Whether an interpreter has it; looks without importing."""
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({self.module!r}) is None)"
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


PEERS = {
    "stable_baselines3": Peer("stable_baselines3", "pip install stable-baselines3"),
    "sample_factory": Peer("sample_factory", "pip install sample-factory"),
    "pufferlib": Peer("pufferlib", "pip install --no-build-isolation pufferlib"),
    "rllib": Peer("ray.rllib", "pip install 'ray[rllib]'"),
}


class WindowError(Exception):
    """A participant that is there did not do its work; says how it ended."""


def main() -> None:
    """Take turns, print the table, write the result."""
    options = parse()
    pythons = dict.fromkeys(PEERS, sys.executable) | dict(options.python)
    ours = our_worlds(options.env)
    names = [name for name in options.only or [*OURS, *PEERS] if name in ours or name in PEERS]
    absent = {n: PEERS[n].install for n in names if n in PEERS and not PEERS[n].is_importable(pythons[n])}
    present = [name for name in names if name not in absent]
    windows: dict[str, list[dict[str, Any]]] = {name: [] for name in present}
    failed: dict[str, str] = {}
    for number in range(1, options.rounds + 1):
        work = Work.of(vars(options), seed=number)
        for name in [name for name in present if name not in failed]:
            try:
                windows[name].append(window(name, work, ours.get(name, ""), pythons.get(name, ""), options))
            except WindowError as problem:
                failed[name] = str(problem)
    rows = [summarize(name, windows) for name in present if name not in failed]
    print(table(rows, absent, failed))
    if options.json:
        command = " ".join(["python benchmarks/peers.py", *sys.argv[1:]])
        result = {"command": command, "machine": machine() | {"system": platform.platform()}, "rows": rows}
        work_done = vars(Work.of(vars(options))) | {"warm_up": options.warm_up, "threads_of_others": options.threads}
        result |= {"work": work_done, "absent": absent, "failed": failed}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if failed else 0)


def parse() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    Work.add_options(parser)
    parser.add_argument("--warm-up", type=int, default=3, help="updates before the clock runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for the others; rustyrl chooses its own")
    parser.add_argument("--only", action="append", choices=[*OURS, *PEERS], help="a participant; default: all")
    parser.add_argument("--python", action="append", type=interpreter, default=[], metavar="PEER=PATH")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a window may take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        gymnasium.spec(options.env)
    except gymnasium.error.Error as problem:
        parser.error(f"--env {options.env}: {problem}")
    if options.total_steps < (options.warm_up + 1) * options.slots * options.unroll_length:
        parser.error(f"--total-steps {options.total_steps} leaves no update after the {options.warm_up} of --warm-up")
    return options


def interpreter(text: str) -> tuple[str, str]:
    """An interpreter for one of the peers, which has to be there if it is named."""
    name, _, path = text.partition("=")
    if name not in PEERS or not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"expected PEER=PATH, of {', '.join(PEERS)} and an interpreter: {text!r}")
    return name, str(Path(path).absolute())


def our_worlds(env: str) -> dict[str, str]:
    """What ``rustyrl train`` is told to train on, by participant: the last steps what all others do."""
    batch = has_batch(env)
    worlds = {"rustyrl": COLUMNS[env]} if env in COLUMNS else {}
    worlds |= {"rustyrl_gym": f"gym:{env}"} if batch else {}
    return worlds | {"rustyrl_gym_single": f"gym:single:{single_id(env)}" if batch else f"gym:{env}"}


def window(name: str, work: Work, world: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """One participant's turn of a round: its marks, and what comes of them."""
    found = train_ours(world, work, options) if name in OURS else train_peer(name, work, python, options)
    found["sps"] = round(throughput(found["marks"], options.warm_up), 1)
    print(f"round {work.seed}: {name} {found['sps']:,.0f} steps/s", file=sys.stderr, flush=True)
    return found


def throughput(marks: list[tuple[int, float]], warm_up: int) -> float:
    """Env steps per second between the end of an update and that of the last.

    Args:
        marks: Env steps trained by the end of each update, and when that was (s).
        warm_up: The update that the clock starts after.
    """
    if len(marks) <= warm_up:
        raise WindowError(f"{len(marks)} updates leave none after {warm_up} of warm-up")
    steps, seconds = marks[warm_up - 1] if warm_up else (0, 0.0)
    return (marks[-1][0] - steps) / (marks[-1][1] - seconds)


def train_ours(world: str, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """``rustyrl train`` with all its processes; its marks are the rows of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        limits = ["--seed", str(work.seed), "--total-steps", str(work.total_steps), "--device", "cpu"]
        command = [*RUSTYRL, "train", world, "--run", str(run), "--json", *limits, *settings(work)]
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ADAPTERS)]))
        finish(command, options.timeout, env=os.environ | {"PYTHONPATH": paths})
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["steps"]]
    return {
        "marks": [(row["steps"], row["seconds"]) for row in rows],
        "return_mean": rows[-1].get("return_mean"),
        "versions": {key: value for key, value in machine().items() if key not in ("cores", "processor")},
    }


def settings(work: Work) -> list[str]:
    """Ours, for the work that all do."""
    worlds = min(WORLDS, work.slots)
    values: dict[str, object] = {
        "batch.worlds": worlds,
        "env.slots": work.slots // worlds,
        "batch.unroll_length": work.unroll_length,
        "policy.hidden": list(work.hidden),
        "policy.normalize": "false",
        "ppo.epochs": work.epochs,
        "ppo.minibatch_size": work.minibatch,
        "ppo.learning_rate": RATE,
        "ppo.schedule": "constant",
        "ppo.stop_kl": 0,
        "ppo.gamma": GAMMA,
        "ppo.gae_lambda": GAE_LAMBDA,
        "ppo.entropy": ENTROPY,
        "ppo.value_coefficient": VALUE,
        "ppo.max_gradient_norm": MAX_GRADIENT_NORM,
        "run.eval_episodes": 1,  # after the clock has stopped
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def train_peer(name: str, work: Work, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """A peer's adapter in the peer's interpreter; the last line that it prints has its marks."""
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    command = [python, str(ADAPTERS / f"train_{name}.py"), work.argument]
    with tempfile.TemporaryDirectory() as folder:  # some leave files where they are started
        said = finish(command, options.timeout, env=os.environ | threads, cwd=folder)
    for line in reversed(said.splitlines()):
        if line.startswith('{"marks":'):
            found: dict[str, Any] = json.loads(line)
            return found
    raise WindowError("it printed no marks")


def finish(command: list[str], timeout_s: float, **place: Any) -> str:
    """What a command prints; it and all that it started are gone afterwards."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **place) as process:
        try:
            said, problems = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise WindowError(f"not done after {timeout_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise WindowError("\n".join(problems.strip().splitlines()[-5:]) or f"exit code {process.returncode}")
    return said


def summarize(name: str, windows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One participant over all rounds, and beside ours."""
    mine = windows[name]
    figures = [one["sps"] for one in mine]
    return {
        "name": name,
        "sps": statistics.median(figures),
        "sps_min": min(figures),
        "sps_max": max(figures),
        "ratios": {ours: ratio(windows[ours], mine) for ours in OURS if ours in windows},
        "sps_of_rounds": figures,
        "return_mean_of_rounds": [one["return_mean"] for one in mine],
        "seconds_to_first_update": [one["marks"][0][1] for one in mine],
        "versions": mine[0]["versions"],
    }


def ratio(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> float | None:
    """Ours by the other's, the median over the rounds of both."""
    rounds = [one["sps"] / other["sps"] for one, other in zip(ours, others, strict=False)]
    return round(statistics.median(rounds), 2) if rounds else None


def table(rows: list[dict[str, Any]], absent: dict[str, str], failed: dict[str, str]) -> str:
    """All participants, as Markdown, and who was not there."""
    ours = rows[0]["ratios"] if rows else {}
    lines = ["| participant | trained env steps/s, median | over rounds |" + "".join(f" {by} by it |" for by in ours)]
    lines.append("|---|---|---|" + "---|" * len(ours))
    for row in rows:
        ratios = "".join(" - |" if by is None else f" {by:.2f} |" for by in row["ratios"].values())
        lines.append(f"| {row['name']} | {row['sps']:,.0f} | {row['sps_min']:,.0f} to {row['sps_max']:,.0f} |{ratios}")
    lines += [f"{name} is absent: {install}, or --python {name}=PATH" for name, install in absent.items()]
    lines += [f"{name} failed: {problem}" for name, problem in failed.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
