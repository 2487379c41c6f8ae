"""The verb that holds our learning against published results."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rustyrl.cluster_verbs import Json, print_json
from rustyrl.errors import UsageError
from rustyrl.presets import PRESETS, choose_presets
from rustyrl.run_folder import RUNS, write_atomic
from rustyrl.trials import Outcome, Outcomes, Trial, plan, run_trials
from rustyrl.units import count, short, span
from rustyrl.verify import check_packages, machine, result_rows

__all__ = ["app"]

LAGS = (0, 1)
EXIT_CODES = {"interrupt": 130, "terminate": 143}

app = typer.Typer()

VERIFY_EXAMPLES = """
Examples:

  rustyrl verify cartpole

  rustyrl verify cartpole-zoo acrobot --seeds 5 --lag 1

  rustyrl verify all --seeds 3 --out benchmarks/results/verify.json
"""


@app.command(epilog=VERIFY_EXAMPLES)
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help=f"Presets, or all: {', '.join(PRESETS)}.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs for each preset and lag.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 1,
    lag: Annotated[list[int] | None, typer.Option(min=0, help="Policy lag; repeatable. Default 0 and 1.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    runs: Annotated[Path | None, typer.Option(help="New folder for the run folders; default runs/verify-...")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON, kept up to date meanwhile.")] = None,
    total_steps: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    json: Json = False,
) -> None:
    """Train public environments with published settings, and compare the scores with the published ones."""
    if not names:
        raise UsageError(f"verify takes the names of presets, or all; there are {', '.join(PRESETS)}")
    presets = choose_presets(names)
    check_packages(presets)
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}")
    lags = list(dict.fromkeys(lag or LAGS))
    trials = plan(presets, lags, range(first_seed, first_seed + seeds))
    folder = runs or RUNS / time.strftime("verify-%Y%m%d-%H%M%S")
    head = {"command": _command(names, seeds, first_seed, lags, jobs, total_steps), "machine": machine()}
    so_far: Outcomes = {}

    def note(trial: Trial, outcome: Outcome) -> None:
        so_far[trial.preset.name, trial.lag, trial.seed] = outcome
        _say(f"{len(so_far)} of {len(trials)}: {_spell(trial, outcome)}")
        if out is not None:
            _write(out, {**head, "rows": result_rows(trials, so_far, total_steps, whole=False)})

    _say(f"{len(trials)} runs, each in a folder below {folder}; to watch one: rustyrl top --run {folder}/NAME")
    outcomes, cut_short = run_trials(trials, folder, jobs=jobs, steps_limit=total_steps, on_outcome=note)
    rows = result_rows(trials, outcomes, total_steps, whole=not cut_short)
    if json:
        print_json({**head, "rows": rows})
    else:
        print_rows(Console(emoji=False, highlight=False), rows)
    if cut_short:
        _say(f"{len(outcomes)} of {len(trials)} runs finished before the {cut_short}")
        raise typer.Exit(EXIT_CODES[cut_short])
    if not all(row["passed"] for row in rows):
        raise typer.Exit(1)


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """The result as a table with what explains it below: what was published where, and why runs failed."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("lag", justify="right")
    table.add_column("ours", no_wrap=True)
    table.add_column("each seed", no_wrap=True)
    table.add_column("published", no_wrap=True)
    table.add_column("passed", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['preset']}\n{short(row['total_steps'])} steps",
            str(row["lag"]),
            _ours(row),
            "\n".join(_each_seed(row)),
            f"{_number(row['published'])}\n+- {_number(row['published_std'])}\n{row['source'].split(',')[0]}",
            _verdict(row),
            end_section=True,
        )
    console.print(table)
    for row in {row["preset"]: row for row in rows}.values():
        about = f"{row['env']}, {row['kind']}; {row['source']}. Needs {_number(row['required'])}. {row['note']}"
        _print_below(console, f"{row['preset']}: {about}")
    for row in rows:
        for failure in row["failures"]:
            console.print(f"\n{row['preset']} lag {row['lag']} seed {failure['seed']} failed:", markup=False)
            console.print(textwrap.indent(failure["cause"], "  "), markup=False, soft_wrap=True)


def _ours(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "-"
    scored = sum(score is not None for score in row["scores"])  # one alone has no deviation
    return _number(row["mean"]) + (f"\n+- {_number(row['std'])}" if scored > 1 else "")


def _each_seed(row: dict[str, Any]) -> list[str]:
    return [
        f"{seed}: -" if score is None else f"{seed}: {_number(score)}, {span(seconds)}"
        for seed, score, seconds in zip(row["seeds"], row["scores"], row["seconds"], strict=True)
    ]


def _verdict(row: dict[str, Any]) -> str:
    """In at most three short lines."""
    if row["failures"]:
        return f"no\n{len(row['failures'])} of {len(row['seeds'])} failed"
    if row["shortened"]:
        return "no\nshortened"
    return f"{'yes' if row['passed'] else 'no'}\nby {_number(abs(row['margin']))}"


def _spell(trial: Trial, outcome: Outcome) -> str:
    what = f"{trial.preset.name}, lag {trial.lag}, seed {trial.seed}"
    if outcome.score is None:
        return f"{what} failed: {outcome.cause.strip().splitlines()[-1]}"
    return f"{what}: {_number(outcome.score)} after {count(outcome.steps)} steps, {span(outcome.seconds)}"


def _number(value: float) -> str:
    return f"{value:.1f}"


def _print_below(console: Console, text: str) -> None:
    for line in textwrap.wrap(text, console.width, subsequent_indent="  "):
        console.print(line, markup=False)


def _command(names: list[str], seeds: int, first_seed: int, lags: list[int], jobs: int, total_steps: int | None) -> str:
    """What was asked for, without where it goes."""
    words = ["rustyrl", "verify", *names, f"--seeds {seeds}", *(f"--lag {lag}" for lag in lags)]
    words += [f"--first-seed {first_seed}"] if first_seed != 1 else []
    words += [f"--jobs {jobs}"] if jobs != 1 else []
    words += [f"--total-steps {total_steps}"] if total_steps is not None else []
    return " ".join(words)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_atomic(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    except OSError as error:
        _say(f"{path} cannot be written: {error.strerror}")


def _say(message: str) -> None:
    typer.echo(message, err=True)
