"""Every message between processes: round trips, golden bytes, and what hostile bytes can do, which is nothing."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rustyrl.errors import WireError
from rustyrl.rollout import EpisodeRows, Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec, MetricSpec
from rustyrl.weights import PolicySpec, Weights, encode_weights, weights_layout
from rustyrl.wire import (
    KNOWN_LAYOUTS,
    MAX_HEADER_BYTES,
    WIRE_VERSION,
    Fault,
    Goodbye,
    HandOver,
    Hello,
    Lease,
    Message,
    Ready,
    Refusal,
    Rejoin,
    RolloutHeader,
    Snapshot,
    StateArray,
    TicketMessage,
    WeightsHeader,
    Welcome,
    WorldState,
    _known_layout,
    decode_header,
    decode_rollout,
    decode_weights_message,
    encode_message,
    encode_rollout,
)

GOLDEN = Path(__file__).parent / "data"
MESSAGES: dict[str, Message] = {
    "hello": Hello(index=-1, incarnation=2**61, pid=4321, host="node-1"),
    "welcome": Welcome(
        index=3,
        learner_incarnation=2,
        env="drone",
        env_config={"slots": 256, "drag_n_s_m": 0.25, "windy": True, "map": "caf\u00e9"},
        seed=2**62,
        unroll_length=32,
        stagger=True,
        poison=False,
    ),
    "ready": Ready(fingerprint="0123456789abcdef"),
    "refusal": Refusal(reason="another wire version: install the same rustyrl"),
    "fault": Fault(reason="world 3 of 'maze', slot 1: reward holds nan"),
    "ticket": TicketMessage(learner_incarnation=2, batch=70_000, policy_version=69_999, worlds=(0, 300, 65_535)),
    "weights": WeightsHeader(learner_incarnation=2, policy_version=69_999),
    "lease": Lease(steps=70_000),
    "rejoin": Rejoin(),
    "hand-over": HandOver(worlds=(0, 300)),
    "snapshot": Snapshot(worlds=(0, 300)),
    "world-state": WorldState(
        world=300, next_batch=70_000, built=12, arrays=(StateArray("world.state", (16, 4), "float64"),)
    ),
    "goodbye": Goodbye(),
    "rollout": RolloutHeader(
        fingerprint="0123456789abcdef",
        policy_name="main",
        batch=70_000,
        policy_version=69_999,
        worlds=(0, 300),
        fresh=(300,),
        learner_incarnation=2,
        actor_index=3,
        actor_incarnation=2**61,
        stage_s={"act": 0.25, "step": 1.5},
        arrays=msgspec.Raw(
            msgspec.msgpack.encode(
                (
                    ArraySpec("observation.main", (33, 512, 20), "float32"),
                    ArraySpec("action.main", (32, 512), "int64"),
                    ArraySpec("terminated", (32, 512), "bool"),
                    ArraySpec("final_index", (0, 2), "int32"),
                    ArraySpec("episode.return", (), "float32"),
                )
            )
        ),
    ),
}
TICKET = {"type": "ticket", "learner_incarnation": 0, "batch": 0, "policy_version": 0, "worlds": [0]}
VERSIONED = bytes([0x92, WIRE_VERSION])  # what every header starts with: an array of two, the version
KINDS = pytest.mark.parametrize("kind", MESSAGES)

T, SLOTS = 4, 6
SPEC = EnvironmentSpec(
    env="two-arrays",
    observation=(ArraySpec("body", (3,), "float32"), ArraySpec("view", (2, 2), "float32")),
    action=(
        ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),
        ActionSpec("discrete", "gait", shape=(2,), counts=(2, 3), masked=True),
    ),
    slots=3,
    step_s=0.02,
    max_episode_steps=100,
    metrics=(MetricSpec("wins", "win", "mean"), MetricSpec("arrival_median", "arrival_s", "median")),
)
ORIGIN = RolloutOrigin(SPEC.fingerprint, "main", Ticket(5, 4, (2, 9)), 1, 3, 2**61, {"act": 0.5}, fresh=(9,))


def fill(array: NDArray[Any], rng: np.random.Generator) -> None:
    array[...] = rng.integers(0, 2, array.shape) if array.dtype != np.float32 else rng.normal(size=array.shape)


def make_rollout(*, truncated: int = 0, episodes: int = 0, poison: bool = False) -> Rollout:
    """A rollout of random numbers with so many truncated steps and ended episodes."""
    rng = np.random.default_rng(truncated + episodes)
    rollout = allocate_rollout(SPEC, T, SLOTS, ORIGIN, poison=poison)
    fixed = [rollout.behavior_log_prob, rollout.reward, rollout.terminated, rollout.truncated, rollout.valid]
    for array in [*rollout.observation.values(), *rollout.action.values(), *rollout.action_mask.values(), *fixed]:
        fill(array, rng)
    cells = np.stack(np.unravel_index(np.arange(truncated) % (T * SLOTS), (T, SLOTS)), axis=1)
    rollout.final_index = cells.astype(np.int32)
    for spec in SPEC.observation:
        rollout.final_observation[spec.name] = rng.normal(size=(truncated, *spec.shape)).astype(np.float32)
    rollout.episodes = EpisodeRows(
        slot=rng.integers(0, SLOTS, episodes, dtype=np.int32),
        episode_return=rng.normal(size=episodes).astype(np.float32),
        length=rng.integers(1, 100, episodes, dtype=np.int32),
        metrics={
            "win": rng.integers(0, 2, episodes).astype(np.float32),
            "arrival_s": np.where(rng.random(episodes) < 0.5, np.nan, 1.5).astype(np.float32),
        },
    )
    return rollout


def wire_arrays(rollout: Rollout) -> dict[str, NDArray[Any]]:
    """Every array of a rollout by a name of its own."""
    groups = {
        "observation": rollout.observation,
        "action": rollout.action,
        "action_mask": rollout.action_mask,
        "final_observation": rollout.final_observation,
        "metric": rollout.episodes.metrics,
    }
    named = {f"{group}.{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    names = ("behavior_log_prob", "reward", "terminated", "truncated", "valid", "final_index")
    named |= {name: getattr(rollout, name) for name in names}
    return named | {name: getattr(rollout.episodes, name) for name in ("slot", "episode_return", "length")}


def transfer(rollout: Rollout) -> Rollout:
    frame, blob = encode_rollout(rollout)
    header = decode_header(frame)
    assert isinstance(header, RolloutHeader)
    return decode_rollout(header, memoryview(bytes(blob)))


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(WireError) as caught:
        call()
    return f"{caught.value}"


# Messages


@KINDS
def test_every_kind_of_message_round_trips(kind: str) -> None:
    message = MESSAGES[kind]
    assert decode_header(encode_message(message)) == message
    assert decode_header(memoryview(encode_message(message))) == message


def test_every_kind_has_an_example_here() -> None:
    assert {type(message) for message in MESSAGES.values()} == set(Message.__args__)


@KINDS
def test_header_bytes_are_golden(kind: str) -> None:
    """A difference is a change of the wire: raise WIRE_VERSION, say so in the CHANGELOG, and run this file."""
    assert encode_message(MESSAGES[kind]) == (GOLDEN / f"{kind}.bin").read_bytes()


@KINDS
def test_golden_bytes_are_read_as_they_were_meant(kind: str) -> None:
    assert decode_header((GOLDEN / f"{kind}.bin").read_bytes()) == MESSAGES[kind]


def test_another_wire_version_is_refused_with_what_to_do_about_it() -> None:
    for other, remedy in ((WIRE_VERSION + 1, "install that rustyrl here, too"), (WIRE_VERSION - 1, "there")):
        frame = msgpack.packb([other, {"type": "a kind of the future"}])
        message = reason(lambda frame=frame: decode_header(frame))
        assert message.startswith(
            f"wire-version: the other side speaks wire version {other}, this side {WIRE_VERSION} ("
        )
        assert message.endswith(remedy)


@pytest.mark.parametrize(
    "content",
    [
        [],
        [WIRE_VERSION],
        [WIRE_VERSION, {"type": "lease"}, 0],
        {"type": "lease"},
        "lease",
        [True, {"type": "lease"}],
        [float(WIRE_VERSION), {"type": "lease"}],
        [None, {"type": "lease"}],
        [WIRE_VERSION, None],
        [WIRE_VERSION, {}],
        [WIRE_VERSION, {"type": "leese"}],
        [WIRE_VERSION, {"type": "lease", "extra": 1}],
        [WIRE_VERSION, {"type": "ready"}],
        [WIRE_VERSION, {"type": "ready", "fingerprint": 3}],
        [WIRE_VERSION, {"type": "ready", "fingerprint": "0" * 65}],
        [WIRE_VERSION, {"type": "weights", "learner_incarnation": -1, "policy_version": 0}],
        [WIRE_VERSION, {"type": "weights", "learner_incarnation": 0, "policy_version": 2**62 + 1}],
        [WIRE_VERSION, {"type": "weights", "learner_incarnation": True, "policy_version": 0}],
        [WIRE_VERSION, {"type": "weights", "learner_incarnation": 0.5, "policy_version": 0}],
        [WIRE_VERSION, {**TICKET, "worlds": []}],
        [WIRE_VERSION, {**TICKET, "worlds": [65536]}],
        [WIRE_VERSION, {"type": "hello", "index": -2, "incarnation": 0, "pid": 0, "host": ""}],
    ],
    ids=repr,
)
def test_headers_of_another_form_are_malformed(content: object) -> None:
    assert reason(lambda: decode_header(msgpack.packb(content))).startswith("malformed: ")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        VERSIONED,
        encode_message(Lease()) + b"\0",
        VERSIONED + b"\xdf\xff\xff\xff\xff",
        VERSIONED + b"\xdd\xff\xff\xff\xff",
        VERSIONED + b"\x81\xa4type\xdb\xff\xff\xff\xff",
        VERSIONED + b"\xc4\x01\x00",
        VERSIONED + b"\xd4\x00\x00",
        VERSIONED + b"\xd6\xff\x00\x00\x00\x00",
        VERSIONED + b"\x81\x00\x00",
        VERSIONED + b"\xa1\xff",
        b"\x91" * 2000,
        b"\x92" + b"\x91" * 1015 + b"\x00\x80",
        VERSIONED + b"\x81\xa1a" * 1015 + b"\x00",
    ],
    ids=[
        "nothing",
        "reserved byte",
        "cut short",
        "more behind",
        "map of 4 G",
        "array of 4 G",
        "string of 4 GB",
        "binary",
        "extension",
        "timestamp",
        "key that is no string",
        "string that is no UTF-8",
        "deeper than msgpack goes",
        "a version deeper than repr goes",
        "a body deeper than Python goes",
    ],
)
def test_frames_that_are_no_header_are_malformed(frame: bytes) -> None:
    assert reason(lambda: decode_header(frame)).startswith("malformed: ")


def test_size_limits_hold() -> None:
    assert reason(lambda: decode_header(bytes(MAX_HEADER_BYTES + 1))).startswith("oversize: ")
    long = {"type": "refusal", "reason": "x" * 4097}
    assert reason(lambda: decode_header(msgpack.packb([WIRE_VERSION, long]))).startswith("malformed: ")
    env_config = {f"key{number}": 0 for number in range(1025)}
    welcome = {**msgspec.to_builtins(MESSAGES["welcome"]), "env_config": env_config}
    assert reason(lambda: decode_header(msgpack.packb([WIRE_VERSION, welcome]))).startswith("malformed: ")
    arrays = [{"name": f"a{number}", "shape": [0], "dtype": "bool"} for number in range(1025)]
    rollout = {**BODY, "arrays": arrays}
    assert reason(lambda: decode_header(msgpack.packb([WIRE_VERSION, rollout]))).startswith("malformed: ")


COUNTLESS = b"\xdd\xff\xff\xff\xff"  # an array of 2^32 - 1, of which none are there


@pytest.mark.parametrize("kind", ["ticket", "rollout", "world-state", "hand-over"])
def test_lists_that_claim_to_be_huge_take_no_memory(kind: str) -> None:
    """Sizes are read before anything that they are the sizes of."""
    body = msgpack.unpackb(encode_message(MESSAGES[kind]))[1]
    lists = [name for name, value in body.items() if isinstance(value, list)]
    assert lists
    for name in lists:
        others = msgpack.packb({key: value for key, value in body.items() if key != name})
        frame = VERSIONED + bytes([others[0] + 1]) + others[1:] + msgpack.packb(name) + COUNTLESS + bytes(100)
        tracemalloc.start()
        try:
            assert reason(lambda frame=frame: decode_header(frame)).startswith("malformed: ")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100_000


def test_what_is_wrong_with_a_header_is_said_shortly_and_steers_no_terminal() -> None:
    for body in ({"type": "lease", "\x1b[31m" + "x" * 900_000: 1}, {"type": "\x1b" * 900_000}):
        said = reason(lambda body=body: decode_header(msgpack.packb([WIRE_VERSION, body])))
        assert said.startswith("malformed: ")
        assert len(said) < 400
        assert "\x1b" not in said


def test_a_header_of_another_version_is_refused_however_well_it_would_do() -> None:
    body = msgpack.packb({name: value for name, value in BODY.items() if name != "arrays"})
    nested, arrays = b"\x91" * 996 + b"\x90", msgpack.packb(BODY["arrays"])
    twice = bytes([body[0] + 2]) + body[1:] + b"".join(msgpack.packb("arrays") + a for a in (nested, arrays))
    older = bytes([0x92, WIRE_VERSION - 1])
    assert reason(lambda: decode_header(older + msgpack.packb(BODY))).startswith("wire-version: ")
    assert reason(lambda: decode_header(older + twice)).partition(":")[0] in ("wire-version", "malformed")


def test_an_oversize_blob_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustyrl.wire.MAX_BLOB_BYTES", 1000)
    frame, blob = encode_rollout(make_rollout())
    header = decode_header(frame)
    assert isinstance(header, RolloutHeader)
    assert reason(lambda: decode_rollout(header, blob)).startswith("oversize: ")
    assert reason(lambda: decode_weights_message(blob)).startswith("oversize: ")


# Rollouts


@pytest.mark.parametrize(("truncated", "episodes"), [(0, 0), (1, 0), (0, 1), (5, 7), (12, 12)])
def test_rollout_round_trips_bit_for_bit(truncated: int, episodes: int) -> None:
    rollout = make_rollout(truncated=truncated, episodes=episodes)
    received = transfer(rollout)
    sent, got = wire_arrays(rollout), wire_arrays(received)
    assert got.keys() == sent.keys()
    for name, array in sent.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert received.origin == rollout.origin
    assert (received.unroll_length, received.slots) == (T, SLOTS)


def test_more_ends_than_the_block_has_room_for_round_trip_too() -> None:
    rollout = make_rollout(truncated=100, episodes=1000)
    assert rollout.storage is not None
    _, blob = encode_rollout(rollout)
    assert len(blob) > len(rollout.storage)
    received = transfer(rollout)
    for name, array in wire_arrays(rollout).items():
        np.testing.assert_array_equal(wire_arrays(received)[name], array, err_msg=name)


def test_a_usual_rollout_is_sent_without_a_copy() -> None:
    rollout = make_rollout(truncated=SLOTS, episodes=2 * SLOTS)
    assert rollout.storage is not None
    _, blob = encode_rollout(rollout)
    assert np.shares_memory(np.frombuffer(blob, np.uint8), rollout.storage)
    for name in ("observation.body", "action.main", "action_mask.gait", "reward", "valid"):
        assert np.shares_memory(wire_arrays(rollout)[name], np.frombuffer(blob, np.uint8)), name


def test_received_arrays_are_views_of_the_blob() -> None:
    frame, blob = encode_rollout(make_rollout(truncated=3, episodes=3))
    header = decode_header(frame)
    assert isinstance(header, RolloutHeader)
    content = np.frombuffer(bytes(blob), np.uint8)
    for name, array in wire_arrays(decode_rollout(header, content.data)).items():
        assert np.shares_memory(array, content), name


def test_received_arrays_start_on_cache_lines() -> None:
    frame, blob = encode_rollout(make_rollout(truncated=3, episodes=3))
    header = decode_header(frame)
    assert isinstance(header, RolloutHeader)
    start = np.frombuffer(blob, np.uint8).__array_interface__["data"][0]
    for name, array in wire_arrays(decode_rollout(header, blob)).items():
        assert (array.__array_interface__["data"][0] - start) % 64 == 0, name


def test_a_buffer_used_again_forgets_the_ends_of_the_last_rollout() -> None:
    rollout = make_rollout(truncated=5, episodes=7)
    encode_rollout(rollout)
    fresh = make_rollout()
    rollout.final_index, rollout.final_observation = fresh.final_index, fresh.final_observation
    rollout.episodes = fresh.episodes
    received = transfer(rollout)
    assert received.final_index.shape == (0, 2)
    assert len(received.episodes.slot) == 0


def test_a_buffer_is_used_again_with_any_number_of_ends() -> None:
    rollout = make_rollout()
    counts = [(ends % 7, ends) for ends in range(KNOWN_LAYOUTS + 20)]
    for truncated, episodes in [*counts, *counts[:3]]:
        other = make_rollout(truncated=truncated, episodes=episodes)
        rollout.final_index, rollout.final_observation = other.final_index, other.final_observation
        rollout.episodes = other.episodes
        received = transfer(rollout)
        assert (len(received.final_index), len(received.episodes.slot)) == (truncated, episodes)
        for name, array in wire_arrays(rollout).items():
            np.testing.assert_array_equal(wire_arrays(received)[name], array, err_msg=name)
    assert len(rollout.tables) <= KNOWN_LAYOUTS


def test_long_lists_of_arrays_are_read_anew_each_time() -> None:
    many = [{"name": f"episode_metric.{number}", "shape": [3], "dtype": "float32"} for number in range(200)]
    body = {**BODY, "arrays": [*BODY["arrays"], *many]}
    kept = _known_layout.cache_info().currsize
    assert len(decode_frames(body, BLOB + bytes(64 * 200)).episodes.metrics) == 202
    assert _known_layout.cache_info().currsize == kept


def test_only_rollouts_with_a_block_are_encoded() -> None:
    with pytest.raises(ValueError, match="allocate_rollout"):
        encode_rollout(transfer(make_rollout()))


@pytest.mark.parametrize("name", ["terminated", "truncated", "valid", "action_mask.gait"])
@pytest.mark.parametrize("byte", [2, 0xCB, 0xFF])
def test_bytes_that_are_neither_false_nor_true_are_refused(name: str, byte: int) -> None:
    rollout = make_rollout()
    wire_arrays(rollout)[name].view(np.uint8)[T - 1, SLOTS - 1] = byte
    message = reason(lambda: transfer(rollout))
    assert message == f"malformed: {name} holds bytes that are neither False nor True"


def test_rows_that_no_step_wrote_are_noticed_when_poisoned() -> None:
    rollout = allocate_rollout(SPEC, T, SLOTS, ORIGIN, poison=True)
    assert "neither False nor True" in reason(lambda: transfer(rollout))


def rollout_frames() -> tuple[dict[str, Any], bytes]:
    """A valid header's body as builtins, to be spoiled, and its blob."""
    frame, blob = encode_rollout(make_rollout(truncated=2, episodes=3))
    return msgpack.unpackb(frame)[1], bytes(blob)


