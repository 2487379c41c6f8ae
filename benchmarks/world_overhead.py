"""What the framework adds to a world's own step: us by part, medians of several runs in one process.

    python benchmarks/world_overhead.py --json benchmarks/results/world_overhead_2_cores.json

``framework`` is everything that is ours: handing out actions, checking what was written, episode ends, same-step
resets, records of episodes. ``share`` is its part of the step. The actions are random, so episodes end more often than
in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rustyrl_actors.catalog import find_environment
from rustyrl_actors.testing.speed import measure_speed

WORLDS = {
    "cartpole": {"slots": 256},
    "cartpole-object": {},
    "drone": {"slots": 256},
    "drone-object": {},
}


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {env: [] for env in WORLDS}
    for round_number in range(arguments.rounds):
        for env, settings in WORLDS.items():
            measured[env].append(measure_speed(find_environment(env, settings), seed=round_number))
    rows = [summarize(env, runs) for env, runs in measured.items()]
    for row in rows:
        parts = ", ".join(f"{part} {row[f'{part}_us']:.1f}" for part in ("tick", "observe", "reset", "framework"))
        print(f"{row['env']:16} step {row['step_us']:8.1f} us: {parts} ({row['share']:.0%})")
    if arguments.json:
        command = f"python benchmarks/world_overhead.py --rounds {arguments.rounds}"
        arguments.json.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n")


def summarize(env: str, runs: list[dict[str, float]]) -> dict[str, float | str]:
    """The medians of some runs, and the framework's share in each of them."""
    row: dict[str, float | str] = {"env": env}
    row |= {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    row["share"] = round(statistics.median(run["framework_us"] / run["step_us"] for run in runs), 3)
    return row


if __name__ == "__main__":
    main()
