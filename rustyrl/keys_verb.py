"""`rustyrl keys`: who may join a run from another machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rustyrl.cluster_verbs import Json, RunOption, print_json
from rustyrl.errors import UsageError
from rustyrl.keys import LAUNCHED, KeyRing, find_keys
from rustyrl.run_folder import find_run, is_live, list_runs

__all__ = ["app"]

app = typer.Typer(
    help="Make, list and revoke the keys that actors join a run with from other machines.", no_args_is_help=True
)

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Of the key: letters, digits, - and _.")]


@app.command(epilog="Example:\n\n  rustyrl keys new lab-3 && scp runs/drone-1/keys/lab-3.key lab-3:")
def new(name: KeyName, run: RunOption = None, json: Json = False) -> None:
    """Make a key that the learner lets in from now on, for one machine or for many."""
    found, ring = _find(run)
    path = ring.add(name)
    if json:
        print_json({"run": str(found), "name": name, "file": str(path)})
        return
    typer.echo(
        f"made {path} for {_named(found)}: copy it to where the actors run, and join with --key {path.name}; "
        "who has it can join"
    )


@app.command(name="list")
def list_keys(run: RunOption = None, json: Json = False) -> None:
    """List the keys of a run, without their secrets."""
    found, ring = _find(run)
    keys = ring.list()
    rows = [{"name": key.name, "public": key.public, "made": key.made, "revoked": key.revoked} for key in keys]
    if json:
        print_json({"run": str(found), "keys": rows})
        return
    typer.echo(f"keys of {_named(found)}")
    table = Table("key", "made", "let in", "for")
    for key in keys:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.made))
        use = "the actors that the run starts" if key.name == LAUNCHED else "other machines"
        table.add_row(key.name, made, "yes" if key.revoked is None else "no, revoked", use)
    Console(emoji=False).print(table)
    for wrong in ring.wrong():
        typer.echo(f"! not let in: {wrong}", err=True)


@app.command(epilog="Example:\n\n  rustyrl keys revoke lab-3")
def revoke(name: KeyName, run: RunOption = None, json: Json = False) -> None:
    """Let a key in no more; actors that joined with it are cut off within a second."""
    found, ring = _find(run)
    ring.revoke(name)
    if json:
        print_json({"run": str(found), "name": name, "revoked": True})
        return
    then = "actors that joined with it are cut off, and their worlds go to the others"
    typer.echo(f"revoked {name} of {_named(found)}: {then if is_live(found) else 'nobody joins with it any more'}")


def _find(run: Path | None) -> tuple[Path, KeyRing]:
    """The run that is meant, and its keys: the one given, else the one that has keys and is going on.

    Raises:
        UsageError: there is none, it has no keys, or there are several.
    """
    if run is None:
        keyed = [row for row in list_runs() if (Path(row["run"]) / "keys").exists()]
        meant = [row["run"] for row in keyed if row["live"]] or [row["run"] for row in keyed]
        if len(meant) > 1:
            raise UsageError(f"{len(meant)} runs have keys: name one with --run, of {', '.join(meant[:10])}")
        run = Path(meant[0]) if meant else None
    found = find_run(run, live=False)[0]
    return found, find_keys(found)


def _named(run: Path) -> str:
    return f"the run {run}" if is_live(run) else f"the run {run}, which is over"
