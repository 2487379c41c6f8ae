"""``python -m rustyrl_learner``: what the launcher and `rustyrl doctor` start; not for users."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path

import msgspec

from rustyrl.config import build_config, read_config
from rustyrl.control import ControlClient
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.imports import uncollected
from rustyrl.parent import allow_tracing, die_with_parent
from rustyrl.spare import AWAIT, await_orders
from rustyrl.spec import read_spec


def main(told: list[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 1 for a failed run, 2 for bad use."""
    arguments = _parse(told)
    die_with_parent(arguments.parent)
    if arguments.verb == AWAIT:
        try:
            with uncollected():
                import rustyrl_learner.learner  # noqa: F401 - what takes its time
        except BaseException:
            await_orders()  # so that it stands in the log why there is no learner
            raise
        return main(await_orders())
    if arguments.traced:
        allow_tracing(arguments.parent)
    if arguments.verb == "doctor":
        return _doctor()
    if arguments.verb == "bench":
        return _bench(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with ControlClient(arguments.control) as control:
        control.send({"kind": "hello", "pid": os.getpid()})
        try:
            return _run(arguments, control)
        except (UsageError, RunFailedError) as error:
            control.send({"kind": "failed", "message": str(error), "exit_code": error.exit_code})
            return error.exit_code
        except Exception as error:
            control.send({"kind": "failed", "message": f"{type(error).__name__}: {error}", "crashed": True})
            with contextlib.suppress(OSError):  # the disk of the log may be full
                traceback.print_exc()
            return 1


def _run(arguments: argparse.Namespace, control: ControlClient) -> int:
    with uncollected():
        from rustyrl_learner.learner import Learner, run_learner  # torch: only after the launcher knows of us

    config = build_config(read_config(arguments.run / "config.toml"))
    spec = read_spec((arguments.run / "spec.json").read_bytes())
    learner = Learner(
        arguments.run,
        config,
        spec,
        control,
        arguments.listen,
        arguments.incarnation,
        arguments.expect,
        resume=arguments.resume,
        profile=arguments.profile,
    )
    return run_learner(learner, control)


def _doctor() -> int:
    with uncollected():
        import torch

    found = {"version": str(torch.__version__), "cuda_build": torch.version.cuda or "none", "device": "cpu"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    found["threads"] = str(torch.get_num_threads())
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    with uncollected():
        from rustyrl_learner.bench import measure_learner

    config, spec = build_config(read_config(arguments.config)), read_spec(arguments.spec.read_bytes())
    try:
        parts = measure_learner(config, spec, arguments.seconds, arguments.windows)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.buffer.write(msgspec.json.encode(parts))
    return 0


def _parse(told: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rustyrl_learner")
    parser.add_argument("--parent", type=int, default=0, help="die with this process")
    parser.add_argument("--traced", action="store_true", help="let that process and its children look into this one")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser(AWAIT, help="import torch, then wait on standard input for what to do")
    verbs.add_parser("doctor", help="say what torch sees, as JSON")
    bench = verbs.add_parser("bench", help="measure updates, as JSON")
    bench.add_argument("--config", type=Path, required=True)
    bench.add_argument("--spec", type=Path, required=True)
    bench.add_argument("--seconds", type=float, required=True)
    bench.add_argument("--windows", type=int, required=True)
    run = verbs.add_parser("run", help="be the learner of a run folder")
    run.add_argument("--run", type=Path, required=True)
    run.add_argument("--control", required=True)
    run.add_argument("--listen", required=True)
    run.add_argument("--incarnation", type=int, default=0)
    run.add_argument("--expect", type=int, default=1, help="actors that the first batch waits for")
    run.add_argument("--resume", action="store_true")
    run.add_argument("--profile", type=Path, help="folder for a trace of some updates")
    return parser.parse_args(told)


if __name__ == "__main__":
    sys.exit(main())
