"""Time the main job: ``rustyrl train drone`` from the start of its process to its end, one run a seed.

    python benchmarks/flight_goal.py --seeds 5 --json benchmarks/results/flight_goal.json

The clock is outside the process, so that start-up, the final evaluation and the shutdown count. Extra arguments after
``--`` go to the command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Run every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("arguments", nargs="*", help="for rustyrl train drone")
    options = parser.parse_args()
    rows = [run(seed, options.arguments) for seed in range(options.first_seed, options.first_seed + options.seeds)]
    for name in ("wall_s", "steps"):
        values = [row[name] for row in rows]
        print(f"{name}: median {statistics.median(values):.4g}, {min(values):.4g} to {max(values):.4g}")
    if options.json:
        machine = {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "torch": version("torch"),
        }
        result = {"command": " ".join(["rustyrl train drone", *options.arguments]), "machine": machine, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def run(seed: int, arguments: list[str]) -> dict[str, object]:
    """One run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        target = ["--seed", str(seed), "--json", "--run", f"{folder}/run"]
        started = time.perf_counter()
        command = [sys.executable, "-c", "from rustyrl.main import main; main()", "train", "drone", *target, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall_s = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    summary = json.loads(done.stdout)
    row = {"seed": seed, "wall_s": round(wall_s, 2), **{k: summary[k] for k in ("steps", "trained_sps", "stopped_by")}}
    row |= summary["eval"]
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
