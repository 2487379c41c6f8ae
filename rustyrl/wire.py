"""Every message between processes, and the only code that turns bytes into them.

A message is exactly two frames: a msgpack header and one contiguous blob, empty where there is nothing to
carry. The header is an array ``[wire version, body]``, the body a map whose ``type`` says which struct below it is.
Headers of bounded size are read field by field into those structs, whose types say what each may hold; blobs are
checked against the header before anything is built from them. What fails raises `WireError` with a reason under which
it is counted. docs/protocol.md says all of it to those who write an actor in another language.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from rustyrl.errors import WireError, printable
from rustyrl.installed import installed_version
from rustyrl.rollout import (
    EpisodeRows,
    Rollout,
    RolloutOrigin,
    Ticket,
    aligned,
    array_bytes,
    rollout_from_arrays,
)
from rustyrl.spec import ArraySpec, DTypeName, Shape
from rustyrl.weights import Weights, decode_weights

__all__ = [
    "WIRE_VERSION",
    "Fault",
    "Goodbye",
    "HandOver",
    "Hello",
    "Lease",
    "Ready",
    "Refusal",
    "Rejoin",
    "Snapshot",
    "TicketMessage",
    "WeightsHeader",
    "Welcome",
    "WorldState",
    "decode_header",
    "decode_rollout",
    "decode_weights_message",
    "decode_world_state",
    "encode_message",
    "encode_rollout",
    "encode_world_state",
    "view_world_state",
]

WIRE_VERSION = 5
MAX_HEADER_BYTES = 1 << 20
MAX_BLOB_BYTES = 1 << 31
MAX_STATE_BYTES = 1 << 26  # of one world: every actor may send one, so this bounds what a learner has to take in
MAX_ARRAYS = 1024
MAX_WORLDS = 65536
MAX_REASON = 300  # letters of what is wrong with a header, which may quote it
KNOWN_LAYOUTS = 256  # of rollouts that are kept, ...
KNOWN_LAYOUT_BYTES = 4096  # ... of headers in which they take not more
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in get_args(DTypeName)}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_Named = list[tuple[str, NDArray[Any]]]
_ROLLOUT_ARRAYS = {
    *("behavior_log_prob", "reward", "terminated", "truncated", "valid", "final_index"),
    *("episode.slot", "episode.return", "episode.length"),
}
_ROLLOUT_GROUPS = ("observation.", "action.", "action_mask.", "final_observation.", "episode_metric.")

Count = Annotated[int, Meta(ge=0, le=2**62)]
Text = Annotated[str, Meta(max_length=4096)]
Host = Annotated[str, Meta(max_length=255, pattern=r"\A[ -~]*\Z")]  # it is shown on terminals
Fingerprint = Annotated[str, Meta(max_length=64)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
World = Annotated[int, Meta(ge=0, lt=MAX_WORLDS)]
Worlds = Annotated[tuple[World, ...], Meta(min_length=1, max_length=MAX_WORLDS)]
RolloutArrays = Annotated[tuple[ArraySpec, ...], Meta(max_length=MAX_ARRAYS)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A header's body."""


class Hello(_Message, frozen=True, tag="hello"):
    """Actor to learner, first: who I am. ``index`` -1 asks for any free one."""

    index: Annotated[int, Meta(ge=-1, le=MAX_WORLDS)]
    incarnation: Count
    pid: Count
    host: Host


class Welcome(_Message, frozen=True, tag="welcome"):
    """Learner to actor: build these worlds and say what you see."""

    index: Annotated[int, Meta(ge=0, le=MAX_WORLDS)]
    learner_incarnation: Count
    env: Text
    env_config: Annotated[dict[Text, bool | int | float | Text], Meta(max_length=MAX_ARRAYS)]
    seed: Count
    unroll_length: Annotated[int, Meta(ge=1, le=65536)]
    stagger: bool
    poison: bool