BODY, BLOB = rollout_frames()


def decode_frames(body: object, blob: bytes) -> Rollout:
    header = decode_header(msgpack.packb([WIRE_VERSION, body]))
    assert isinstance(header, RolloutHeader)
    return decode_rollout(header, memoryview(blob))


def with_array(changed: str, **changes: object) -> dict[str, Any]:
    arrays = [{**array, **changes} if array["name"] == changed else array for array in BODY["arrays"]]
    assert arrays != BODY["arrays"]
    return {**BODY, "arrays": arrays}


def test_every_truncated_blob_is_refused() -> None:
    for size in range(0, len(BLOB), 37):
        assert reason(lambda size=size: decode_frames(BODY, BLOB[:size])).startswith(("truncated: ", "malformed: "))


def test_bytes_behind_the_arrays_are_refused() -> None:
    assert f"the blob has {len(BLOB) + 1}" in reason(lambda: decode_frames(BODY, BLOB + b"\0"))


def test_two_arrays_of_one_name_are_refused() -> None:
    assert "two arrays are named 'valid'" in reason(lambda: decode_frames(with_array("truncated", name="valid"), BLOB))


REQUIRED = ("behavior_log_prob", "reward", "terminated", "truncated", "valid", "final_index")


@pytest.mark.parametrize("name", [*REQUIRED, "episode.slot", "episode.return", "episode.length"])
def test_a_rollout_without_one_of_its_arrays_is_refused(name: str) -> None:
    message = reason(lambda: decode_frames(with_array(name, name="renamed"), BLOB))
    assert message == f"malformed: the rollout lacks the array '{name}'"


