"""How near training comes to what its parts cost: trained env steps a second by what the summed costs allow.

    python benchmarks/summed_costs.py --json benchmarks/results/summed_costs_2_cores.json

The parts are an actor with its world, policy and recording, and a learner of one thread with advantages and update,
each as a process on one core. Their seconds per env step, added up and shared out over all cores, are what a run takes
at the least that neither waits nor pays for its processes' speaking to each other.

Each is measured twice: with a copy of it on every core at the same time, since that is how cores are when a run uses
all of them (they share caches, memory, and often what they compute with), and alone. ``share`` is by the former, which
is what these cores allow; ``share_alone`` by the latter, which they only give one at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rustyrl.bench import BENCH_CARTPOLE, bench_actor, bench_cluster, bench_learner
from rustyrl.describe import configure
from rustyrl.processes import available_cores


def main() -> None:
    """Measure in turn, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["gym:CartPole-v1", "cartpole"], help="worlds like CartPole")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for round_number in range(arguments.rounds):
        for env in arguments.env:
            rows.append({"env": env, "round": round_number, **measure(env, arguments.seconds)})
            counts = "{env:16} {trained_sps:9,.0f} of {allowed_sps:9,.0f} env steps/s: "
            said = counts + "{share:.0%}, of parts alone {share_alone:.0%}"
            print(said.format(**rows[-1]))
    for env in arguments.env:
        share, alone = (
            statistics.median(row[n] for row in rows if row["env"] == env) for n in ("share", "share_alone")
        )
        print(f"{env:16} median {share:.0%}, of parts alone {alone:.0%}")
    if arguments.json:
        command = f"python benchmarks/summed_costs.py --rounds {arguments.rounds} --seconds {arguments.seconds}"
        found = {"command": command, "cores": available_cores(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(env: str, seconds: float) -> dict[str, float]:
    """``trained_sps``, and what the parts allow, measured on all cores at once and alone, in env steps a second."""
    config, spec = configure(BENCH_CARTPOLE, {"run": {"env": env}})
    single, _ = configure(BENCH_CARTPOLE, {"run": {"env": env, "threads": 1}})
    cores = available_cores()
    found: dict[str, float] = {}
    for suffix, copies in (("", cores), ("_alone", 1)):
        actor = rate("actor_sps", copies, lambda: bench_actor(config, spec, seconds / 3, 3))
        learner = rate("learner_sps", copies, lambda: bench_learner(single, spec, seconds / 3, 3))
        allowed = round(cores / (1 / actor + 1 / learner))
        found |= {f"actor_sps{suffix}": actor, f"learner_sps{suffix}": learner, f"allowed_sps{suffix}": allowed}
    found["trained_sps"] = value_of("trained_sps", bench_cluster(config, seconds / 3, 3)[0])
    for suffix in ("", "_alone"):
        found[f"share{suffix}"] = round(found["trained_sps"] / found[f"allowed_sps{suffix}"], 3)
    return found


def rate(name: str, copies: int, bench: Callable[[], list[dict[str, Any]]]) -> float:
    """The mean over so many at the same time."""
    with ThreadPoolExecutor(copies) as pool:
        return statistics.fmean(pool.map(lambda _: value_of(name, bench()), range(copies)))


def value_of(name: str, parts: list[dict[str, Any]]) -> float:
    """The median that goes by this name."""
    return next(float(part["value"]) for part in parts if part["name"] == name)


if __name__ == "__main__":
    main()
