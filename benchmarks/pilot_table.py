"""Fly the scripted pilot and learned policies on ``drone`` and ``drone-windy``, from the same starts, in a table.

    python benchmarks/pilot_table.py runs/calm/policy.safetensors runs/windy/policy.safetensors --json table.json

Every policy is flown greedily on both worlds, whichever it was trained on. Effort is the mean over an episode's steps
and the rotors of (thrust commanded / thrust of hovering)^2: 1 is hovering. Distance and time are medians over episodes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from rustyrl.weights import read_policy
from rustyrl_actors.evaluate import evaluate
from rustyrl_actors.worlds.pilot import evaluate_pilot

WORLDS = ("drone", "drone-windy")
# figure: heading of its column, how it is printed
COLUMNS = {
    "success_rate": ("success", "{:.3f}"),
    "crash_rate": ("crashes", "{:.3f}"),
    "time_to_target_median": ("time to target (s)", "{:.2f}"),
    "final_distance_median": ("final distance (m)", "{:.4f}"),
    "effort_mean": ("effort", "{:.3f}"),
}

Figures = dict[str, float | None]
Evaluation = Callable[[str], Figures]


def main() -> None:
    """Fly everyone on every world and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", type=Path, help="policy files, named by their folders in the table")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flyers = {"pilot": fly_pilot(options.episodes, options.seed)}
    for path in options.policies:
        flyers[path.parent.name or path.stem] = fly_policy(path, options.episodes, options.seed)
    print_row("world", "flown by", *(heading for heading, _ in COLUMNS.values()))
    print_row(*["---"] * (2 + len(COLUMNS)))
    rows = [{"world": env, "flown_by": name, **fly(env)} for env in WORLDS for name, fly in flyers.items()]
    for row in rows:
        figures = ("-" if row[name] is None else text.format(row[name]) for name, (_, text) in COLUMNS.items())
        print_row(row["world"], row["flown_by"], *figures)
    if options.json:
        result = {
            "command": " ".join(["python benchmarks/pilot_table.py", *sys.argv[1:]]),
            "numpy": version("numpy"),
            "policies": {path.parent.name or path.stem: origin(path) for path in options.policies},
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def fly_pilot(episodes: int, seed: int) -> Evaluation:
    """The scripted pilot."""
    return lambda env: chosen(evaluate_pilot(env, {}, episodes, seed))


def fly_policy(path: Path, episodes: int, seed: int) -> Evaluation:
    """The policy in a file."""
    weights = read_policy(path)
    return lambda env: chosen(evaluate(env, {}, weights, episodes, seed))


def origin(path: Path) -> dict[str, object]:
    """What the summary beside a policy says of its training, if there is one."""
    summary = path.parent / "summary.json"
    if not summary.is_file():
        return {}
    content = json.loads(summary.read_text())
    return {"command": f"rustyrl train {content['env']}", **{name: content[name] for name in ("steps", "seconds")}}


def chosen(figures: dict[str, float]) -> Figures:
    """What the table shows of an evaluation; None for a metric that no episode reported."""
    return {name: figures.get(name) for name in ("episodes", *COLUMNS)}


def print_row(*cells: object) -> None:
    """A row of a markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