@pytest.mark.parametrize("name", ["foo", "episode.foo", "observation", "rewards"])
def test_a_rollout_with_an_array_of_no_known_name_is_refused(name: str) -> None:
    old = next(a["name"] for a in BODY["arrays"] if a["name"].startswith("episode_metric."))
    message = reason(lambda: decode_frames(with_array(old, name=name), BLOB))
    assert message == f"malformed: a rollout has no array '{name}'"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shape": [2**31] * 16}, "truncated: "),
        ({"shape": [2**31] * 17}, "malformed: "),
        ({"shape": [1] * 65}, "malformed: "),
        ({"shape": [0, 2**31, 2**31, 2**31]}, "malformed: "),
        ({"shape": [2**31 + 1]}, "malformed: "),
        ({"shape": [-1]}, "malformed: "),
        ({"shape": 3}, "malformed: "),
        ({"dtype": "object"}, "malformed: "),
        ({"dtype": "float64"}, "malformed: "),
        ({"dtype": "<f4"}, "malformed: "),
        ({"name": ""}, "malformed: "),
        ({"name": "a b"}, "malformed: "),
        ({"name": "a" * 65}, "malformed: "),
        ({"offset": 0}, "malformed: "),
    ],
    ids=str,
)
def test_an_absurd_array_is_refused_without_a_large_allocation(changes: dict[str, object], expected: str) -> None:
    tracemalloc.start()
    try:
        message = reason(lambda: decode_frames(with_array("reward", **changes), BLOB))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.startswith(expected)
    assert len(message) < 1000
    assert peak < 1 << 20


