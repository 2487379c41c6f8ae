"""Train with the same seeds at a fixed number of actors and while it is scaled up and down, and compare the curves.

    python benchmarks/scaling_curve.py --seeds 3 --json curve.json

Both runs of a seed collect the same experience as long as their numbers agree: worlds move with their episodes, noise
belongs to the world, and versions to the batch. What differs is rounding, by the size of an actor's share. So the
curves agree exactly at first, and within the spread of seeds later on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training import RUSTYRL

SCALES = ("3", "1", "4", "2", "8", "1")
SHOWN = 8  # points of the curve
CLOSE = 0.01  # relative difference up to which two means are called equal


def main() -> None:
    """Run both kinds for every seed, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--env", default="cartpole")
    parser.add_argument("--total-steps", type=int, default=400_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            fixed = train(Path(folder) / "fixed", options, seed, ())
            scaled = train(Path(folder) / "scaled", options, seed, SCALES)
        rows.append(compare(seed, fixed, scaled))
        print_row(rows[-1])
    finals = {kind: [row[kind][-1] for row in rows] for kind in ("fixed", "scaled")}
    for kind, values in finals.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{kind:>7}: final return {statistics.mean(values):.1f} +- {spread:.1f} over seeds")
    if options.json:
        command = " ".join(["python benchmarks/scaling_curve.py", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, "scales": SCALES, "rows": rows}, indent=2) + "\n")


def train(run: Path, options: argparse.Namespace, seed: int, scales: tuple[str, ...]) -> dict[str, Any]:
    """One run from start to end; scaled at even distances of env steps."""
    arguments = ["train", options.env, "--run", str(run), "--actors", "1", "--seed", str(seed)]
    arguments += ["--total-steps", str(options.total_steps), "--set", "batch.worlds=8", "--set", "run.threads=1"]
    process = subprocess.Popen([*RUSTYRL, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    done = []
    for number, actors in enumerate(scales, 1):
        wanted = options.total_steps * number / (len(scales) + 1)
        while process.poll() is None and not (metrics(run) and metrics(run)[-1]["steps"] >= wanted):
            time.sleep(0.05)
        asked = subprocess.run([*RUSTYRL, "scale", actors, "--run", str(run)], capture_output=True, check=False)
        done.append({"steps": metrics(run)[-1]["steps"], "actors": int(actors), "accepted": asked.returncode == 0})
    _, said = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(said.decode())
    summary = json.loads((run / "summary.json").read_text())
    return {"rows": metrics(run), "scales": done, "tickets": summary["tickets"]}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows that are there by now."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def compare(seed: int, fixed: dict[str, Any], scaled: dict[str, Any]) -> dict[str, Any]:
    """Both curves at the same steps, and how long they agree."""
    pairs = [
        (one["steps"], one["return_mean"], other["return_mean"])
        for one, other in zip(fixed["rows"], scaled["rows"], strict=True)
        if "return_mean" in one
    ]
    apart = [steps for steps, one, other in pairs if abs(one - other) > CLOSE * abs(one)]
    shown = [pairs[(len(pairs) - 1) * (i + 1) // SHOWN] for i in range(SHOWN)]
    return {
        "seed": seed,
        "steps": [steps for steps, _, _ in shown],
        "fixed": [round(one, 2) for _, one, _ in shown],
        "scaled": [round(other, 2) for _, _, other in shown],
        "equal_until_steps": apart[0] if apart else pairs[-1][0],
        "scales": scaled["scales"],
        "tickets_of_scaled": scaled["tickets"],
    }


def print_row(row: dict[str, Any]) -> None:
    """One seed's curves."""
    print(f"seed {row['seed']}: equal within {CLOSE:.0%} until {row['equal_until_steps']:,} steps")
    for name in ("steps", "fixed", "scaled"):
        print(f"  {name:>7}", *(f"{value:>9,.0f}" for value in row[name]))


if __name__ == "__main__":
    main()
