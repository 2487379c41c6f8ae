"""``python -m rustyrl_actors``: what the launcher and the command line start; not for users."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from rustyrl.black_box import BlackBox
from rustyrl.errors import ContractError, RunFailedError, UsageError
from rustyrl.keys import MAX_KEY_BYTES, ActorKey, parse_actor_key, read_actor_key
from rustyrl.parent import allow_tracing, die_with_parent
from rustyrl.spare import AWAIT, await_orders
from rustyrl.spec import spec_to_json
from rustyrl.weights import PolicySpec, read_policy
from rustyrl_actors.actor import run_actor
from rustyrl_actors.catalog import BUILT_IN, find_environment
from rustyrl_actors.evaluate import evaluate
from rustyrl_actors.testing import check_environment


def main(told: list[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 1 for a failed run, 2 for bad use, 3 for a world that broke its contract."""
    arguments = _parse(told)
    die_with_parent(arguments.parent)
    if arguments.verb == AWAIT:
        return main(await_orders())
    if arguments.traced:
        allow_tracing(arguments.parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        with _results_only() as results:
            _run(arguments, results)
    except ContractError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except (UsageError, RunFailedError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


@contextmanager
def _results_only() -> Iterator[BinaryIO]:
    """Keep standard output for results: what a world prints goes to standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)
        sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
        yield results


class _Forgiving:
    """A text stream that loses what there is no room for on its disk: no reason for a world that prints to fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or do not."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do not."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _run(arguments: argparse.Namespace, results: BinaryIO) -> None:
    match arguments.verb:
        case "run":
            _explain_ends()
            box = BlackBox(arguments.black_box) if arguments.black_box >= 0 else None
            key = _actor_key(arguments.key) if arguments.key else None
            run_actor(arguments.join, arguments.index, arguments.incarnation or secrets.randbits(62), box, key)
        case "describe":
            results.write(spec_to_json(find_environment(arguments.env, _env_config(arguments)).spec))
        case "evaluate":
            weights = read_policy(arguments.policy)
            config = _env_config(arguments)
            result = evaluate(arguments.env, config, weights, arguments.episodes, arguments.seed)
            results.write(msgspec.json.encode(result))
        case "check":
            findings, speed = check_environment(arguments.env, _env_config(arguments), seed=arguments.seed)
            results.write(msgspec.json.encode({"findings": findings, "speed": speed}))
        case "bench":
            from rustyrl_actors.bench import measure_actor  # of no use to an actor that starts

            config, spec = _env_config(arguments), msgspec.json.decode(arguments.policy_spec, type=PolicySpec)
            shape, windows = (arguments.worlds, arguments.unroll_length), (arguments.seconds, arguments.windows)
            results.write(msgspec.json.encode(measure_actor(arguments.env, config, spec, *shape, *windows)))
        case "envs":
            rows = [
                {"env": found.spec.env, "about": found.about, "fingerprint": found.spec.fingerprint, "spec": found.spec}
                for found in (find_environment(env, {}) for env in sorted(BUILT_IN))
            ]
            results.write(msgspec.json.encode(rows))


def _actor_key(source: str) -> ActorKey:
    if source != "-":
        return read_actor_key(Path(source))
    return parse_actor_key(sys.stdin.buffer.read(MAX_KEY_BYTES + 1), "standard input")


def _explain_ends() -> None:
    """Have a crash in native code, and whoever asks by a signal, print where every thread is; end well on SIGTERM."""
    faulthandler.enable()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # through what closes and says goodbye
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)


def _parse(told: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rustyrl_actors")
    parser.add_argument("--parent", type=int, default=0, help="die with this process")
    parser.add_argument("--traced", action="store_true", help="let that process and its children look into this one")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="be an actor")
    run.add_argument("--join", required=True)
    run.add_argument("--key", help="the file with the key to join with; - is standard input")
    run.add_argument("--index", type=int, default=-1)
    run.add_argument("--incarnation", type=int, default=0, help="0 draws one")
    run.add_argument("--black-box", type=int, default=-1, help="an inherited file descriptor")
    verbs.add_parser(AWAIT, help="wait on standard input for what to do")
    verbs.add_parser("envs", help="list the built-in environments as JSON")
    for name in ("describe", "evaluate", "check", "bench"):
        verb = verbs.add_parser(name)
        verb.add_argument("env")
        verb.add_argument("--env-config", default="{}", help="JSON: slots and parameters")
        if name == "evaluate":
            verb.add_argument("--policy", type=Path, required=True)
            verb.add_argument("--episodes", type=int, default=400)
        if name == "bench":
            verb.add_argument("--policy-spec", required=True, help="JSON")
            verb.add_argument("--worlds", type=int, required=True)
            verb.add_argument("--unroll-length", type=int, required=True)
            verb.add_argument("--seconds", type=float, required=True)
            verb.add_argument("--windows", type=int, required=True)
        if name in ("evaluate", "check"):
            verb.add_argument("--seed", type=int, default=0)
    return parser.parse_args(told)


def _env_config(arguments: argparse.Namespace) -> dict[str, bool | int | float | str]:
    return msgspec.json.decode(arguments.env_config, type=dict[str, bool | int | float | str])


if __name__ == "__main__":
    sys.exit(main())
