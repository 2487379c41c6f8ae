"""The verb that measures throughput and says what limits it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rustyrl.bench import (
    BENCH_CARTPOLE,
    bench_actor,
    bench_cluster,
    bench_learner,
    bench_scaling,
    spell_parts,
    spell_scaling,
)
from rustyrl.cluster_verbs import Json, print_json
from rustyrl.config import Config, parse_assignments, read_config
from rustyrl.describe import configure
from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec
from rustyrl.verify import machine

__all__ = ["app"]

DEFAULT_ENV = "cartpole"
WINDOWS = 5

app = typer.Typer()

BENCH_EXAMPLES = """
Examples:

  rustyrl bench

  rustyrl bench scaling --actors 1,2,4 --env my_game.py:Arena --plot scaling.png

  rustyrl bench learner --device cuda --json

Without --env it is CartPole with 2x64 tanh networks, 16,384 env steps a batch and 4 epochs of minibatches of 4096.
"""


class Part(StrEnum):
    """What is measured."""

    env = "env"
    inference = "inference"
    wire = "wire"
    learner = "learner"
    cluster = "cluster"
    scaling = "scaling"


@app.command(epilog=BENCH_EXAMPLES)
def bench(
    part: Annotated[Part, typer.Argument(help="One kind of process, all together, or several numbers of actors.")] = (
        Part.cluster
    ),
    env: Annotated[str | None, typer.Option(help="Environment, with its own default settings.")] = None,
    actors: Annotated[str | None, typer.Option(help="Actor processes; for scaling several, such as 1,2,4.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each window.")] = 3.0,
    windows: Annotated[int, typer.Option(min=1, max=100, help="How often it is measured, after a warm-up.")] = WINDOWS,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with sections.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into a PNG file.")] = None,
    json: Json = False,
) -> None:
    """Measure throughput in several windows after a warm-up, and say what limits it."""
    if plot is not None:
        _check_plot(plot)
    numbers = _parse_actors(actors, part)
    settings, spec = _configure(env, numbers, device, config, assignments)
    parts, verdict = _measure(part, settings, spec, numbers, seconds, windows)
    result = {
        "bench": part.value,
        "env": settings.run.env,
        "parts": parts,
        "verdict": verdict,
        "windows": windows,
        "seconds": seconds,
        "batch": settings.batch.worlds * spec.slots * settings.batch.unroll_length,
        "machine": machine(),
    }
    if plot is not None:
        _draw(plot, result)
    if json:
        print_json(result)
    else:
        _print(result)


def _configure(
    env: str | None, numbers: Sequence[int], device: str | None, file: Path | None, assignments: list[str] | None
) -> tuple[Config, EnvironmentSpec]:
    run: dict[str, Any] = {"env": env or DEFAULT_ENV, **({"device": device} if device else {})}
    cluster = {"actors": numbers[0]} if numbers else {}
    base = BENCH_CARTPOLE if env is None else {}
    given = {} if file is None else read_config(file)
    return configure(base, given, parse_assignments(assignments or []), {"run": run, "cluster": cluster})


def _measure(
    part: Part, config: Config, spec: EnvironmentSpec, numbers: Sequence[int], seconds: float, windows: int
) -> tuple[list[dict[str, Any]], str]:
    match part:
        case Part.env | Part.inference:
            parts = bench_actor(config, spec, seconds, windows)
            return parts, spell_parts(parts, config)
        case Part.learner:
            parts = bench_learner(config, spec, seconds, windows)
            return parts, spell_parts(parts, config)
        case Part.wire:
            from rustyrl.bench_wire import measure_wire  # opens sockets, which the others do not need

            parts = measure_wire(seconds=seconds, windows=windows)
            return parts, spell_parts(parts, config)
        case Part.cluster:
            parts, summary = bench_cluster(config, seconds, windows)
            return parts, summary["bottleneck"]
        case Part.scaling:
            parts, summaries = bench_scaling(config, numbers or (1, 2), seconds, windows)
            return parts, spell_scaling(parts, summaries)


def _parse_actors(text: str | None, part: Part) -> list[int]:
    if text is None:
        return []
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise UsageError(f"--actors takes numbers from 1 up, such as 4 or 1,2,4, got {text!r}")
    if len(numbers) > 1 and part is not Part.scaling:
        raise UsageError(f"several numbers of actors are for `bench scaling`, this is `bench {part.value}`")
    return sorted(numbers)


def _print(result: dict[str, Any]) -> None:
    table = Table("figure", "median", "spread", "unit", box=SIMPLE_HEAD, title=f"{result['bench']}: {result['env']}")
    for column in table.columns[1:3]:
        column.justify = "right"
    for part in result["parts"]:
        value, spread = part["value"], part["spread"]
        large = abs(value) >= 1000
        table.add_row(
            part["name"],
            f"{value:,.0f}" if large else f"{value:.4g}",
            f"± {spread:,.0f}" if large else f"± {spread:.2g}",
            part["unit"],
        )
    console = Console(emoji=False)
    console.print(table)
    if result["verdict"]:
        console.print(result["verdict"], markup=False, highlight=False, soft_wrap=True)


def _check_plot(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'rustyrl[plot]'")
    if path.suffix != ".png":
        raise UsageError(f"--plot writes a PNG file, got {path}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot: there is no folder {path.parent}")


def _draw(path: Path, result: dict[str, Any]) -> None:
    """Bars with their spread, one panel for each unit; for scaling a line over the number of actors."""
    from matplotlib.figure import Figure  # an extra, and slow to import

    panels: dict[str, list[dict[str, Any]]] = {}
    for part in result["parts"]:
        panels.setdefault(part["unit"], []).append(part)
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    for axes, (unit, parts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        numbered = [part for part in parts if part["name"].startswith("trained_sps_")]
        if numbered:
            actors = [int(part["name"].removeprefix("trained_sps_")) for part in numbered]
            values, spreads = [p["value"] for p in numbered], [p["spread"] for p in numbered]
            axes.errorbar(actors, values, yerr=spreads, marker="o", capsize=3, label="measured")
            each = values[0] / actors[0]
            axes.plot(actors, [each * n for n in actors], linestyle=":", label="in proportion")
            axes.set_xlabel("actors")
            axes.legend()
        else:
            names = [part["name"] for part in parts]
            axes.bar(names, [p["value"] for p in parts], yerr=[p["spread"] for p in parts], capsize=3)
            axes.tick_params("x", rotation=30)
        axes.set_ylabel(unit)
    figure.suptitle(f"{result['bench']}: {result['env']}, {result['machine']['cores']} cores")
    figure.savefig(path)