# Weights


def make_weights() -> Weights:
    spec = PolicySpec(SPEC.observation, SPEC.action, (4,), "tanh", normalize=True)
    return Weights(spec, {name: np.ones(shape, np.float32) for name, shape in weights_layout(spec).items()})


def test_weights_message_round_trips() -> None:
    weights = make_weights()
    received = decode_weights_message(memoryview(encode_weights(weights)))
    assert received.spec == weights.spec
    for name, array in weights.arrays.items():
        np.testing.assert_array_equal(received.arrays[name], array)


# Fuzz: whatever comes in, WireError is all that comes out.


def survive(call: Callable[[], object]) -> None:
    try:
        call()
        return
    except WireError as error:
        refusal = error
    assert refusal.reason in {"malformed", "oversize", "truncated", "wire-version", "weights"}


def survive_header(frame: bytes, blob: bytes = b"") -> None:
    def decode() -> None:
        header = decode_header(frame)
        if isinstance(header, RolloutHeader):
            decode_rollout(header, memoryview(blob))

    survive(decode)


FUZZ = settings(max_examples=150, deadline=None)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([0, 1, 2**31, 2**62, 65536, -1])
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=10,
)


@FUZZ
@given(st.binary(max_size=200))
def test_arbitrary_header_bytes_raise_nothing_else(frame: bytes) -> None:
    survive_header(frame)
    survive_header(VERSIONED + frame)


