"""The command line. Every verb is also a function of some module here; this one parses and prints."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rustyrl import bench_verb, cluster_verbs, describe, keys_verb, verify_verb
from rustyrl.addresses import join_address
from rustyrl.cluster_verbs import Json, RunOption, print_json
from rustyrl.config import Layer, build_config, parse_assignments, read_config
from rustyrl.doctor import examine
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.keys import read_actor_key
from rustyrl.launch import launch
from rustyrl.new import new_project
from rustyrl.processes import actor_environment, spare_learner
from rustyrl.progress import make_progress
from rustyrl.resume import resume_config
from rustyrl.run_folder import find_run
from rustyrl.spare import Spare

__all__ = ["main"]

EXIT_CODES = {"interrupt": 130, "terminate": 143}

app = typer.Typer(
    name="rustyrl",
    help="Train the agents of a game or simulation: many torch-free actor processes, one PPO learner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EnvArgument = Annotated[
    str | None, typer.Argument(metavar="ENV", help="Name, package.module:Class, file.py:Class or gym:ID.")
]
EnvOption = Annotated[str | None, typer.Option("--env", help="The same as ENV.")]
Seed = Annotated[int | None, typer.Option(help="Of worlds, noise, initialisation and shuffles.")]
TotalSteps = Annotated[int | None, typer.Option(help="Stop after so many env steps.")]
MaxSeconds = Annotated[float | None, typer.Option(help="Stop after so long.")]
StopAt = Annotated[
    list[str] | None, typer.Option(metavar="'METRIC>=VALUE'", help="Stop when an evaluation meets it; repeatable.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
MaxPolicyLag = Annotated[int | None, typer.Option(help="Versions that experience may be behind; 0 is on-policy.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with sections.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Repeatable.")]
Init = Annotated[Path | None, typer.Option(help="Policy file to start from.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Beyond loopback, neither encrypt the link nor ask who joins.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --run.")]

TRAIN_EXAMPLES = """
Examples:

  rustyrl train drone

  rustyrl train cartpole --actors 4 --stop-at 'return_mean>=490'

  rustyrl train my_game.py:Arena --total-steps 2000000 --set ppo.gamma=0.995 --set env.gravity=3.7

  rustyrl train --resume --run runs/drone-20260101-120000 --total-steps 9000000
"""


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    context: typer.Context,
    env: EnvArgument = None,
    env_option: EnvOption = None,
    actors: Annotated[int | None, typer.Option(help="Actor processes to start.")] = None,
    run: RunOption = None,
    total_steps: TotalSteps = None,
    max_seconds: MaxSeconds = None,
    stop_at: StopAt = None,
    seed: Seed = None,
    device: Device = None,
    max_policy_lag: MaxPolicyLag = None,
    listen: Annotated[
        str | None, typer.Option(help="ipc, or tcp://HOST:PORT; beyond this machine, actors join with keys.")
    ] = None,
    insecure: Insecure = False,
    config: ConfigFile = None,
    assignments: Assignments = None,
    init: Init = None,
    resume: Resume = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write profiles of every process into RUN/profile/.")
    ] = False,
    json: Json = False,
) -> None:
    """Start one learner and N actors on this machine, and train."""
    flags = _flags(
        run=_run_section(env or env_option, total_steps, max_seconds, stop_at, seed, device, init),
        batch={"max_policy_lag": max_policy_lag},
        cluster={"actors": actors, "listen": listen, "insecure": insecure or None},
    )
    _train(run, config, assignments, flags, context.obj, resume=resume, json=json, profile=profile)


@app.command(epilog="Example:\n\n  rustyrl learner drone --listen tcp://127.0.0.1:5555 --expect 2")
def learner(
    context: typer.Context,
    env: EnvArgument = None,
    env_option: EnvOption = None,
    listen: Annotated[
        str, typer.Option(help="tcp://HOST:PORT that actors join; beyond this machine, with keys.")
    ] = "tcp://127.0.0.1:5555",
    insecure: Insecure = False,
    expect: Annotated[int, typer.Option(help="Actors that the first batch waits for.")] = 1,
    run: RunOption = None,
    total_steps: TotalSteps = None,
    max_seconds: MaxSeconds = None,
    stop_at: StopAt = None,
    seed: Seed = None,
    device: Device = None,
    max_policy_lag: MaxPolicyLag = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    init: Init = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Start a learner alone; actors join it by hand."""
    flags = _flags(
        run=_run_section(env or env_option, total_steps, max_seconds, stop_at, seed, device, init),
        batch={"max_policy_lag": max_policy_lag},
        cluster={"actors": 0, "expect": expect, "listen": listen, "insecure": insecure or None},
    )
    _train(run, config, assignments, flags, context.obj, resume=resume, json=json)


