"""Everything that reads bytes which others may have written, seeds for it, and ways to change them.

tests/test_fuzz.py tries some changes of each in the default run, ``make fuzz`` a million.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import zmq
from test_wire import MESSAGES, ORIGIN, SLOTS, SPEC, T, make_weights

from rustyrl.channels import _check_frames
from rustyrl.config import Config, build_config, config_to_toml, parse_assignments, read_config
from rustyrl.control import decode_control
from rustyrl.curve import make_pair
from rustyrl.errors import ContractError, RunFailedError, UsageError, WireError
from rustyrl.keys import ActorKey, parse_actor_key
from rustyrl.rollout import EpisodeRows, Rollout, allocate_rollout
from rustyrl.run_folder import Best, ClusterFile, read_best, read_cluster
from rustyrl.spec import read_spec, spec_to_json
from rustyrl.weights import decode_weights, encode_weights
from rustyrl.wire import (
    RolloutHeader,
    WorldState,
    decode_header,
    decode_rollout,
    decode_weights_message,
    decode_world_state,
    encode_message,
    encode_rollout,
    encode_world_state,
)
from rustyrl_learner.checkpoint import FORMAT, Counters, Manifest
from rustyrl_learner.checkpoint import _read as read_checkpoint
from rustyrl_learner.ingest import admit

LIMIT_S = 2.0  # for one input of a few kB
MEMORY_BYTES = 1 << 30  # more than this process had before
INTERESTING = [
    0,
    1,
    2,
    63,
    64,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
    -1,
]


@dataclass(frozen=True)
class Target:
    """One reader of bytes.

    seeds: what it should be able to read
    read: reads
    expected: what it may raise
    parts: takes bytes apart and joins what it made of them, for changes of structure; None where there is none
    cost: what one reading takes, about, in readings of a header
    """

    seeds: list[bytes]
    read: Callable[[bytes], object]
    expected: tuple[type[Exception], ...]
    parts: tuple[Callable[[bytes], Any], Callable[[Any], bytes]] | None = None
    cost: int = 1


def join(header: bytes, blob: bytes) -> bytes:
    """Two frames as one string of bytes."""
    return len(header).to_bytes(4, "big") + header + blob


def split(content: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(content[:4], "big")
    return content[4 : 4 + size], content[4 + size :]


def read_message(content: bytes) -> None:
    """Both frames, as far as the learner or an actor follows them."""
    frame, blob = split(content)
    header = decode_header(frame)
    if isinstance(header, RolloutHeader):
        rollout = decode_rollout(header, memoryview(blob))
        admit(rollout, SPEC, T, ORIGIN.learner_incarnation)
    elif isinstance(header, WorldState):
        decode_world_state(header, memoryview(blob))


def read_frames(content: bytes) -> None:
    """A message as the sockets give it: it is never raised for, whatever it is."""
    size = content[0] % 5 if content else 0
    edges = [1 + (len(content) - 1) * part // max(1, size) for part in range(size + 1)]
    frames = [zmq.Frame(content[a:b]) for a, b in itertools.pairwise(edges)]
    frames[1:2] = [zmq.Frame(part) for part in split(content)] if size == 3 else frames[1:2]
    _check_frames([zmq.Frame(b"peer"), *frames])


def reader(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """What reads a file, as what reads its content."""

    def written(content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return written


def read_manifest(folder: Path) -> Callable[[bytes], object]:
    def written(content: bytes) -> object:
        (folder / "manifest.json").write_bytes(content)
        (folder / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
        return read_checkpoint(folder)

    return written


def read_assignments(content: bytes) -> object:
    lines = content.decode("utf-8", "replace").split("\n")
    return build_config(parse_assignments(lines))


def unpack_frames(content: bytes) -> Any:
    frame, blob = split(content)
    return [msgpack.unpackb(frame), blob]


def pack_frames(parts: Any) -> bytes:
    header, blob = parts if isinstance(parts, list) and len(parts) == 2 else (parts, b"")
    return join(msgpack.packb(header, default=str), blob if isinstance(blob, bytes) else b"")


JSON = (msgspec.json.decode, lambda value: msgspec.json.encode(value))
MESSAGE = (unpack_frames, pack_frames)


def unpack_weights(content: bytes) -> Any:
    size = int.from_bytes(content[:8], "little")
    header = msgspec.json.decode(content[8 : 8 + size])
    header["__metadata__"] = {name: msgspec.json.decode(value) for name, value in header["__metadata__"].items()}
    return [header, content[8 + size :]]


def pack_weights(parts: Any) -> bytes:
    header, data = parts
    if isinstance(header, dict) and isinstance(about := header.get("__metadata__"), dict):
        written = {str(name): msgspec.json.encode(value).decode() for name, value in about.items()}
        header = {**header, "__metadata__": written}
    encoded = msgspec.json.encode(header)
    return len(encoded).to_bytes(8, "little") + encoded + (data if isinstance(data, bytes) else b"")


def sound_rollout() -> Rollout:
    """One that is admitted, with two truncated steps and their episodes."""
    rollout = allocate_rollout(SPEC, T, SLOTS, ORIGIN)
    rng = np.random.default_rng(1)
    numbers = [*rollout.observation.values(), rollout.action["main"], rollout.reward, rollout.behavior_log_prob]
    for array in numbers:
        array[...] = rng.normal(size=array.shape)
    rollout.action["gait"][...] = rng.integers(0, 2, rollout.action["gait"].shape)
    rollout.action_mask["gait"][...] = rollout.valid[...] = True
    rollout.terminated[...] = rollout.truncated[...] = False
    rollout.final_index = np.array([[1, 0], [3, 5]], np.int32)
    for t, slot in rollout.final_index:
        rollout.truncated[t, slot] = True
    rollout.final_observation = {a.name: np.ones((2, *a.shape), np.float32) for a in SPEC.observation}
    ones, slots = np.ones(2, np.float32), np.array([0, 5], np.int32)
    rollout.episodes = EpisodeRows(slots, ones, slots, dict.fromkeys(SPEC.episode_metrics, ones))
    return rollout


def targets(folder: Path) -> dict[str, Target]:
    """Every reader by its name; ``folder`` is for those that read files."""
    state, blob = encode_world_state(3, 7, 1, {"x": np.arange(6.0).reshape(2, 3), "on": np.array([True, False])})
    small = [message for message in MESSAGES.values() if not isinstance(message, RolloutHeader | WorldState)]
    messages = [join(encode_message(message), b"") for message in small]
    frame, rollout = encode_rollout(sound_rollout())
    full = [join(frame, bytes(rollout)), join(encode_message(state), bytes(blob))]
    weights = encode_weights(make_weights())
    public, secret = make_pair()
    key = msgspec.json.encode(ActorKey("rustyrl actor key: secret", "lab", public, public, secret))
    cluster = ClusterFile("drone", "running", 7, "ipc:///x", "ipc:///y", 3, 1.5)
    (folder / "learner.safetensors").write_bytes(b"x")
    digest = {"learner.safetensors": hashlib.sha256(b"x").hexdigest()}
    manifest = msgspec.json.encode(Manifest(Counters(3, 4, 5.0, 0.1), SPEC.fingerprint, 0, digest, FORMAT))
    orders = [b'{"kind":"status"}', b'{"kind":"scale","actors":"+2","now":true}', b'{"kind":"relieve","index":3}']
    settings = config_to_toml(Config()).encode()
    assignments = b"run.seed=7\nenv.wind=0.5\nbatch.worlds=8\nrun.stop_at=['a>=1']\nppo.clip=0.1"
    wire, usage = (WireError,), (UsageError,)
    return {
        "message": Target(messages + full, read_message, (WireError, ContractError), MESSAGE, 2),
        "frames": Target(messages + full, read_frames, (), MESSAGE, 2),
        "weights": Target([weights], lambda content: decode_weights_message(memoryview(content)), wire),
        "policy": Target([weights], decode_weights, wire, (unpack_weights, pack_weights), 2),
        "spec": Target([spec_to_json(SPEC)], read_spec, (msgspec.DecodeError,), JSON),
        "control": Target(orders, decode_control, (), JSON),
        "key": Target([key], lambda content: parse_actor_key(content, "FILE"), usage, JSON),
        "assignments": Target([assignments], read_assignments, usage, None, 4),
        "config": Target([settings], reader(folder, "c.toml", lambda p: build_config(read_config(p))), usage, None, 20),
        "cluster": Target(
            [msgspec.json.encode(cluster)],
            reader(folder, "cluster.json", lambda p: read_cluster(p.parent)),
            (),
            JSON,
            8,
        ),
        "best": Target(
            [msgspec.json.encode(Best(3, -0.5, 1.5))],
            reader(folder, "best.json", lambda p: read_best(p.parent)),
            (),
            JSON,
            8,
        ),
        "manifest": Target(
            [manifest], read_manifest(folder), (OSError, ValueError, RecursionError, RunFailedError), JSON, 10
        ),
    }


def mutate(draw: random.Random, target: Target) -> bytes:
    """A seed of a target with some changes."""
    content = draw.choice(target.seeds)
    if target.parts is not None and draw.random() < 0.5:
        take_apart, put_together = target.parts
        with contextlib.suppress(TypeError, ValueError, OverflowError, RecursionError, AttributeError):  # no such bytes
            content = put_together(exchange(draw, take_apart(content)))
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        content = draw.choice(CHANGES)(draw, bytearray(content), target)
    return bytes(content)


def flip(draw: random.Random, content: bytearray, _target: Target) -> bytes:
    for _ in range(draw.randint(1, 4)):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def truncate(draw: random.Random, content: bytearray, _target: Target) -> bytes:
    return bytes(content[: draw.randint(0, len(content))])


def overwrite(draw: random.Random, content: bytearray, _target: Target) -> bytes:
    """Put a number where one may be, a length perhaps."""
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice(INTERESTING) % (1 << 8 * size)
    place = draw.randint(0, max(0, len(content) - size))
    content[place : place + size] = number.to_bytes(size, draw.choice(("big", "little")))
    return bytes(content)


def splice(draw: random.Random, content: bytearray, target: Target) -> bytes:
    """The beginning of one, the end of another."""
    other = draw.choice(target.seeds)
    return bytes(content[: draw.randint(0, len(content))]) + other[draw.randint(0, len(other)) :]


def repeat(draw: random.Random, content: bytearray, _target: Target) -> bytes:
    begin, end = sorted((draw.randint(0, len(content)), draw.randint(0, len(content))))
    times = draw.choice((0, 2, 3, 100, 2000)) if end - begin < 8 else draw.choice((0, 2))
    return bytes(content[:begin] + content[begin:end] * times + content[end:])


def nest(draw: random.Random, content: bytearray, _target: Target) -> bytes:
    """Lists within lists, or maps within maps, as deep as no reader expects."""
    place = draw.randint(0, len(content))
    deep = draw.choice((b"[", b'{"x":', b"\x91", b"\x81\xa1x", b"x = [")) * draw.choice((20, 600, 3000))
    return bytes(content[:place]) + deep + bytes(content[place:])


CHANGES = [flip, flip, truncate, overwrite, splice, repeat, nest]


def exchange(draw: random.Random, value: Any) -> Any:
    """The value with one part, at any depth, replaced, removed, repeated or renamed."""
    if draw.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return anything(draw, 3)
    if isinstance(value, dict):
        key, how = draw.choice(list(value)), draw.randrange(4)
        if how == 0:
            return {name: part for name, part in value.items() if name != key}
        if how == 1:
            return {
                **value,
                anything(draw, 0) if draw.random() < 0.3 else f"more{draw.randrange(9)}": anything(draw, 2),
            }
        return {**value, key: exchange(draw, value[key])}
    place, how = draw.randrange(len(value)), draw.randrange(4)
    middle = [[], [value[place]] * draw.choice((2, 1100)), *[[exchange(draw, value[place])]] * 2][how]
    return [*value[:place], *middle, *value[place + 1 :]]


def anything(draw: random.Random, depth: int) -> Any:
    choice = draw.randrange(9 if depth else 7)
    match choice:
        case 0:
            return None
        case 1:
            return draw.random() < 0.5
        case 2 | 3:
            return draw.choice(INTERESTING)
        case 4:
            return draw.choice((0.0, -0.5, 1e300, float("nan"), float("inf")))
        case 5:
            return draw.choice(("", "x", "main", "\x1b[2J", "\u00e9" * 40, "x" * 5000, "../../x", "float32", "reward"))
        case 6:
            return draw.choice((b"", b"\xff", b"x" * 9))
        case 7:
            return [anything(draw, depth - 1) for _ in range(draw.randrange(5))]
    return {draw.choice(("type", "name", "shape", "worlds", "kind", "x")): anything(draw, depth - 1) for _ in range(3)}


@dataclass
class Findings:
    """What came out that should not have, and how many of each outcome."""

    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def try_one(self, target: Target, content: bytes) -> None:
        """Read bytes; remember it if something else than an expected refusal comes out, or it takes too long."""
        since = time.thread_time()  # of this thread: what other processes take is not its fault
        try:
            target.read(content)
        except target.expected:
            self.refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failures.append(f"{content.hex()}\n{traceback.format_exc(limit=-3)}")
        else:
            self.read += 1
        took = time.thread_time() - since
        self.slowest_s = max(self.slowest_s, took)
        if took > LIMIT_S:
            self.failures.append(f"{content.hex()}\ntook {took:.1f} s of CPU")


def main() -> int:
    """Change seeds for so long, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
    failed, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = targets(Path(folder))
        shares = {name: 1 / target.cost for name, target in found.items()}
        for name, target in found.items():
            draw, findings = random.Random(f"{arguments.seed} {name}"), Findings()
            count, since = round(arguments.mutations * shares[name] / sum(shares.values())), time.monotonic()
            for _ in range(count):
                findings.try_one(target, mutate(draw, target))
            rate = count / (time.monotonic() - since)
            print(
                f"{name:<12} {count:>8,} mutations of {len(target.seeds):>2} seeds, {rate:>7,.0f}/s: "
                f"{findings.read:,} read, {findings.refused:,} refused, slowest {1000 * findings.slowest_s:.1f} ms, "
                f"{len(findings.failures)} failures"
            )
            for failure in findings.failures[:3]:
                print(failure, file=sys.stderr)
            failed += len(findings.failures)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(f"seed {arguments.seed}: {time.monotonic() - started:.0f} s, grew by {grown} MiB, {failed} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
