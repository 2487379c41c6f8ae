"""``rustyrl bench wire``: how much experience a link carries, and how soon a policy is with every actor.

Everything that a rollout passes between two arrays is included: encode, send, receive, the checks of its header and of
its arrays. The ends are processes of their own, ``python -m rustyrl.bench_wire``, with the environment variables of a
learner and of actors.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np

from rustyrl.channels import Received, RolloutReceiver, RolloutSender, Sent
from rustyrl.errors import RunFailedError, WireError
from rustyrl.parent import die_with_parent
from rustyrl.processes import actor_environment, learner_environment
from rustyrl.rollout import (
    EpisodeRows,
    Rollout,
    RolloutOrigin,
    Ticket,
    allocate_rollout,
    first_final_not_finite,
    first_not_finite,
    vanished,
)
from rustyrl.sockets import has_ipc
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec
from rustyrl.weights import PolicySpec, Weights, encode_weights, weights_layout
from rustyrl.wire import (
    Hello,
    Lease,
    RolloutHeader,
    TicketMessage,
    WeightsHeader,
    decode_rollout,
    decode_weights_message,
    encode_rollout,
)

__all__ = ["SIZES", "RolloutStream", "WeightsFan", "bench_spec", "check_numbers", "measure_wire", "tickets_of"]

SIZES = {"64KB": 64 << 10, "1MB": 1 << 20, "8MB": 8 << 20}
STEPS = 32  # T
OBSERVATION, ACTION = 16, 4  # numbers of a slot
SLOT_BYTES = STEPS * (4 * (OBSERVATION + ACTION + 2) + 3) + 4 * OBSERVATION
ENDS = 8  # episodes of a rollout that end, at most: how many, and how many of them by truncation, changes each time
BUFFERS = 4  # rollouts that the sender has memory for; raw ZeroMQ in benchmarks/wire.py has as many
TICKETS_OUT = 2
ROUND_BYTES = 16 << 20  # what a ticket of this benchmark asks for, in whole rollouts, but not more than ...
LARGEST_ROUND = 128  # ... so many: with two tickets out, as many are on their way as raw ZeroMQ's high-water mark lets
END_STEP = STEPS // 2
SLOTS = np.arange(ENDS, dtype=np.int32)
FINAL_INDEX = np.stack([np.full(ENDS, END_STEP, np.int32), SLOTS], axis=1)
LENGTHS, RETURNS = SLOTS + 100, np.linspace(-1, 1, ENDS, dtype=np.float32)
MAX_PROCESSES = 4  # that the actors of a publication are spread over
DRAIN_SHARE = 0.1  # of a window: what waited since the last one is taken in first
START_S = 60.0
WAIT_S = 30.0  # for anything once it runs

Check = Callable[[Rollout, EnvironmentSpec], None]


def measure_wire(
    sizes: Sequence[int] = tuple(SIZES.values()),
    seconds: float = 1.0,
    windows: int = 5,
    weights_bytes: int = 1 << 20,
    actors: int = 64,
) -> list[dict[str, Any]]:
    """The parts of the wire's benchmark: medians over windows, and half the distance of their quartiles.

    Args:
        sizes: bytes of a rollout, see `SIZES`.
        seconds: of a window.
        windows: of each part.
        weights_bytes: of an encoded policy.
        actors: that it is published to.
    """
    task = _Task(tuple(sizes), seconds, windows, weights_bytes, actors)
    command = [*_command("measure"), msgspec.json.encode(task).decode()]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=learner_environment(), check=False
    )
    if done.returncode:
        raise RunFailedError(f"the benchmark of the wire ended with code {done.returncode}")
    return msgspec.json.decode(done.stdout, type=list[dict[str, Any]])


class _Task(msgspec.Struct):
    """The arguments of `measure_wire` on their way to the process that measures."""

    sizes: tuple[int, ...]
    seconds: float
    windows: int
    weights_bytes: int
    actors: int


def measure(task: _Task) -> list[dict[str, Any]]:
    """Be the process that measures: the learner's end."""
    seconds, windows = task.seconds, task.windows
    parts = []
    for size in task.sizes:
        with RolloutStream(size) as stream:
            rates = [stream.measure(seconds) for _ in range(windows)]
        parts.append(part(f"wire_mb_s_{size_name(size)}", rates, "MB/s"))
    with WeightsFan(task.weights_bytes, task.actors) as fan:
        found = [np.percentile(fan.measure(seconds), (50, 99)) for _ in range(windows)]
    for name, column in zip(("weights_ms_p50", "weights_ms_p99"), zip(*found, strict=True), strict=True):
        parts.append(part(name, [float(value) for value in column], "ms"))
    return parts


