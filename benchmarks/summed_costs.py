"""How near training comes to what its parts cost: trained env steps a second by what the summed costs allow.

    python benchmarks/summed_costs.py --json benchmarks/results/summed_costs_2_cores.json

The parts are measured alone, each on one core: an actor with its world, policy and recording, and a learner of one
thread with advantages and update. Their seconds per env step, added up and shared out over all cores, are what a run
takes at the least that neither waits nor pays for its processes' speaking to each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
            print("{env:16} {trained_sps:9,.0f} of {allowed_sps:9,.0f} env steps/s: {share:.0%}".format(**rows[-1]))
    for env in arguments.env:
        print(f"{env:16} median {statistics.median(row['share'] for row in rows if row['env'] == env):.0%}")
    if arguments.json:
        command = f"python benchmarks/summed_costs.py --rounds {arguments.rounds} --seconds {arguments.seconds}"
        found = {"command": command, "cores": available_cores(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(env: str, seconds: float) -> dict[str, float]:
    """``actor_sps`` and ``learner_sps`` of one core each, ``allowed_sps`` of all, ``trained_sps`` and its ``share``."""
    config, spec = configure(BENCH_CARTPOLE, {"run": {"env": env}})
    alone, _ = configure(BENCH_CARTPOLE, {"run": {"env": env, "threads": 1}})
    actor = value_of("actor_sps", bench_actor(config, spec, seconds / 3, 3))
    learner = value_of("learner_sps", bench_learner(alone, spec, seconds / 3, 3))
    trained = value_of("trained_sps", bench_cluster(config, seconds / 3, 3)[0])
    allowed = available_cores() / (1 / actor + 1 / learner)
    found = {"actor_sps": actor, "learner_sps": learner, "allowed_sps": round(allowed), "trained_sps": trained}
    return {**found, "share": round(trained / allowed, 3)}


def value_of(name: str, parts: list[dict[str, Any]]) -> float:
    """The median that goes by this name."""
    return next(float(part["value"]) for part in parts if part["name"] == name)


if __name__ == "__main__":
    main()
