"""What asynchrony costs: the same runs at several policy lags, with and without V-trace, over a few seeds.

    python benchmarks/policy_lag.py --seeds 3 --json lag.json --plot docs/lag.svg

Every run has the same budget of env steps. Its score is the mean training return over the whole budget (how fast it
learned) and over the last tenth (where it ended), both acting with noise, and what its last policy does greedily. What
is learned depends on the lag alone, never on timing, so runs may share the machine: ``--jobs``.
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

ENVS = {"cartpole": ("return_mean", 250_000), "drone": ("success_rate", 1_300_000)}  # greedy figure, env steps
LAGS = (0, 1, 4, 16)
# Of cartpole, whose own settings are for speed: batches as small as its episodes, so that versions lie far apart.
SMALL = {
    "batch.unroll_length": 32,
    "ppo.epochs": 10,
    "ppo.minibatch_size": 256,
    "ppo.learning_rate": 3e-4,
    "ppo.max_learning_rate": 1e-3,
}
COLORS = {"off": "#b3541e", "on": "#1e6fb3"}


def main() -> None:
    """Run every combination, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--env", action="append", choices=ENVS, help="default: all")
    parser.add_argument("--lag", action="append", type=int, help=f"default: {LAGS}")
    parser.add_argument("--total-steps", type=int, help="of every run; default: what each environment needs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an .svg file")
    options = parser.parse_args()
    lags = options.lag or LAGS
    kinds = [(lag, vtrace) for lag in lags for vtrace in (("off", "on") if lag else ("off",))]
    jobs = [
        (env, lag, vtrace, seed, options.total_steps or ENVS[env][1])
        for env, (lag, vtrace), seed in itertools.product(options.env or ENVS, kinds, range(1, options.seeds + 1))
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: run(*job), jobs))
    rows = [summarize(env, lag, vtrace, runs) for env in options.env or ENVS for lag, vtrace in kinds]
    print(table(rows))
    if options.json:
        command = " ".join(["python benchmarks/policy_lag.py", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, "rows": rows, "runs": runs}, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(plot(rows))


def run(env: str, lag: int, vtrace: str, seed: int, total_steps: int) -> dict[str, Any]:
    """One run from start to end."""
    limits = ["--total-steps", str(total_steps), "--max-policy-lag", str(lag)]
    settings = ["--set", f"ppo.vtrace={vtrace}", "--set", "run.threads=1"]
    for name, value in SMALL.items() if env == "cartpole" else ():
        settings += ["--set", f"{name}={value}"]
    summary, curve = train(env, "--actors", "1", "--seed", str(seed), *limits, *settings)
    last = [row["return_mean"] for row in curve if row["steps"] > 0.9 * total_steps]
    result = {
        "env": env,
        "lag": lag,
        "vtrace": vtrace,
        "seed": seed,
        "steps": summary["steps"],
        "return_overall": round(statistics.mean(row["return_mean"] for row in curve), 3),
        "return_last_tenth": round(statistics.mean(last), 3),
        "greedy": summary["eval"][ENVS[env][0]],
        "importance_max": round(max(row["importance_max"] for row in curve if "importance_max" in row), 2),
    }
    print(result, file=sys.stderr, flush=True)
    return result


def summarize(env: str, lag: int, vtrace: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over the seeds of one combination."""
    mine = [run for run in runs if (run["env"], run["lag"], run["vtrace"]) == (env, lag, vtrace)]
    row: dict[str, Any] = {"env": env, "lag": lag, "vtrace": vtrace, "seeds": len(mine)}
    for name in ("return_overall", "return_last_tenth", "greedy"):
        values = [run[name] for run in mine]
        row[name] = round(statistics.mean(values), 3)
        row[f"{name}_std"] = round(statistics.stdev(values), 3) if len(values) > 1 else 0.0
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """All combinations, as Markdown."""
    lines = ["| environment | lag | V-trace | return over the run | over its last tenth | greedy at the end |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["env"], row["lag"], row["vtrace"] if row["lag"] else "-"]
        for name, digits in (("return_overall", 1), ("return_last_tenth", 1), ("greedy", 3)):
            cells.append(f"{row[name]:.{digits}f} ± {row[f'{name}_std']:.{digits}f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], width: int = 320, height: int = 220) -> str:
    """Return over the run against lag, a panel an environment, as SVG; bars span a deviation each way."""
    envs = list(dict.fromkeys(row["env"] for row in rows))
    lags = sorted({row["lag"] for row in rows})
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(envs)}" height="{height}"']
    parts += ['font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    left, right, top, bottom = 56, 12, 30, 36
    for panel, env in enumerate(envs):
        mine = [row for row in rows if row["env"] == env]
        low = min(row["return_overall"] - row["return_overall_std"] for row in mine)
        high = max(row["return_overall"] + row["return_overall_std"] for row in mine)
        low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
        start = panel * width

        def x(lag: int, start: int = start) -> float:
            return start + left + (width - left - right) * (lags.index(lag) + 0.5) / len(lags)

        def y(value: float, low: float = low, high: float = high) -> float:
            return height - bottom - (height - top - bottom) * (value - low) / (high - low)

        parts.append(f'<text x="{start + left}" y="18">{env}: return over the run by policy lag</text>')
        for value in (low, (low + high) / 2, high):
            begin, end, level = start + left, start + width - right, y(value)
            parts.append(f'<line x1="{begin}" x2="{end}" y1="{level:.1f}" y2="{level:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{begin - 6}" y="{level + 4:.1f}" text-anchor="end">{value:.0f}</text>')
        parts += [f'<text x="{x(lag):.1f}" y="{height - 18}" text-anchor="middle">{lag}</text>' for lag in lags]
        for index, (vtrace, color) in enumerate(COLORS.items()):
            shown = [row for row in mine if row["vtrace"] == vtrace or row["lag"] == 0]
            points = [(x(row["lag"]) + 4 * index - 2, y(row["return_overall"]), row) for row in shown]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
            for a, b, row in points:
                ends = [y(row["return_overall"] + sign * row["return_overall_std"]) for sign in (1, -1)]
                parts.append(
                    f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{color}"/>'
                )
                parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>')
            label = "with V-trace" if vtrace == "on" else "without"
            parts.append(f'<text x="{start + left + 90 * index}" y="{height - 4}" fill="{color}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