@app.command(
    epilog="Examples:\n\n  rustyrl actor --join tcp://127.0.0.1:5555\n\n"
    "  rustyrl actor --join tcp://learner.example:5555 --key default.key\n\n"
    "  ssh learner.example cat RUN/keys/default.key | rustyrl actor --join tcp://learner.example:5555 --key -"
)
def actor(
    join: Annotated[str, typer.Option(help="Address that a learner listens on.")],
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="From the learner's RUN/keys/; - reads it from standard input."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Join another machine without a key, if it lets anybody in.")
    ] = False,
) -> None:
    """Be one actor of a learner of this or another machine."""
    address = join_address(join, keyed=key is not None, insecure=insecure)
    command = [sys.executable, "-m", "rustyrl_actors", "run", "--join", address]
    if key is not None:
        if key != "-":
            read_actor_key(Path(key))  # whatever is wrong with it is to be said before all else
        command += ["--key", key]
    elif insecure:
        typer.echo(
            "WARNING: --insecure: nothing on this link is encrypted, and nobody knows who is at the other end", err=True
        )
    typer.echo(f"joining the learner at {join}, waiting up to a minute for it", err=True)
    os.execve(sys.executable, command, actor_environment())  # noqa: S606 - this process becomes the actor


app.registered_commands += cluster_verbs.app.registered_commands
app.add_typer(keys_verb.app, name="keys")


@app.command(name="eval", epilog="Example:\n\n  rustyrl eval runs/drone-20260101-120000 --episodes 1000")
def evaluate(
    target: Annotated[Path | None, typer.Argument(help="Run folder or policy file; default the newest run.")] = None,
    env: EnvOption = None,
    episodes: Annotated[int, typer.Option(min=1, help="Greedy episodes.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the starts.")] = 0,
    assignments: Assignments = None,
    run: RunOption = None,
    json: Json = False,
) -> None:
    """Run a policy greedily and report its figures."""
    target = target or run
    config: dict[str, Any] = {}
    if target is not None and not target.exists():
        raise UsageError(f"there is no run folder or policy file {target}")
    if target is None or target.is_dir():
        folder = find_run(target, live=False)[0]
        layer = resume_config(folder)
        env, config, target = env or layer["run"]["env"], layer["env"], folder / "policy.safetensors"
        if not target.exists():
            raise UsageError(f"{folder} holds no policy yet")
    if not env:
        raise UsageError("a policy file alone does not name its environment; add --env")
    figures = describe.evaluate(env, {**config, **_env_only("eval", assignments)}, target, episodes, seed)
    if json:
        print_json(figures)
        return
    table = Table("figure", "value", title=str(target))
    for name, value in figures.items():
        table.add_row(name, "-" if value is None else f"{value:.6g}")
    Console(emoji=False).print(table)


@app.command()
def envs(json: Json = False) -> None:
    """List the built-in environments."""
    rows = describe.list_environments()
    if json:
        print_json({"envs": rows})
        return
    table = Table("ENV", "about", "observation", "action", "parameters (--set env.NAME=VALUE)")
    for row in rows:
        spec = row["spec"]
        observation = ", ".join(f"{a['name']} {tuple(a['shape'])}" for a in spec["observation"])
        action = ", ".join(
            f"{part['name']} {part['kind']} {part['counts'] or part['shape']}" for part in spec["action"]
        )
        table.add_row(row["env"], row["about"], observation, action, ", ".join(["slots", *spec["parameters"]]))
    Console(emoji=False).print(table)


@app.command(epilog="Example:\n\n  rustyrl new arena --style object")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the project, its module and its world.")],
    style: Annotated[
        str, typer.Option(help="object: one entity is one thing; column: one stands for many.")
    ] = "object",
    json: Json = False,
) -> None:
    """Make a small project around a world of your own."""
    folder, world = new_project(name, style, Path())
    if json:
        print_json({"folder": str(folder), "env": world, "files": sorted(path.name for path in folder.iterdir())})
        return
    typer.echo(f"made {folder}; next:\n  cd {folder}\n  rustyrl check {world}")
    typer.echo(f"  rustyrl train {world} --config config.toml\n  pytest")


@app.command(epilog="Example:\n\n  rustyrl check my_game.py:Arena --set env.slots=8")
def check(
    env: EnvArgument = None,
    env_option: EnvOption = None,
    assignments: Assignments = None,
    seed: Annotated[int, typer.Option(help="Of the trials.")] = 1,
    json: Json = False,
) -> None:
    """Hold a world against everything that training on it relies on."""
    name = env or env_option
    if not name:
        raise UsageError("check takes an environment, such as my_game.py:Arena")
    report = describe.check(describe.anchored(name), _env_only("check", assignments), seed)
    failed = [finding for finding in report["findings"] if finding["passed"] is False]
    if json:
        print_json({"env": name, "passed": not failed, **report})
    else:
        _print_findings(name, report, len(failed))
    if failed:
        raise typer.Exit(1)


app.registered_commands += verify_verb.app.registered_commands
app.registered_commands += bench_verb.app.registered_commands


