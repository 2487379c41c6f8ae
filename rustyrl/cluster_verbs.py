"""The verbs that speak to a running cluster, or list those that there are."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from rustyrl.control import ControlClient
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.remote import describe_answer
from rustyrl.run_folder import find_run, is_live, list_runs
from rustyrl.screen import Aspect, draw, spell
from rustyrl.top import top as watch

__all__ = ["Json", "RunOption", "app", "print_json"]

ANSWER_S = 15.0  # a checkpoint is written between two updates
STOP_S = 15.0

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder.")]


@app.command()
def status(run: RunOption = None, json: Json = False) -> None:
    """Say how a running cluster stands."""
    answer = _ask(run, {"kind": "status"})
    if json:
        print_json(answer)
        return
    console = _screen_console()
    for line in spell(draw(answer, console.width, None, Aspect()), console.encoding):
        line.rstrip()
        console.print(line, soft_wrap=True)
    others = [row["run"] for row in list_runs() if row["live"] and Path(row["run"]).resolve() != Path(answer["run"])]
    if run is None and others:
        verb = "runs go" if len(others) > 1 else "run goes"
        console.print(f"\n{len(others)} other {verb} on: {', '.join(others)}; this is the newest", soft_wrap=True)


@app.command(
    epilog="Keys are listed by pressing ? there.\n\nExample:\n\n  rustyrl top --run runs/drone-20260101-120000"
)
def top(
    run: RunOption = None,
    every: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 0.5,
) -> None:
    """Watch and steer a running cluster on the whole screen."""
    path, _ = find_run(run, live=True)
    console = _screen_console()
    if not (sys.stdin.isatty() and console.is_terminal) or console.is_dumb_terminal:
        raise UsageError("top needs a terminal; rustyrl status prints the same once, and --json for programs")
    console.print(watch(path, every, console), soft_wrap=True, highlight=False, markup=False)


@app.command(
    epilog="Examples:\n\n  rustyrl scale 8\n\n  rustyrl scale +2\n\n  rustyrl scale -1 --now\n\n"
    "  rustyrl scale --auto 1:8\n\n  rustyrl scale --relieve 3",
    context_settings={"ignore_unknown_options": True},  # or -1 would be one
)
def scale(
    actors: Annotated[str | None, typer.Argument(metavar="[N]", help="How many actors, or a change: +2, -1.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Those that leave do not finish their tickets.")] = False,
    auto: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Let the number follow what the learner waits for.")
    ] = None,
    relieve: Annotated[
        int | None, typer.Option(metavar="INDEX", help="Give the worlds of a slow actor to the others.")
    ] = None,
    run: RunOption = None,
    json: Json = False,
) -> None:
    """Change the number of actors of a running cluster, or who has its worlds."""
    if sum(choice is not None for choice in (actors, auto, relieve)) != 1:
        raise UsageError("scale takes one of N, --auto MIN:MAX and --relieve INDEX")
    if now and actors is None:
        raise UsageError("--now goes with N: those that leave do not finish their tickets")
    if relieve is not None:
        request: dict[str, Any] = {"kind": "relieve", "index": relieve}
    else:
        request = {"kind": "scale", "auto": auto} if auto is not None else {"kind": "scale", "actors": actors}
    answer = _ask(run, {**request, "now": now})
    if "error" in answer:
        raise UsageError(answer["error"])
    if json:
        print_json(answer)
        return
    if relieve is not None:
        typer.echo(describe_answer(answer))
        return
    typer.echo(f"from {answer['before']} to {answer['actors']} actors for {answer['worlds']} worlds")
    if answer["note"]:
        typer.echo(f"note: {answer['note']}")


@app.command()
def pause(run: RunOption = None, json: Json = False) -> None:
    """Hold the training of a running cluster; actors wait."""
    _tell(run, "pause", json=json)


@app.command()
def unpause(run: RunOption = None, json: Json = False) -> None:
    """Go on after a pause."""
    _tell(run, "unpause", json=json)


@app.command()
def checkpoint(run: RunOption = None, json: Json = False) -> None:
    """Write a checkpoint of a running cluster now."""
    answer = _tell(run, "checkpoint", json=json)
    if not json:
        typer.echo(f"version {answer['version']}: {answer['checkpoint']}")


@app.command()
def stop(run: RunOption = None, json: Json = False) -> None:
    """End a run after a last checkpoint."""
    path, cluster = find_run(run, live=True)
    answer = _ask(path, {"kind": "stop"})
    deadline = time.monotonic() + STOP_S
    while is_live(path):
        if time.monotonic() > deadline:
            raise RunFailedError(f"the launcher (process {cluster.pid}) still runs after {STOP_S:.0f} s")
        time.sleep(0.05)
    if json:
        print_json({"run": answer["run"], "stopped": True})
    else:
        typer.echo(f"stopped {path}")


@app.command()
def runs(json: Json = False) -> None:
    """List the runs below ./runs, newest first."""
    rows = list_runs()
    if json:
        print_json({"runs": rows})
        return
    table = Table("run", "env", "state", "steps", "stopped by")
    for row in rows:
        summary = row.get("summary", {})
        table.add_row(row["run"], row["env"], row["state"], f"{summary.get('steps', ''):}", summary.get("stopped_by"))
    Console(emoji=False).print(table)


def _tell(run: Path | None, kind: str, *, json: bool) -> dict[str, Any]:
    """Give a running cluster an order that it answers; refused ones are bad use."""
    answer = _ask(run, {"kind": kind})
    if "error" in answer:
        raise (RunFailedError if answer.get("failed") else UsageError)(answer["error"])
    if json:
        print_json(answer)
    elif "state" in answer:
        typer.echo(f"{answer['run']} is {answer['state']}")
    return answer


def _ask(run: Path | None, request: dict[str, Any]) -> dict[str, Any]:
    path, cluster = find_run(run, live=True)
    with ControlClient(cluster.control) as control:
        try:
            return control.request(request, ANSWER_S)
        except TimeoutError as error:
            raise RunFailedError(f"{path}: {error}") from None


def _screen_console() -> Console:
    """A console for what `draw` draws; letters that it cannot show come out as question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(emoji=False, highlight=False)


def print_json(content: Any) -> None:
    """Print one JSON object."""
    typer.echo(msgspec.json.encode(content).decode())