@FUZZ
@given(VALUES)
def test_arbitrary_msgpack_headers_raise_nothing_else(value: object) -> None:
    survive_header(msgpack.packb(value))
    survive_header(msgpack.packb([WIRE_VERSION, value]))
    survive_header(msgpack.packb([value, {"type": "lease"}]))


@FUZZ
@given(st.data())
def test_valid_headers_with_any_part_exchanged_raise_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(MESSAGES)))
    body = BODY if kind == "rollout" else msgspec.to_builtins(MESSAGES[kind])
    survive_header(msgpack.packb([WIRE_VERSION, exchanged(data, body)]), BLOB)


def exchanged(data: st.DataObject, value: Any) -> Any:
    """The value with one part, at any depth, replaced, removed or added."""
    if data.draw(st.integers(0, 3)) == 0 or not isinstance(value, (dict, list, tuple)) or not value:
        return data.draw(VALUES)
    if isinstance(value, dict):
        key = data.draw(st.sampled_from(list(value)))
        change = data.draw(st.sampled_from(["go in", "remove", "add"]))
        if change == "remove":
            return {name: part for name, part in value.items() if name != key}
        if change == "add":
            return {**value, data.draw(st.text(max_size=8)): data.draw(VALUES)}
        return {**value, key: exchanged(data, value[key])}
    index = data.draw(st.integers(0, len(value) - 1))
    change = data.draw(st.sampled_from(["go in", "remove", "repeat"]))
    middle = {"go in": lambda: [exchanged(data, value[index])], "remove": list, "repeat": lambda: [value[index]] * 2}
    return [*value[:index], *middle[change](), *value[index + 1 :]]