class Ready(_Message, frozen=True, tag="ready"):
    """Actor to learner: my environment has this fingerprint, give me tickets."""

    fingerprint: Fingerprint


class Refusal(_Message, frozen=True, tag="refusal"):
    """Either way: this cannot work, and why. The link ends."""

    reason: Text


class TicketMessage(_Message, frozen=True, tag="ticket"):
    """Learner to actor: unroll these worlds for this batch with the weights sent last."""

    learner_incarnation: Count
    batch: Count
    policy_version: Count
    worlds: Worlds

    @property
    def ticket(self) -> Ticket:
        """As the struct that travels through the actor."""
        return Ticket(self.batch, self.policy_version, self.worlds)


class WeightsHeader(_Message, frozen=True, tag="weights"):
    """Learner to actor: the blob is this version of the policy."""

    learner_incarnation: Count
    policy_version: Count


class Fault(_Message, frozen=True, tag="fault"):
    """Actor to learner: the world broke its contract, as this says; no actor could go on with it."""

    reason: Text


class StateArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One named array of a world's state."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    shape: Shape
    dtype: Literal[
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]


class HandOver(_Message, frozen=True, tag="hand-over"):
    """Learner to actor: these worlds are another's from now on; send what you have of them, and forget them."""

    worlds: Worlds


class Snapshot(_Message, frozen=True, tag="snapshot"):
    """Learner to actor: send copies of what you have of these worlds, and keep them."""

    worlds: Worlds


class WorldState(_Message, frozen=True, tag="world-state"):
    """Actor to learner, and learner to the next owner: the blob is a world as it stands before ``next_batch``.

    built: the batch that its episodes began with. No arrays: it cannot be had, and begins anew.
    """

    world: World
    next_batch: Count
    built: Count
    arrays: Annotated[tuple[StateArray, ...], Meta(max_length=MAX_ARRAYS)]


class Lease(_Message, frozen=True, tag="lease"):
    """Either way: I live. From an actor also how many env steps it has begun, so that slow is told from stuck."""

    steps: Count = 0


class Rejoin(_Message, frozen=True, tag="rejoin"):
    """Learner to actor: I do not know you, or gave you up as lost; say hello again, and forget your tickets."""


class Goodbye(_Message, frozen=True, tag="goodbye"):
    """Learner to actor: the run is over. Actor to learner: I leave."""


class RolloutHeader(_Message, frozen=True, tag="rollout"):
    """Actor to learner: the blob is the answer to this ticket; its arrays follow one another, aligned.

    fresh: those of its worlds whose episodes began with it
    arrays: `RolloutArrays` as they came: most rollouts of an actor have the same, which need not be read again
    """

    fingerprint: Fingerprint
    policy_name: Annotated[str, Meta(max_length=64)]
    batch: Count
    policy_version: Count
    worlds: Worlds
    fresh: Annotated[tuple[World, ...], Meta(max_length=MAX_WORLDS)]
    learner_incarnation: Count
    actor_index: Annotated[int, Meta(ge=0, le=MAX_WORLDS)]
    actor_incarnation: Count
    stage_s: Annotated[dict[Annotated[str, Meta(max_length=32)], Seconds], Meta(max_length=16)]
    arrays: msgspec.Raw


Message = (
    Hello
    | Welcome
    | Ready
    | Refusal
    | Rejoin
    | Fault
    | TicketMessage
    | WeightsHeader
    | HandOver
    | Snapshot
    | WorldState
    | Lease
    | Goodbye
    | RolloutHeader
)


WITH_BLOB = (RolloutHeader, WeightsHeader, WorldState)  # the blob of all others is empty

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[int, Message])
_ANY_VERSION = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])
_ARRAYS = msgspec.msgpack.Decoder(RolloutArrays)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode_message(message: Message) -> bytes:
    """The header frame of a message."""
    return _ENCODER.encode((WIRE_VERSION, message))


