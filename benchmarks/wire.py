"""Our links beside raw pyzmq: MB/s of rollouts from one process to another, and a policy published to 64 actors.

    python benchmarks/wire.py --json benchmarks/results/wire.json

Windows of the two are interleaved, and a ratio is of neighbours, so what else the machine does falls on both.
``raw`` is DEALER to ROUTER with copy=False and tracked sends from as many buffers: the same bytes, in two frames.
``decoded`` encodes each rollout, and checks its header and that its arrays are what that says when it has come;
``finite`` looks for numbers that are not finite as well, and ``admitted`` has the learner's whole admission instead
(rustyrl_learner/ingest.py). ``cpu_us_mb`` is what both processes spend on a MB, which other programs disturb less than
the rate; ``stages_us`` times one thread at a time.
Goals: decoded at least 80 % of raw at every size; 1 MB of weights with 64 actors within 60 ms (99th percentile).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq

from rustyrl.bench_wire import (
    BUFFERS,
    DRAIN_SHARE,
    ROUND_BYTES,
    SIZES,
    STEPS,
    RolloutStream,
    WeightsFan,
    bench_spec,
    check_numbers,
    end_episodes,
    fill_rollout,
)
from rustyrl.processes import actor_environment, available_cores, learner_environment
from rustyrl.rollout import Rollout
from rustyrl.spec import EnvironmentSpec
from rustyrl.wire import decode_header, decode_rollout, encode_rollout
from rustyrl_learner.ingest import admit

RATIO_GOAL, WEIGHTS_GOAL_MS = 0.8, 60.0
HEADER_BYTES = 600  # about what a rollout's header takes


class RawStream:
    """One process that sends messages of one size over a bare DEALER as fast as they are taken."""

    def __init__(self, size: int) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rustyrl-"))
            context = stack.enter_context(zmq.Context())
            self._router = stack.enter_context(context.socket(zmq.ROUTER))
            self._router.setsockopt(zmq.LINGER, 0)
            self._router.setsockopt(zmq.RCVHWM, max(1, ROUND_BYTES // size))
            self._router.bind(f"ipc://{folder}/link")
            command = [sys.executable, __file__, "--raw-sender", f"ipc://{folder}/link", str(size)]
            process = subprocess.Popen(command, env=actor_environment())
            self.pid = process.pid
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            self._router.recv_multipart(copy=False)
            self._close = stack.pop_all().close

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def measure(self, seconds: float) -> float:
        """MB per second that arrived."""
        self._take(time.monotonic() + seconds * DRAIN_SHARE)
        start = time.monotonic()
        count_bytes = self._take(start + seconds)
        return count_bytes / (time.monotonic() - start) / 1e6

    def _take(self, until: float) -> int:
        count_bytes = 0
        while time.monotonic() < until or not count_bytes:
            if not self._router.poll(30_000):
                raise SystemExit("the raw sender sends nothing")
            count_bytes += len(self._router.recv_multipart(copy=False)[2])
        return count_bytes


def send_raw(address: str, size: int) -> None:
    """Be the process of a `RawStream`, until killed."""
    blobs = [np.random.default_rng(seed).bytes(size) for seed in range(BUFFERS)]
    header, sent, parent = bytes(HEADER_BYTES), [zmq.MessageTracker()] * BUFFERS, os.getppid()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDHWM, max(1, ROUND_BYTES // size))
        dealer.connect(address)
        turn = 0
        while os.getppid() == parent:
            sent[turn % BUFFERS].wait(30)
            sent[turn % BUFFERS] = dealer.send_multipart([header, blobs[turn % BUFFERS]], copy=False, track=True)
            turn += 1


def leave_rollout(_rollout: Rollout, _spec: EnvironmentSpec) -> None:
    """Nothing beside decoding."""


def admit_rollout(rollout: Rollout, spec: EnvironmentSpec) -> None:
    """What the learner's receive thread does with a decoded rollout before it is placed into a batch."""
    admit(rollout, spec, STEPS, 0)


def compare(name: str, seconds: float, windows: int) -> dict[str, Any]:
    """A row of the table: medians of interleaved windows, and of the ratios of neighbours."""
    size = SIZES[name]
    checks = {"decoded": leave_rollout, "finite": check_numbers, "admitted": admit_rollout}
    with contextlib.ExitStack() as stack:
        streams: dict[str, RawStream | RolloutStream] = {"raw": stack.enter_context(RawStream(size))}
        streams |= {name: stack.enter_context(RolloutStream(size, check)) for name, check in checks.items()}
        rates: dict[str, list[float]] = {stream: [] for stream in streams}
        costs: dict[str, list[float]] = {stream: [] for stream in streams}
        for _ in range(windows):
            for stream, measured in streams.items():
                before_s = cpu_s(measured.pid)
                rates[stream].append(measured.measure(seconds))
                moved = rates[stream][-1] * seconds * (1 + DRAIN_SHARE)
                costs[stream].append((cpu_s(measured.pid) - before_s) / moved * 1e6)
    row: dict[str, Any] = {"size": name}
    row |= {f"{stream}_mb_s": round(statistics.median(values), 1) for stream, values in rates.items()}
    row |= {f"{stream}_best_mb_s": round(max(values), 1) for stream, values in rates.items()}
    row |= {f"{stream}_cpu_us_mb": round(statistics.median(values), 1) for stream, values in costs.items()}
    for stream in checks:
        ratios = [mine / its for mine, its in zip(rates[stream], rates["raw"], strict=True)]
        row[f"{stream}_to_raw"] = round(statistics.median(ratios), 3)
        row[f"{stream}_to_raw_quartiles"] = [round(float(q), 3) for q in np.percentile(ratios, (25, 75))]
        row[f"{stream}_to_raw_best"] = round(max(rates[stream]) / max(rates["raw"]), 3)
    return row | {"stages_us": stages(size)}