def part(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """A part of a benchmark: the median of its windows, and half the distance between their quartiles."""
    if len(values) < 4:
        spread = (max(values) - min(values)) / 2
    else:
        low, _, high = statistics.quantiles(values, method="inclusive")
        spread = (high - low) / 2
    return {"name": name, "value": statistics.median(values), "unit": unit, "spread": spread}


def size_name(size: int) -> str:
    """A rollout's size as it stands in a part's name, like 64KB."""
    return f"{size >> 20}MB" if size >= 1 << 20 else f"{size >> 10}KB"


def bench_spec(size: int) -> EnvironmentSpec:
    """An environment of one world whose rollouts take about so many bytes."""
    return EnvironmentSpec(
        env="bench-wire",
        observation=(ArraySpec("main", (OBSERVATION,), "float32"),),
        action=(ActionSpec("box", shape=(ACTION,), low=(-1.0,) * ACTION, high=(1.0,) * ACTION),),
        slots=max(ENDS, round(size / SLOT_BYTES)),
        step_s=0.02,
        max_episode_steps=1000,
    )


def tickets_of(size: int) -> int:
    """How many rollouts a ticket of this benchmark asks for: so many bytes that nobody waits, and not more."""
    return max(1, min(LARGEST_ROUND, ROUND_BYTES // size))


def check_numbers(rollout: Rollout, spec: EnvironmentSpec) -> None:
    """What takes the learner's receive thread its time when it admits a rollout; raises `WireError`."""
    numbers = {**rollout.observation, **{f"action {name}": array for name, array in rollout.action.items()}}
    numbers |= {"reward": rollout.reward, "behavior_log_prob": rollout.behavior_log_prob}
    if first_not_finite(rollout, numbers) or first_final_not_finite(rollout):
        raise WireError("numbers", "not finite")
    if rollout.slots != spec.slots or vanished(rollout).any() or (rollout.terminated & rollout.truncated).any():
        raise WireError("flags", "not those that were sent")


class RolloutStream:
    """One actor process that sends rollouts of one size as fast as they are taken."""

    def __init__(self, size: int, check: Check = check_numbers) -> None:
        """Start the process and await its hello; ``check`` is what every decoded rollout is put to."""
        self._spec, self._check = bench_spec(size), check
        self._ticket, self._round, self._in_round = 0, tickets_of(size), 0
        with contextlib.ExitStack() as stack:
            self._receiver = stack.enter_context(_receiver())
            self.pid = stack.enter_context(_process("send", self._receiver.address, size)).pid
            (self._peer,) = _await_peers(self._receiver, 1)
            for batch in range(TICKETS_OUT):
                self._order(batch)
            self._close = stack.pop_all().close

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def measure(self, seconds: float) -> float:
        """MB (10^6 bytes) of rollouts per second that arrived, were decoded and checked."""
        self._take(time.monotonic() + seconds * DRAIN_SHARE)  # what waited since the last window
        start = time.monotonic()
        count_bytes = self._take(start + seconds)
        return count_bytes / (time.monotonic() - start) / 1e6

    def _take(self, until: float) -> int:
        """Take in rollouts until that time and at least one; their bytes."""
        count_bytes, deadline = 0, time.monotonic() + WAIT_S
        while time.monotonic() < until or not count_bytes:
            for received in self._receiver.receive(WAIT_S):
                count_bytes += self._take_one(received)
            if time.monotonic() > deadline + max(0.0, until):
                raise RunFailedError(f"no rollout came within {WAIT_S:.0f} s")
        return count_bytes

    def _take_one(self, received: Received) -> int:
        header = received.message
        if not isinstance(header, RolloutHeader):
            raise RunFailedError(f"a rollout was expected, {header!r} came")
        if (header.batch, header.policy_version, header.worlds) != (self._ticket, 0, (0,)):
            raise RunFailedError(f"a rollout answers ticket {header.batch}, {self._ticket} is due")
        self._check(decode_rollout(header, received.blob), self._spec)
        self._in_round += 1
        if self._in_round == self._round:
            self._order(self._ticket + TICKETS_OUT)
            self._ticket, self._in_round = self._ticket + 1, 0
        return len(received.blob)

    def _order(self, batch: int) -> None:
        if not self._receiver.send(self._peer, TicketMessage(0, batch, 0, (0,))):
            raise RunFailedError("the sender is gone")


class WeightsFan:
    """Some actors in a handful of processes that decode every policy that is published to them."""

    def __init__(self, weights_bytes: int, actors: int) -> None:
        """Start the processes and await a hello of every actor."""
        self._blob = encode_weights(bench_weights(weights_bytes))
        self._version = 0
        processes = min(actors, MAX_PROCESSES)
        with contextlib.ExitStack() as stack:
            self._receiver = stack.enter_context(_receiver())
            for index in range(processes):
                count = len(range(index, actors, processes))
                stack.enter_context(_process("decode", self._receiver.address, count))
            self._peers = _await_peers(self._receiver, actors)
            self._close = stack.pop_all().close

    def __enter__(self) -> WeightsFan:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def measure(self, seconds: float) -> list[float]:
        """Milliseconds from the first send to each actor's having decoded it, of what was published in this time."""
        self.publish()
        found: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until or not found:
            found += self.publish()
        return found

    def publish(self) -> list[float]:
        """Publish one version; milliseconds until each actor had decoded it."""
        self._version += 1
        start = time.monotonic_ns()
        for peer in self._peers:
            if not self._receiver.send(peer, WeightsHeader(0, self._version), self._blob):
                raise RunFailedError("an actor is gone")
        ends: list[int] = []
        deadline = time.monotonic() + WAIT_S
        while len(ends) < len(self._peers):
            for received in self._receiver.receive(1.0):
                if isinstance(received.message, Lease):
                    ends.append(received.message.steps)
            if time.monotonic() > deadline:
                raise RunFailedError(f"{len(self._peers) - len(ends)} actors had no policy within {WAIT_S:.0f} s")
        return [(end - start) / 1e6 for end in ends]


def bench_weights(weights_bytes: int) -> Weights:
    """A policy whose arrays take about so many bytes."""
    env = bench_spec(1)
    linear = OBSERVATION + ACTION + 2  # width^2 + linear * width numbers in two hidden layers
    width = max(1, round(math.sqrt((linear / 2) ** 2 + weights_bytes / 4) - linear / 2))
    spec = PolicySpec(env.observation, env.action, (width, width), "tanh", normalize=False)
    noise = np.random.default_rng(0)
    return Weights(spec, {n: noise.standard_normal(s).astype(np.float32) for n, s in weights_layout(spec).items()})


# The other processes


def send_rollouts(address: str, size: int) -> None:
    """Be the actor of a `RolloutStream`: answer every ticket with so many rollouts, until killed."""
    spec = bench_spec(size)
    fingerprint = spec.fingerprint
    rollouts = [fill_rollout(spec, seed) for seed in range(BUFFERS)]
    ends = [(episodes, truncated) for episodes in range(ENDS + 1) for truncated in range(episodes + 1)]
    np.random.default_rng(0).shuffle(ends)
    on_their_way: deque[Sent] = deque()  # the oldest first
    turn = 0
    with RolloutSender(address) as link:
        link.send(Hello(0, 1, os.getpid(), ""), timeout_s=START_S)
        while (received := link.receive(START_S)) is not None:
            if not isinstance(received.message, TicketMessage):
                continue
            for _ in range(tickets_of(size)):
                if len(on_their_way) == BUFFERS:
                    on_their_way.popleft().wait(WAIT_S)  # this memory is about to change
                rollout = rollouts[turn % BUFFERS]
                rollout.origin = RolloutOrigin(fingerprint, "main", received.message.ticket, 0, 0, 1, {"act": 0.5})
                end_episodes(rollout, *ends[turn % len(ends)])
                on_their_way.append(link.send_frames(*encode_rollout(rollout), WAIT_S))
                turn += 1


def fill_rollout(spec: EnvironmentSpec, seed: int) -> Rollout:
    """A rollout with plausible numbers in it, in which no episode ends."""
    noise = np.random.default_rng(seed)
    rollout = allocate_rollout(spec, STEPS, spec.slots, RolloutOrigin("", "", Ticket(0, 0, (0,)), 0, 0, 0))
    numbers = (*rollout.observation.values(), *rollout.action.values(), rollout.behavior_log_prob, rollout.reward)
    for array in numbers:
        array[...] = noise.standard_normal(array.shape)
    rollout.terminated[...], rollout.truncated[...], rollout.valid[...] = False, False, True
    return rollout


def end_episodes(rollout: Rollout, episodes: int, truncated: int) -> None:
    """Have so many episodes end in the middle of a rollout, the first ones by truncation."""
    rollout.truncated[END_STEP] = rollout.terminated[END_STEP] = False
    rollout.truncated[END_STEP, :truncated] = rollout.terminated[END_STEP, truncated:episodes] = True
    rollout.final_index = FINAL_INDEX[:truncated]
    rollout.final_observation = {name: array[END_STEP, :truncated] for name, array in rollout.observation.items()}
    rollout.episodes = EpisodeRows(SLOTS[:episodes], RETURNS[:episodes], LENGTHS[:episodes], {})


def decode_policies(address: str, count: int) -> None:
    """Be some actors of a `WeightsFan`, until killed: decode each policy, and answer with the nanosecond of its end."""
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(RolloutSender(address)) for _ in range(count)]
        for index, link in enumerate(links):
            link.send(Hello(index, 1, os.getpid(), ""), timeout_s=START_S)
        while True:
            ends = []
            for link in links:  # they are sent in one order: who waits here is decoded when its turn comes
                received = link.receive(START_S)
                if received is None:
                    return
                decode_weights_message(received.blob)
                ends.append(time.monotonic_ns())
            for link, end in zip(links, ends, strict=True):
                link.send(Lease(end), timeout_s=WAIT_S)


@contextmanager
def _receiver() -> Iterator[RolloutReceiver]:
    """The learner's end of a link, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="rustyrl-") as folder:
        with RolloutReceiver(f"ipc://{folder}/link" if has_ipc() else "tcp://127.0.0.1:*") as receiver:
            yield receiver


@contextmanager
def _process(role: str, address: str, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """One of the other processes, killed at the end."""
    command = [*_command(role), address, str(number)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=actor_environment())
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)


def _command(role: str) -> list[str]:
    return [sys.executable, "-m", "rustyrl.bench_wire", "--parent", str(os.getpid()), role]


def _await_peers(receiver: RolloutReceiver, count: int) -> list[bytes]:
    peers: list[bytes] = []
    deadline = time.monotonic() + START_S
    while len(peers) < count:
        if time.monotonic() > deadline:
            raise RunFailedError(f"{len(peers)} of {count} benchmark actors came within {START_S:.0f} s")
        peers += [received.peer for received in receiver.receive(1.0) if isinstance(received.message, Hello)]
    return peers


def main() -> None:
    """Be one of the other processes."""
    parser = argparse.ArgumentParser(prog="python -m rustyrl.bench_wire")
    parser.add_argument("--parent", type=int, default=0, help="die with this process")
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("measure").add_argument("task")
    for name in ("send", "decode"):
        role = roles.add_parser(name)
        role.add_argument("address")
        role.add_argument("number", type=int)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    match arguments.role:
        case "measure":
            sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(arguments.task, type=_Task))))
        case "send":
            send_rollouts(arguments.address, arguments.number)
        case "decode":
            decode_policies(arguments.address, arguments.number)


if __name__ == "__main__":
    main()