ARRAYS = st.fixed_dictionaries(
    {
        "name": st.sampled_from([array["name"] for array in BODY["arrays"]]) | st.just("observation.x"),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 6, 2**31]), max_size=5),
        "dtype": st.sampled_from(["float32", "int32", "int64", "uint8", "bool"]),
    }
)


@FUZZ
@given(st.lists(ARRAYS, max_size=20), st.integers(0, 4096))
def test_any_list_of_arrays_over_any_blob_raises_nothing_else(arrays: list[dict[str, Any]], size: int) -> None:
    survive_header(msgpack.packb([WIRE_VERSION, {**BODY, "arrays": arrays}]), bytes(size))


OTHER = st.fixed_dictionaries(
    {},
    optional={
        "shape": st.lists(st.integers(0, 4), max_size=4),
        "dtype": st.sampled_from(["float32", "int64", "uint8", "bool"]),
    },
)


@FUZZ
@given(st.dictionaries(st.integers(0, len(BODY["arrays"]) - 1), OTHER, min_size=1, max_size=4))
def test_arrays_of_other_shapes_and_types_in_their_places_raise_nothing_else(
    changes: dict[int, dict[str, Any]],
) -> None:
    """The blob is as long as the header says, so that building gets as far as it can."""
    arrays = [{**array, **changes.get(index, {})} for index, array in enumerate(BODY["arrays"])]
    size = sum(-(-np.dtype(a["dtype"]).itemsize * math.prod(a["shape"]) // 64) * 64 for a in arrays)
    survive_header(msgpack.packb([WIRE_VERSION, {**BODY, "arrays": arrays}]), bytes(size))


def flipped(content: bytes, flips: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(content)
    for place, mask in flips:
        changed[place % len(changed)] ^= mask
    return bytes(changed[: len(changed) - cut])


FLIPS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=4)
CUTS = st.just(0) | st.integers(0, 300)


@FUZZ
@given(st.sampled_from(list(MESSAGES)), FLIPS, CUTS)
@example("rollout", [], 0)
def test_valid_frames_with_flipped_bits_raise_nothing_else(kind: str, flips: list[tuple[int, int]], cut: int) -> None:
    survive_header(flipped(encode_message(MESSAGES[kind]), flips, cut))
    survive_header(flipped(msgpack.packb([WIRE_VERSION, BODY]), flips, cut), BLOB)
    survive_header(msgpack.packb([WIRE_VERSION, BODY]), flipped(BLOB, flips, cut))


@FUZZ
@given(FLIPS, CUTS)
def test_flipped_weights_raise_nothing_else(flips: list[tuple[int, int]], cut: int) -> None:
    content = encode_weights(make_weights())
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    survive(lambda: decode_weights_message(memoryview(flipped(content, flips, cut))))
    in_header = [(place % header_bytes, mask) for place, mask in flips]
    survive(lambda: decode_weights_message(memoryview(flipped(content, in_header, 0))))


@FUZZ
@given(st.binary(max_size=200))
def test_arbitrary_weights_bytes_raise_nothing_else(content: bytes) -> None:
    survive(lambda: decode_weights_message(memoryview(content)))
    framed = len(content).to_bytes(8, "little") + content
    survive(lambda: decode_weights_message(memoryview(framed)))


if __name__ == "__main__":
    from golden import main  # which imports this file

    main()