def decode_header(frame: bytes | memoryview) -> Message:
    """Check and build a message from a header frame that anybody may have sent."""
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError("oversize", f"a header of {len(frame)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        version, message = _DECODER.decode(frame)
        if isinstance(message, RolloutHeader):
            _layout(message.arrays)
    except _UNREADABLE as error:
        with contextlib.suppress(*_UNREADABLE):
            _check_version(_ANY_VERSION.decode(frame)[0])  # whatever stands in its body
        raise WireError("malformed", printable(str(error))[:MAX_REASON]) from None
    _check_version(version)
    return message


def _check_version(version: int) -> None:
    if version != WIRE_VERSION:
        release = installed_version("rustyrl") or "of this folder"
        ours = f"this side {WIRE_VERSION} (rustyrl {release})"
        older = version < WIRE_VERSION
        remedy = f"install rustyrl {release} there" if older else "install that rustyrl here, too"
        raise WireError("wire-version", f"the other side speaks wire version {version}, {ours}: {remedy}")


def encode_rollout(rollout: Rollout) -> tuple[bytes, memoryview]:
    """The two frames of a rollout. The blob is the rollout's own block where that has room: nothing is copied.

    The block must not change until the blob has left.
    """
    if rollout.storage is None:
        raise ValueError("only rollouts made by allocate_rollout are encoded")
    tail = _tail_arrays(rollout)
    key = tuple([(name, array.shape, array.dtype) for name, array in tail])
    if (table := rollout.tables.get(key)) is None:
        if len(rollout.tables) >= KNOWN_LAYOUTS:
            rollout.tables.clear()
        table = rollout.tables[key] = _encode_table(_fixed_arrays(rollout), tail)
    arrays, offsets, size = table
    storage = rollout.storage
    if size > len(storage):  # more episodes ended than there was room for
        storage = np.empty(size, np.uint8)
        storage[: offsets[0]] = rollout.storage[: offsets[0]]
    for (_, array), offset in zip(tail, offsets, strict=True):
        np.ndarray(array.shape, array.dtype, storage, offset)[...] = array
    origin = rollout.origin
    header = RolloutHeader(
        fingerprint=origin.fingerprint,
        policy_name=origin.policy_name,
        batch=origin.ticket.batch,
        policy_version=origin.ticket.policy_version,
        worlds=origin.ticket.worlds,
        fresh=origin.fresh,
        learner_incarnation=origin.learner_incarnation,
        actor_index=origin.actor_index,
        actor_incarnation=origin.actor_incarnation,
        stage_s=origin.stage_s,
        arrays=msgspec.Raw(arrays),
    )
    return encode_message(header), storage[:size].data


def _encode_table(fixed: _Named, tail: _Named) -> tuple[bytes, list[int], int]:
    """What a header says of these arrays, where those of the tail lie in the blob, and the size of the blob."""
    arrays = [ArraySpec(name, array.shape, _dtype_name(array.dtype)) for name, array in [*fixed, *tail]]
    ends = list(itertools.accumulate(aligned(array.nbytes) for _, array in [*fixed, *tail]))
    return _ENCODER.encode(arrays), ends[len(fixed) - 1 : -1], ends[-1]


def decode_rollout(header: RolloutHeader, blob: memoryview) -> Rollout:
    """Build a rollout whose arrays are views of the blob, which must outlive them.

    Checks that the arrays fit the blob exactly and that they are those of a rollout; whether they are the
    shapes that this run expects, and what numbers they hold, is checked when the rollout is admitted.
    """
    if len(blob) > MAX_BLOB_BYTES:
        raise WireError("oversize", f"a blob of {len(blob)} bytes, at most {MAX_BLOB_BYTES}")
    layout = _layout(header.arrays)
    if layout.fault:
        raise WireError("malformed", layout.fault)
    if layout.size != len(blob):
        _refuse_size(layout, len(blob))
    for names, start, count in layout.flags:
        rows = np.ndarray((len(names), count), np.uint8, blob, start, (aligned(count), 1))
        if np.maximum.reduce(rows, axis=None) > 1:
            name = names[int((rows > 1).any(axis=1).argmax())]
            raise WireError("malformed", f"{name} holds bytes that are neither False nor True")
    try:
        views = {name: np.ndarray(shape, dtype, blob, start) for name, shape, dtype, start, _ in layout.arrays}
    except ValueError as error:  # empty, of dimensions whose product numpy cannot count
        raise WireError("malformed", str(error)) from None
    origin = RolloutOrigin(
        fingerprint=header.fingerprint,
        policy_name=header.policy_name,
        ticket=Ticket(header.batch, header.policy_version, header.worlds),
        learner_incarnation=header.learner_incarnation,
        actor_index=header.actor_index,
        actor_incarnation=header.actor_incarnation,
        stage_s=header.stage_s,
        fresh=header.fresh,
    )
    episodes = EpisodeRows(
        slot=views["episode.slot"],
        episode_return=views["episode.return"],
        length=views["episode.length"],
        metrics={name.removeprefix("episode_metric."): views[name] for name in layout.metrics},
    )
    return rollout_from_arrays(views, origin, episodes, final_index=views["final_index"])


class _Layout(NamedTuple):
    """Where the arrays of a rollout lie in its blob.

    arrays: name, shape, kind of number, and the bytes from which and before which each one lies
    flags: names of neighbours of one size that hold True and False, where they begin, and the bytes of each
    metrics: those of ended episodes
    size: bytes of all
    fault: why these are not the arrays of a rollout, if they are not
    """

    arrays: tuple[tuple[str, tuple[int, ...], np.dtype[Any], int, int], ...]
    flags: tuple[tuple[tuple[str, ...], int, int], ...]
    metrics: tuple[str, ...]
    size: int
    fault: str


def _layout(arrays: msgspec.Raw) -> _Layout:
    """Where the arrays of a header lie; raises one of `_UNREADABLE` if they are no `RolloutArrays`."""
    given = bytes(arrays)
    return _known_layout(given) if len(given) <= KNOWN_LAYOUT_BYTES else _read_layout(given)


def _read_layout(given: bytes) -> _Layout:
    arrays = _ARRAYS.decode(given)
    found: dict[str, tuple[str, tuple[int, ...], np.dtype[Any], int, int]] = {}
    faults: list[str] = []
    offset = 0
    for array in arrays:
        if array.name in found:
            faults.append(f"two arrays are named {array.name!r}")
        count = array_bytes(array)
        found[array.name] = (array.name, array.shape, _DTYPES[array.dtype], offset, offset + count)
        offset += aligned(count)
    faults += [f"the rollout lacks the array {name!r}" for name in sorted(_ROLLOUT_ARRAYS - found.keys())]
    unknown = [name for name in found if name not in _ROLLOUT_ARRAYS and not name.startswith(_ROLLOUT_GROUPS)]
    faults += [f"a rollout has no array {name!r}" for name in unknown]
    flags: list[tuple[tuple[str, ...], int, int]] = []
    for name, _, dtype, start, stop in found.values():
        names, first, count = flags[-1] if flags else ((), 0, 0)
        if dtype.kind != "b" or stop == start:
            continue
        if (stop - start, first + len(names) * aligned(count)) == (count, start):
            flags[-1] = (*names, name), first, count
        else:
            flags.append(((name,), start, stop - start))
    metrics = [name for name in found if name.startswith("episode_metric.")]
    return _Layout(tuple(found.values()), tuple(flags), tuple(metrics), offset, faults[0] if faults else "")


_known_layout = lru_cache(maxsize=KNOWN_LAYOUTS)(_read_layout)


def _refuse_size(layout: _Layout, size: int) -> NoReturn:
    for name, _, _, _, stop in layout.arrays:
        if stop > size:
            raise WireError("truncated", f"{name} ends at byte {stop} of {size}")
    raise WireError("malformed", f"the arrays take {layout.size} bytes, the blob has {size}")


def encode_world_state(
    world: int, next_batch: int, built: int, arrays: dict[str, NDArray[np.generic]]
) -> tuple[WorldState, bytes]:
    """A world's state as a message and its blob.

    Raises:
        WireError: it is larger than a message may be.
    """
    listed = tuple(StateArray(name, array.shape, str(array.dtype)) for name, array in arrays.items())  # type: ignore[arg-type]
    blob = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    header = WorldState(world, next_batch, built, listed)
    if len(blob) > MAX_STATE_BYTES or len(listed) > MAX_ARRAYS or len(encode_message(header)) > MAX_HEADER_BYTES:
        raise WireError(
            "oversize",
            f"the state of world {world} takes {len(blob)} bytes in {len(listed)} arrays, at most {MAX_STATE_BYTES} "
            f"and {MAX_ARRAYS}",
        )
    return header, blob


def decode_world_state(header: WorldState, blob: memoryview) -> dict[str, NDArray[np.generic]]:
    """The arrays of a world's state, copies of what the blob holds; raises `WireError` as `view_world_state` does."""
    return {name: view.copy() for name, view in view_world_state(header, blob).items()}


def view_world_state(header: WorldState, blob: memoryview) -> dict[str, NDArray[np.generic]]:
    """The arrays of a world's state where they lie in the blob.

    Raises:
        WireError: the blob is not what the header says.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    offset = 0
    for array in header.arrays:
        dtype = np.dtype(array.dtype)
        count = math.prod(array.shape) * dtype.itemsize
        if offset + count > len(blob):
            raise WireError("truncated", f"{array.name} ends at byte {offset + count} of {len(blob)}")
        if dtype.kind == "b" and count and np.ndarray((count,), np.uint8, blob, offset).max() > 1:
            raise WireError("malformed", f"{array.name} holds bytes that are neither False nor True")
        try:
            arrays[array.name] = np.ndarray(array.shape, dtype, blob, offset)
        except ValueError as error:  # empty, of dimensions whose product numpy cannot count
            raise WireError("malformed", f"{array.name}: {error}") from None
        offset += count
    if offset != len(blob):
        raise WireError("malformed", f"the arrays take {offset} bytes, the blob has {len(blob)}")
    return arrays


def decode_weights_message(blob: memoryview) -> Weights:
    """The policy that a weights message carries."""
    if len(blob) > MAX_BLOB_BYTES:
        raise WireError("oversize", f"a blob of {len(blob)} bytes, at most {MAX_BLOB_BYTES}")
    return decode_weights(blob)


def _dtype_name(dtype: np.dtype[Any]) -> Any:
    """What numpy calls it; numpy itself takes several microseconds to say so."""
    return _DTYPE_NAMES.get(dtype) or str(dtype)


def _fixed_arrays(rollout: Rollout) -> _Named:
    return [
        *((f"observation.{name}", array) for name, array in rollout.observation.items()),
        *((f"action.{name}", array) for name, array in rollout.action.items()),
        *((f"action_mask.{name}", array) for name, array in rollout.action_mask.items()),
        ("behavior_log_prob", rollout.behavior_log_prob),
        ("reward", rollout.reward),
        ("terminated", rollout.terminated),
        ("truncated", rollout.truncated),
        ("valid", rollout.valid),
    ]


def _tail_arrays(rollout: Rollout) -> _Named:
    episodes = rollout.episodes
    return [
        ("final_index", rollout.final_index),
        *((f"final_observation.{name}", array) for name, array in rollout.final_observation.items()),
        ("episode.slot", episodes.slot),
        ("episode.return", episodes.episode_return),
        ("episode.length", episodes.length),
        *((f"episode_metric.{name}", array) for name, array in sorted(episodes.metrics.items())),
    ]