def cpu_s(sender: int) -> float:
    """CPU seconds that this process and the sender have taken."""
    times = psutil.Process(sender).cpu_times()
    return time.process_time() + float(times.user + times.system)


def stages(size: int, rounds: int = 200) -> dict[str, float]:
    """Microseconds of this thread's own time for each thing that is done to a rollout beside its transport."""
    spec = bench_spec(size)
    rollout = fill_rollout(spec, 0)
    end_episodes(rollout, 4, 4)
    rollout.origin = type(rollout.origin)(spec.fingerprint, "main", rollout.origin.ticket, 0, 0, 1, {"act": 0.5})
    frame, blob = encode_rollout(rollout)
    header = decode_header(frame)
    decoded = decode_rollout(header, blob)
    steps: dict[str, Callable[[], Any]] = {
        "encode": lambda: encode_rollout(rollout),
        "decode_header": lambda: decode_header(frame),
        "decode_rollout": lambda: decode_rollout(header, blob),
        "check_numbers": lambda: check_numbers(decoded, spec),
        "admit": lambda: admit_rollout(decoded, spec),
    }
    return {name: round(thread_us(step, rounds), 1) for name, step in steps.items()}


def thread_us(step: Callable[[], Any], rounds: int) -> float:
    """The fastest of five goes, in microseconds a call."""
    goes = []
    for _ in range(5):
        start = time.thread_time()
        for _ in range(rounds // 5):
            step()
        goes.append((time.thread_time() - start) / (rounds // 5))
    return min(goes) * 1e6


def publish(weights_bytes: int, actors: int, seconds: float, windows: int) -> dict[str, Any]:
    """Milliseconds until every actor had decoded a policy."""
    with WeightsFan(weights_bytes, actors) as fan:
        found = [np.percentile(fan.measure(seconds), (50, 99, 100)) for _ in range(windows)]
    p50, p99, most = (round(float(value), 2) for value in np.median(found, axis=0))
    return {"weights_bytes": weights_bytes, "actors": actors, "ms_p50": p50, "ms_p99": p99, "ms_max": most}


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.25, help="of a window")
    parser.add_argument("--windows", type=int, default=25)
    parser.add_argument("--size", choices=SIZES, action="append", help="repeatable; default all")
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument("--weights-bytes", type=int, default=1 << 20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--raw-sender", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.raw_sender:
        send_raw(arguments.raw_sender[0], int(arguments.raw_sender[1]))
        return
    if os.environ != learner_environment():  # as the process that receives in a run
        os.execve(sys.executable, [sys.executable, *sys.argv], learner_environment())
    load_before = os.getloadavg()[0]
    rows = [compare(name, arguments.seconds, arguments.windows) for name in arguments.size or SIZES]
    for row in rows:
        print(
            f"{row['size']:>5}: raw {row['raw_mb_s']:7.0f} MB/s, decoded {row['decoded_mb_s']:7.0f} "
            f"({row['decoded_to_raw']:.0%} of raw, of best windows {row['decoded_to_raw_best']:.0%}, "
            f"goal {RATIO_GOAL:.0%}), finite {row['finite_to_raw']:.0%}, admitted {row['admitted_to_raw']:.0%}; "
            f"CPU us/MB: raw {row['raw_cpu_us_mb']:.0f}, decoded {row['decoded_cpu_us_mb']:.0f}, "
            f"finite {row['finite_cpu_us_mb']:.0f}, admitted {row['admitted_cpu_us_mb']:.0f}; us: "
            + ", ".join(f"{stage} {value:.0f}" for stage, value in row["stages_us"].items())
        )
    weights = publish(arguments.weights_bytes, arguments.actors, arguments.seconds, arguments.windows)
    print(
        f"{weights['weights_bytes'] / 1e6:.2f} MB of weights to {weights['actors']} actors: "
        f"p50 {weights['ms_p50']:.1f} ms, p99 {weights['ms_p99']:.1f} ms (goal {WEIGHTS_GOAL_MS:.0f})"
    )
    if arguments.json:
        machine = {
            "cores": available_cores(),
            "load_before_and_after": [round(load_before, 1), round(os.getloadavg()[0], 1)],
            "processor": platform.machine(),
            "python": platform.python_version(),
            "pyzmq": zmq.__version__,
            "libzmq": zmq.zmq_version(),
        }
        command = f"python benchmarks/wire.py --seconds {arguments.seconds:g} --windows {arguments.windows}"
        content = {"command": command, "machine": machine, "rows": rows, "weights": weights}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
