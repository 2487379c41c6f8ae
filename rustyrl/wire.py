"""Every message between processes, and the only code that turns bytes into them.

A message is exactly two frames: a msgpack header and one contiguous blob, empty where there is nothing to
carry. The header is an array ``[wire version, body]``, the body a map whose ``type`` says which struct below it is.
Headers are decoded by msgpack under size limits and then checked field by field against those structs; blobs are
checked against the header before anything is built from them. What fails raises `WireError` with a reason under which
it is counted. docs/protocol.md says all of it to those who write an actor in another language.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

import msgpack
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from rustyrl.errors import WireError
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
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in get_args(DTypeName)}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

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
    env_config: dict[Text, bool | int | float | str]
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
    arrays: Annotated[tuple[ArraySpec, ...], Meta(max_length=MAX_ARRAYS)]


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


def encode_message(message: Message) -> bytes:
    """The header frame of a message."""
    return _ENCODER.encode((WIRE_VERSION, message))


def decode_header(frame: bytes | memoryview) -> Message:
    """Check and build a message from a header frame that anybody may have sent."""
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError("oversize", f"a header of {len(frame)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        content = msgpack.unpackb(
            frame,
            max_array_len=MAX_WORLDS,
            max_map_len=MAX_ARRAYS,
            max_str_len=4096,
            max_bin_len=0,
            max_ext_len=0,
            strict_map_key=True,
        )
    except Exception as error:  # msgpack raises a dozen kinds, ValueError to RecursionError
        raise WireError("malformed", f"not a msgpack header: {error}") from None
    if not isinstance(content, list) or len(content) != 2 or type(content[0]) is not int:
        raise WireError("malformed", "a header is [wire version, body]")
    if content[0] != WIRE_VERSION:
        release = installed_version("rustyrl") or "of this folder"
        ours = f"this side {WIRE_VERSION} (rustyrl {release})"
        older = content[0] < WIRE_VERSION
        remedy = f"install rustyrl {release} there" if older else "install that rustyrl here, too"
        raise WireError("wire-version", f"the other side speaks wire version {content[0]}, {ours}: {remedy}")
    try:  # from the bytes again, which is faster than from what msgpack made of them; its limits hold for both
        return _DECODER.decode(frame)[1]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("malformed", str(error)) from None


def encode_rollout(rollout: Rollout) -> tuple[bytes, memoryview]:
    """The two frames of a rollout. The blob is the rollout's own block where that has room: nothing is copied.

    The block must not change until the blob has left.
    """
    if rollout.storage is None:
        raise ValueError("only rollouts made by allocate_rollout are encoded")
    fixed = _fixed_arrays(rollout)
    tail = _tail_arrays(rollout)
    arrays = [ArraySpec(name, array.shape, _dtype_name(array.dtype)) for name, array in [*fixed, *tail]]
    offset = sum(aligned(array.nbytes) for _, array in fixed)
    size = offset + sum(aligned(array.nbytes) for _, array in tail)
    storage = rollout.storage
    if size > len(storage):  # more episodes ended than there was room for
        storage = np.empty(size, np.uint8)
        storage[:offset] = rollout.storage[:offset]
    for _, array in tail:
        np.ndarray(array.shape, array.dtype, storage, offset)[...] = array
        offset += aligned(array.nbytes)
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
        arrays=tuple(arrays),
    )
    return encode_message(header), storage[:size].data


def decode_rollout(header: RolloutHeader, blob: memoryview) -> Rollout:
    """Build a rollout whose arrays are views of the blob, which must outlive them.

    Checks that the arrays fit the blob exactly and that they are those of a rollout; whether they are the
    shapes that this run expects, and what numbers they hold, is checked when the rollout is admitted.
    """
    if len(blob) > MAX_BLOB_BYTES:
        raise WireError("oversize", f"a blob of {len(blob)} bytes, at most {MAX_BLOB_BYTES}")
    views: dict[str, NDArray[Any]] = {}
    offset = 0
    for array in header.arrays:
        count = array_bytes(array)
        if offset + count > len(blob):
            raise WireError("truncated", f"{array.name} ends at byte {offset + count} of {len(blob)}")
        if array.name in views:
            raise WireError("malformed", f"two arrays are named {array.name!r}")
        views[array.name] = _view(array, _DTYPES[array.dtype], blob, offset, count)
        offset += aligned(count)
    if offset != len(blob):
        raise WireError("malformed", f"the arrays take {offset} bytes, the blob has {len(blob)}")
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
    try:
        episodes = EpisodeRows(
            slot=views["episode.slot"],
            episode_return=views["episode.return"],
            length=views["episode.length"],
            metrics={
                name.removeprefix("episode_metric."): view
                for name, view in views.items()
                if name.startswith("episode_metric.")
            },
        )
        rollout = rollout_from_arrays(views, origin, episodes, final_index=views["final_index"])
    except KeyError as error:
        raise WireError("malformed", f"the rollout lacks the array {error}") from None
    if unknown := [name for name in views if name not in _ROLLOUT_ARRAYS and not name.startswith(_ROLLOUT_GROUPS)]:
        raise WireError("malformed", f"a rollout has no array {unknown[0]!r}")
    return rollout


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
        arrays[array.name] = _view(array, dtype, blob, offset, count)
        offset += count
    if offset != len(blob):
        raise WireError("malformed", f"the arrays take {offset} bytes, the blob has {len(blob)}")
    return arrays


def decode_weights_message(blob: memoryview) -> Weights:
    """The policy that a weights message carries."""
    if len(blob) > MAX_BLOB_BYTES:
        raise WireError("oversize", f"a blob of {len(blob)} bytes, at most {MAX_BLOB_BYTES}")
    return decode_weights(blob)


def _view(
    array: ArraySpec | StateArray, dtype: np.dtype[Any], blob: memoryview, offset: int, count_bytes: int
) -> NDArray[Any]:
    """An array where it lies in a blob that is long enough; raises `WireError` if its bytes are none of its kind."""
    if array.dtype == "bool" and count_bytes and np.maximum.reduce(_flat(blob, offset, count_bytes)) > 1:
        raise WireError("malformed", f"{array.name} holds bytes that are neither False nor True")
    try:
        return np.ndarray(array.shape, dtype, blob, offset)
    except ValueError as error:  # empty, of dimensions whose product numpy cannot count
        raise WireError("malformed", f"{array.name}: {error}") from None


def _flat(blob: memoryview, offset: int, count_bytes: int) -> NDArray[np.uint8]:
    return np.ndarray((count_bytes,), np.uint8, blob, offset)


def _dtype_name(dtype: np.dtype[Any]) -> Any:
    """What numpy calls it; numpy itself takes several microseconds to say so."""
    return _DTYPE_NAMES.get(dtype) or str(dtype)


def _fixed_arrays(rollout: Rollout) -> list[tuple[str, NDArray[Any]]]:
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


def _tail_arrays(rollout: Rollout) -> list[tuple[str, NDArray[Any]]]:
    episodes = rollout.episodes
    return [
        ("final_index", rollout.final_index),
        *((f"final_observation.{name}", array) for name, array in rollout.final_observation.items()),
        ("episode.slot", episodes.slot),
        ("episode.return", episodes.episode_return),
        ("episode.length", episodes.length),
        *((f"episode_metric.{name}", array) for name, array in sorted(episodes.metrics.items())),
    ]
