"""`rustyrl keys`: who may join a run from another machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rustyrl.cluster_verbs import Json, RunOption, print_json
from rustyrl.keys import LAUNCHED, KeyRing, find_keys
from rustyrl.run_folder import find_run

__all__ = ["app"]

app = typer.Typer(
    help="Make, list and revoke the keys that actors join a run with from other machines.", no_args_is_help=True
)

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Of the key: letters, digits, - and _.")]


@app.command(epilog="Example:\n\n  rustyrl keys new lab-3 && scp runs/drone-1/keys/lab-3.key lab-3:")
def new(name: KeyName, run: RunOption = None, json: Json = False) -> None:
    """Make a key that the learner lets in from now on, for one machine or for many."""
    path = _keys(run).add(name)
    if json:
        print_json({"name": name, "file": str(path)})
        return
    typer.echo(f"made {path}: copy it to where the actors run, and join with --key {path.name}; who has it can join")


@app.command(name="list")
def list_keys(run: RunOption = None, json: Json = False) -> None:
    """List the keys of a run, without their secrets."""
    ring = _keys(run)
    rows = [{"name": key.name, "public": key.public, "made": key.made, "revoked": key.revoked} for key in ring.list()]
    if json:
        print_json({"keys": rows})
        return
    table = Table("key", "made", "let in", "for")
    for key in ring.list():
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.made))
        use = "the actors that the run starts" if key.name == LAUNCHED else "other machines"
        table.add_row(key.name, made, "yes" if key.revoked is None else "no, revoked", use)
    Console(emoji=False).print(table)


@app.command(epilog="Example:\n\n  rustyrl keys revoke lab-3")
def revoke(name: KeyName, run: RunOption = None, json: Json = False) -> None:
    """Let a key in no more; actors that joined with it are cut off within a second."""
    _keys(run).revoke(name)
    if json:
        print_json({"name": name, "revoked": True})
        return
    typer.echo(f"revoked {name}: actors that joined with it are cut off, and their worlds go to the others")


def _keys(run: Path | None) -> KeyRing:
    return find_keys(find_run(run, live=False)[0])