@app.command()
def doctor(json: Json = False) -> None:
    """Look at what is installed, the device, cores and limits, and say what is wrong."""
    report = examine()
    if json:
        print_json(report)
    else:
        table = Table("what", "found", show_header=False)
        for name, value in report.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            if name != "problems":
                table.add_row(name, escape(str(value)))
        console = Console(emoji=False)
        console.print(table)
        for problem in report["problems"]:
            console.print(f"problem: {problem}", markup=False, highlight=False, soft_wrap=True)
        if not report["problems"]:
            console.print("nothing is wrong")
    if report["problems"]:
        raise typer.Exit(1)


def main(spare: Spare | None = None) -> NoReturn:
    """Run the command line; the exit codes are in the README.

    Args:
        spare: is becoming a learner.
    """
    try:
        app(standalone_mode=True, obj=spare)
    except (UsageError, RunFailedError) as error:
        Console(emoji=False, stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _train(
    run: Path | None,
    config: Path | None,
    assignments: list[str] | None,
    flags: Layer,
    spare: Spare | None,
    *,
    resume: bool,
    json: bool,
    profile: bool = False,
) -> None:
    layers: list[Layer] = []
    if resume:
        if run is None:
            run = find_run(None, live=False)[0]
        layers.append(resume_config(run))
    if config is not None:
        layers.append(read_config(config))
    layers += [parse_assignments(assignments or []), flags]
    with spare_learner() if spare is None else nullcontext(spare) as becoming:
        resolved, spec = describe.configure(*layers)
        progress = make_progress(to_stderr=json)
        summary = launch(resolved, spec, run, resume=resume, progress=progress, profile=profile, spare=becoming)
    if json:
        print_json(summary)
    else:
        _print_summary(summary)
    raise typer.Exit(EXIT_CODES.get(summary["stopped_by"], 0))


def _run_section(
    env: str | None,
    total_steps: int | None,
    max_seconds: float | None,
    stop_at: list[str] | None,
    seed: int | None,
    device: str | None,
    init: Path | None,
) -> dict[str, Any]:
    """The ``run`` section that the flags of `train` and `learner` make."""
    return {
        "env": env,
        "total_steps": total_steps,
        "max_seconds": max_seconds,
        "stop_at": stop_at or None,
        "seed": seed,
        "device": device,
        "init": str(init) if init else None,
    }


def _flags(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was given, without what was not."""
    return {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}


def _env_only(verb: str, assignments: list[str] | None) -> dict[str, Any]:
    changes = parse_assignments(assignments or [])
    if unknown := changes.keys() - {"env"}:
        raise UsageError(f"{verb} takes --set env.KEY=VALUE only, got section {sorted(unknown)[0]!r}")
    build_config(changes)
    return changes.get("env", {})


def _print_findings(env: str, report: dict[str, Any], failed: int) -> None:
    console = Console(emoji=False, soft_wrap=True, highlight=False, markup=False)
    for finding in report["findings"]:
        word = {True: "ok", False: "WRONG", None: "-"}[finding["passed"]]
        console.print(f"{word:>5}  {finding['check']}{': ' + finding['problem'] if finding['problem'] else ''}")
        if finding["remedy"]:
            console.print(f"       -> {finding['remedy']}")
    if speed := report["speed"]:
        parts = ", ".join(f"{name.removesuffix('_us')} {speed[name]:.1f}" for name in speed if name.endswith("_us"))
        console.print(f"speed: {speed['env_sps']:,.0f} env steps/s in one process; us a step: {parts}")
    count = len(report["findings"])
    console.print(f"{env}: {f'{failed} of {count} checks failed' if failed else 'conforms'}")


def _print_summary(summary: dict[str, Any]) -> None:
    table = Table(show_header=False, title=f"{summary['env']}: stopped by {summary['stopped_by']}")
    run = Path(summary["run"])
    table.add_row("env steps", f"{summary['steps']:,}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    table.add_row("trained SPS", f"{summary['trained_sps']:,.0f}")
    table.add_row("policy version", str(summary["policy_version"]))
    if threads := summary["threads"]:
        row = f"{summary['device']}, {threads['lanes']} x {threads['of']} threads"
        row += ", compiled" if threads["compiled"] else ""
        if timing := summary["timing"]:
            row += f"; actors: {timing['actors']}; cores: {timing['cores']}"
        table.add_row("learner", row)
    if summary["bottleneck"]:
        table.add_row("bottleneck", escape(summary["bottleneck"]))
    for name, value in (summary["eval"] or {}).items():
        table.add_row(name, "-" if value is None else f"{value:.6g}")
    for finding in summary["findings"]:
        table.add_row("finding", finding["message"])
    table.add_row("run folder", str(run))
    table.add_row("policy", str(run / "policy.safetensors"))
    table.add_row("metrics", f"{run / 'metrics.jsonl'}; tensorboard --logdir {run}")
    table.add_row("evaluate again", f"rustyrl eval {run}")
    Console(emoji=False, soft_wrap=True).print(table)
