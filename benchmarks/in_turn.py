"""Compare clusters on a machine whose speed changes all the time: all but one are stopped, and each goes on in turn.

    python benchmarks/in_turn.py --env cartpole --variant cluster.actor_niceness=0 --variant cluster.actor_niceness=19

All variants train without end, except that each is stopped (SIGSTOP) while another has its window. A ratio is of
windows of one round, less than a second apart, so what else the machine does falls on both: forty rounds told 2 % apart
where whole runs one after the other swung by 20. The first variant is what the others are held against.

A variant is settings, separated by spaces, on top of those that throughput is compared by. ``checkout=FOLDER`` runs the
code of another checkout, compiled there, and ``NAME=VALUE`` in capitals sets a variable of the environment. Name one
twice to see what the measurement does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from training import RUSTYRL

from rustyrl.bench import BENCH_CARTPOLE
from rustyrl.processes import available_cores

START_S, SETTLE_S = 60.0, 2.0
WAKE_S = 0.1  # of a window, in which caches are filled again
LEASE = "cluster.lease_s=600"  # who is stopped is not given up


class Variant:
    """A cluster that trains without end and is stopped but for its windows."""

    def __init__(self, env: str, settings: str, folder: Path) -> None:
        """Start it; return once it has trained for a while, stopped."""
        self.settings, self._members = settings, list[int]()
        self._metrics = folder / "run" / "metrics.jsonl"
        common = [f"{name}.{key}={json.dumps(keys[key])}" for name, keys in BENCH_CARTPOLE.items() for key in keys]
        given, environment = [*common, LEASE], dict(os.environ)
        for setting in settings.split():
            name, _, value = setting.partition("=")
            if name == "checkout":
                root = Path(value).absolute()
                environment["PYTHONPATH"] = os.pathsep.join(str(root / part) for part in ("", "actors", "learner"))
            elif name.isupper():
                environment[name] = value
            else:
                given.append(setting)
        command = [*RUSTYRL, "train", env, "--run", str(folder / "run"), "--total-steps", str(10**15)]
        command += [argument for setting in given for argument in ("--set", setting)]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not (self._metrics.exists() and self._metrics.stat().st_size):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise SystemExit(f"{settings}: no update within {START_S:.0f} s:\n{(folder / 'log').read_text()}")
            time.sleep(0.05)
        time.sleep(SETTLE_S)
        self._members = [
            self._process.pid,
            *(p.pid for p in psutil.Process(self._process.pid).children(recursive=True)),
        ]
        self._signal(signal.SIGSTOP)

    def measure(self, seconds: float) -> tuple[float, float]:
        """Go on for a window: trained env steps a second, and how many cores were busy with it."""
        offset, before_s, start = self._metrics.stat().st_size, self._cpu_s(), time.monotonic()
        self._signal(signal.SIGCONT)
        time.sleep(WAKE_S + seconds)
        self._signal(signal.SIGSTOP)
        busy = (self._cpu_s() - before_s) / (time.monotonic() - start)
        with self._metrics.open("rb") as lines:
            lines.seek(offset)
            rows = [json.loads(line) for line in lines if line.endswith(b"\n") and line.startswith(b"{")]
        rows = [row for row in rows if row["seconds"] > rows[0]["seconds"] + WAKE_S]
        if len(rows) < 2:
            raise SystemExit(f"{self.settings}: no two updates in a window of {seconds:g} s; raise --seconds")
        first, last = rows[0], rows[-1]
        return (last["steps"] - first["steps"]) / (last["seconds"] - first["seconds"]), busy

    def close(self) -> None:
        """End it at once: nobody wants what it learned."""
        self._process.kill()  # the others die with it
        self._signal(signal.SIGKILL)
        self._process.wait(START_S)

    def _signal(self, number: signal.Signals) -> None:
        for member in self._members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, number)

    def _cpu_s(self) -> float:
        times = [psutil.Process(member).cpu_times() for member in self._members if psutil.pid_exists(member)]
        return float(sum(taken.user + taken.system for taken in times))


@contextlib.contextmanager
def started(env: str, settings: list[str]) -> Iterator[list[Variant]]:
    """All variants, stopped."""
    with contextlib.ExitStack() as stack:
        variants = []
        for setting in settings:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rustyrl-")))
            variants.append(Variant(env, setting, folder))
            stack.callback(variants[-1].close)
        yield variants


def compare(variants: list[Variant], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each variant: medians of its windows, and of the ratios to the first one's of the same round."""
    found: list[list[tuple[float, float]]] = [[] for _ in variants]
    for turn in range(rounds):
        order = [(turn + index) % len(variants) for index in range(len(variants))]
        for index in order if turn % 2 else reversed(order):
            found[index].append(variants[index].measure(seconds))
    rows = []
    for variant, windows in zip(variants, found, strict=True):
        ratios = [sps / base for (sps, _), (base, _) in zip(windows, found[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row: dict[str, Any] = {"variant": variant.settings, "sps": round(statistics.median(sps for sps, _ in windows))}
        row |= {"busy_cores": round(statistics.median(busy for _, busy in windows), 2), "ratio": round(middle, 3)}
        row |= {"ratio_quartiles": [round(low, 3), round(high, 3)]}
        row["ratio_error"] = round(1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5, 3)  # of a median
        rows.append(row)
    return rows


def main() -> None:
    """Start, take turns, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="cartpole")
    parser.add_argument("--variant", action="append", required=True, help="settings, separated by spaces; repeat it")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.7, help="of a window")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if len(arguments.variant) < 2 or arguments.rounds < 2:
        parser.error("two variants and two rounds are the least that can be compared")
    with started(arguments.env, arguments.variant) as variants:
        rows = compare(variants, arguments.rounds, arguments.seconds)
    for row in rows:
        counts = "{sps:9,} env steps/s, {busy_cores:.2f} cores busy".format(**row)
        print(counts + ", {ratio:.3f} +- {ratio_error:.3f} times: {variant}".format(**row))
    if arguments.json:
        given = " ".join(f"--variant '{variant}'" for variant in arguments.variant)
        command = f"python benchmarks/in_turn.py --env {arguments.env} --rounds {arguments.rounds} {given}"
        content = {"command": command, "cores": available_cores(), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
