"""Public environments trained by ``rustyrl train gym:ID --total-steps N`` and nothing else, over a few seeds.

    python benchmarks/default_settings.py --seeds 3 --json default_settings.json

The score is what the final policy does greedily on fresh seeds, as the run itself reports it at its end. What is
learned does not depend on timing, so runs may share the machine: ``--jobs``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training import train

ENVS = {  # what counts as solved, and within how many env steps
    "CartPole-v1": (475, 200_000),
    "Acrobot-v1": (-100, 200_000),
    "Pendulum-v1": (-250, 300_000),
    "LunarLander-v3": (200, 1_000_000),
    "MountainCar-v0": (-130, 500_000),
    "FrozenLake-v1": (0.7, 500_000),
    "CliffWalking-v1": (-20, 300_000),
    "InvertedPendulum-v5": (950, 400_000),
    "HalfCheetah-v5": (1500, 1_000_000),
}
NAMED = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3")


def main() -> None:
    """Run every environment and seed, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--env", action="append", choices=ENVS, help=f"default: {', '.join(NAMED)}")
    parser.add_argument("--total-steps", type=int, help="of every run; default: the budget of its environment")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    envs = options.env or NAMED
    jobs = list(itertools.product(envs, range(1, options.seeds + 1)))
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: run(*job, options.total_steps), jobs))
    rows = [summarize(env, [one for one in runs if one["env"] == env]) for env in envs]
    print(table(rows))
    if options.json:
        command = " ".join(["python benchmarks/default_settings.py", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


def run(env: str, seed: int, total_steps: int | None) -> dict[str, Any]:
    """One environment and seed."""
    budget = total_steps or ENVS[env][1]
    summary, curve = train(f"gym:{env}", "--seed", str(seed), "--total-steps", str(budget))
    result = {
        "env": env,
        "seed": seed,
        "greedy": summary["eval"]["return_mean"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "training_return": curve[-1]["return_mean"] if curve else None,
        "findings": [finding["kind"] for finding in summary["findings"]],
    }
    print(result, file=sys.stderr, flush=True)
    return result


def summarize(env: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All seeds of one environment."""
    scores = [one["greedy"] for one in runs]
    needed, budget = ENVS[env]
    return {
        "env": env,
        "solved_from": needed,
        "budget": budget,
        "mean": round(statistics.mean(scores), 3),
        "std": round(statistics.stdev(scores), 3) if len(scores) > 1 else 0.0,
        "solved": sum(score >= needed for score in scores),
        "runs": runs,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All environments, as Markdown."""
    lines = ["| environment | solved from | env steps | greedy return, mean ± deviation | each seed | solved |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        each = ", ".join(f"{one['greedy']:.4g}" for one in row["runs"])
        scores = f"{row['mean']:.4g} ± {row['std']:.2g} | {each} | {row['solved']} of {len(row['runs'])}"
        lines.append(f"| {row['env']} | {row['solved_from']} | {row['budget'] // 1000} K | {scores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
