"""docs/protocol.md says what the code does, golden bytes stay, and who knows that page alone can be an actor."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import foreign_actor
import golden
import msgpack
import msgspec
import numpy as np
import pytest
from clusters import SMALL, assert_balanced, await_learner, poll, rustyrl, verb
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import MESSAGES, SPEC

from rustyrl import wire
from rustyrl.rollout import Rollout
from rustyrl.spec import ArraySpec, EnvironmentSpec, MetricSpec
from rustyrl.weights import PolicySpec, Weights, decode_weights, encode_weights, weights_layout
from rustyrl.wire import WIRE_VERSION, RolloutHeader, StateArray, decode_header, decode_rollout, encode_message
from rustyrl_actors.catalog import BUILT_IN, find_environment
from rustyrl_actors.inference import Policy
from rustyrl_learner.ingest import admit

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "protocol.md").read_text()
STRUCTS = {
    **{str(struct.__struct_config__.tag): struct for struct in get_args(wire.Message)},
    "array": ArraySpec,
    "state array": StateArray,
}
LISTED = json.loads(golden.LIST.read_text())
FILES = {name: (golden.DATA / name).read_bytes() for name in LISTED[str(WIRE_VERSION)]}


# The page


def number_text(number: int) -> str:
    return f"2^{number.bit_length() - 1}" if number >= 2**31 else str(number)


def type_text(kind: Any) -> str:
    """A field's type as the page writes it."""
    match kind:
        case msgspec.inspect.BoolType():
            return "bool"
        case msgspec.inspect.IntType(ge=None):
            return "int"
        case msgspec.inspect.IntType(ge=low, le=le, lt=lt):
            return f"int {low}..{number_text(lt - 1 if le is None else le)}"
        case msgspec.inspect.FloatType(ge=low, le=high):
            return "float" if low is None else f"float {low}..{high:.0f}"
        case msgspec.inspect.StrType(min_length=int(low), max_length=high):
            return f"str {low}..{high}"
        case msgspec.inspect.StrType(max_length=high):
            return "str" if high is None else f"str ≤ {high}"
        case msgspec.inspect.LiteralType(values=values):
            return f"one of {', '.join(values)}"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(map(type_text, types))
        case msgspec.inspect.VarTupleType(item_type=item, min_length=low, max_length=high):
            return f"[{type_text(item)}], {low or 0} to {high}"
        case msgspec.inspect.DictType(key_type=key, value_type=value, max_length=high):
            return f"{{{type_text(key)}: {type_text(value)}}}" + (f", 0 to {high}" if high else "")
        case msgspec.inspect.StructType(cls=cls):
            return next(name for name, struct in STRUCTS.items() if struct is cls)
    raise AssertionError(kind)


def checked_type(field: Any) -> Any:
    """What a field is checked to be: the arrays of a rollout stay as they came, and are read as `RolloutArrays`."""
    raw = isinstance(field.type, msgspec.inspect.RawType)
    return msgspec.inspect.type_info(wire.RolloutArrays) if raw else field.type


def tables() -> dict[str, list[list[str]]]:
    """The cells of the tables of fields, by what they are of."""
    found = {}
    for section in re.split(r"^#{3,4} ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        body = body.partition("\n## ")[0]
        rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]*) \| ", body, re.MULTILINE)
        found[title.strip("`")] = [list(row) for row in rows]
    return found


def test_page_has_every_message_with_every_field_its_type_and_its_range():
    expected = {
        name: [
            [field.encode_name, type_text(checked_type(field))] for field in msgspec.inspect.type_info(struct).fields
        ]
        for name, struct in STRUCTS.items()
    }
    assert tables() == expected


def test_page_is_of_this_wire_version():
    assert f"**wire\nversion {WIRE_VERSION}**" in PAGE
    assert f'[{WIRE_VERSION}, {{"type"' in PAGE
    assert foreign_actor.WIRE_VERSION == WIRE_VERSION


def test_page_says_the_limits():
    assert (wire.MAX_HEADER_BYTES, wire.MAX_BLOB_BYTES, wire.MAX_STATE_BYTES) == (1 << 20, 1 << 31, 1 << 26)
    assert (wire.MAX_WORLDS, wire.MAX_ARRAYS) == (65536, 1024)
    limits = next(line for line in PAGE.splitlines() if line.startswith("- Limits:"))
    for limit in ("1 MiB", "4096 characters", "65536 elements", "1024 entries", "2^31 bytes", "2^26"):
        assert limit in limits


def reasons() -> set[str]:
    """The words under which a learner counts what it refuses, as its code and that of the wire have them."""
    found = set()
    paths = ["rustyrl/wire.py", "rustyrl/channels.py", "rustyrl/weights.py"]
    paths += [str(path.relative_to(ROOT)) for path in (ROOT / "learner").rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            match node:
                case ast.Call(
                    func=ast.Name(id="WireError") | ast.Attribute(attr="count"),
                    args=[ast.Constant(value=str(reason)), *_],
                ):
                    found.add(reason)
                case ast.Call(
                    func=ast.Attribute(attr="count"), args=[ast.JoinedStr(values=[ast.Constant(value=start), *_])]
                ):
                    found.add(f"{start}KIND")
    return found | {"warm-up"}


def test_page_has_every_reason_for_which_something_is_refused():
    page = PAGE.partition("## What is refused")[2]
    named = {word for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE) for word in re.findall(r"`(.*?)`", row)}
    assert named | {"warm-up"} == reasons()
    assert "`warm-up`" in page
    for struct in get_args(wire.Message):
        if struct.__name__ not in {"Hello", "Ready", "Lease", "RolloutHeader"}:
            assert f"`{struct.__name__.lower()}`" in page


def test_page_has_every_array_of_a_rollout_and_of_a_policy():
    rollout = {array.name for array in golden_arrays()}
    rollout = {
        re.sub(r"^(observation|action|action_mask|final_observation|episode_metric)\..*", r"\1.NAME", n)
        for n in rollout
    }
    section = PAGE.partition("\n## Rollouts")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([^`]+)` \| ", section, re.MULTILINE)) == rollout
    section = PAGE.partition("\n## Weights")[2].partition("\n## ")[0]
    for name in weights_layout(golden.policy().spec):
        assert f"`{re.sub(r'[.][0-9][.]', '.I.', name)}`" in section, name
    for name in PolicySpec.__struct_fields__:
        assert f"| `{name}` |" in section
    for struct in (EnvironmentSpec, MetricSpec):
        for name in struct.__struct_fields__:
            assert name == "name" or f"`{name}`" in PAGE, name


def test_page_shows_the_bytes_of_messages():
    shown = re.findall(r"^(?:up|down) +([a-z-]+) +((?:[0-9a-f]+ ?)+)$", re.sub(r" {3}and .*", "", PAGE), re.MULTILINE)
    assert len(shown) >= 8
    for kind, text in shown:
        assert bytes.fromhex(text.replace(" ", "")) == FILES[f"{kind}.bin"], kind


def test_page_shows_a_fingerprint_and_its_text():
    text, shown = re.search(r'^(\{"action".*\})$', PAGE, re.MULTILINE), re.search(r"fingerprint `([0-9a-f]{16})`", PAGE)
    assert hashlib.sha256(text[1].encode()).hexdigest()[:16] == shown[1]
    assert find_environment("cartpole", {}).spec.fingerprint == shown[1]


# Golden bytes


def test_golden_files_of_a_wire_version_stay():
    """Else: raise WIRE_VERSION, say so in docs/protocol.md and the CHANGELOG, and run `python tests/test_wire.py`."""
    assert golden.changed(LISTED[str(WIRE_VERSION)], FILES) == []
    assert {f"{kind}.bin" for kind in MESSAGES} < FILES.keys()
    held = {path.name for path in golden.DATA.iterdir() if path.suffix in {".bin", ".blob", ".safetensors"}}
    assert held <= FILES.keys()


def test_golden_files_are_not_written_anew_within_a_wire_version(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / golden.LIST.name).write_bytes(golden.LIST.read_bytes())
    assert golden.write(data=tmp_path) == []  # nothing differs
    monkeypatch.setitem(MESSAGES, "hello", msgspec.structs.replace(MESSAGES["hello"], pid=1))
    assert golden.write(data=tmp_path) == ["hello.bin"]
    assert (tmp_path / "hello.bin").read_bytes() == FILES["hello.bin"]
    monkeypatch.setattr(golden, "WIRE_VERSION", WIRE_VERSION + 1)
    assert golden.write(data=tmp_path) == []
    assert (tmp_path / "hello.bin").read_bytes() != FILES["hello.bin"]
    lists = json.loads((tmp_path / golden.LIST.name).read_text())
    of_policy = {"policy.json": lists[str(WIRE_VERSION)]["policy.json"]}  # what numbers round to where this is run
    assert lists[str(WIRE_VERSION)] == LISTED[str(WIRE_VERSION)] | of_policy
    assert set(golden.changed(lists[str(WIRE_VERSION + 1)], FILES)) - of_policy.keys() == {"hello.bin"}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".bin")])
def test_golden_headers_come_back_from_either_msgpack(name):
    content = FILES[name]
    assert encode_message(decode_header(content)) == content
    assert msgpack.packb(msgpack.unpackb(content)) == content


def golden_arrays() -> tuple[ArraySpec, ...]:
    return msgspec.msgpack.decode(golden_answer()[0].arrays, type=wire.RolloutArrays)


def golden_answer() -> tuple[RolloutHeader, Rollout]:
    header = decode_header(FILES["answer.bin"])
    assert isinstance(header, RolloutHeader)
    return header, decode_rollout(header, memoryview(FILES["answer.blob"]))


def test_golden_rollout_is_admitted_and_written_alike():
    _, rollout = golden_answer()
    admit(rollout, SPEC, 4, 2)
    header, blob = wire.encode_rollout(golden.answer())
    assert (header, bytes(blob)) == (FILES["answer.bin"], FILES["answer.blob"])
    np.testing.assert_array_equal(rollout.reward, golden.answer().reward)


def test_foreign_arrays_are_packed_as_ours():
    views = {}
    offset = 0
    for array in golden_arrays():
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        views[array.name] = np.frombuffer(FILES["answer.blob"][offset : offset + size], array.dtype).reshape(
            array.shape
        )
        offset += -(-size // 64) * 64
    listed, blob = foreign_actor.packed(views)
    assert listed == msgpack.unpackb(FILES["answer.bin"])[1]["arrays"]
    assert blob == FILES["answer.blob"]
    assert golden_answer()[1].slots == 6


def test_golden_policy_is_read_and_written_alike():
    content = FILES["policy.safetensors"]
    assert encode_weights(decode_weights(content)) == content
    assert encode_weights(golden.policy()) == content


# What the foreign actor made of the page


def test_foreign_actor_imports_nothing_of_ours():
    tree = ast.parse(Path(foreign_actor.__file__).read_text())
    found = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert found - set(sys.stdlib_module_names) == {"msgpack", "numpy", "zmq"}


@pytest.mark.parametrize("env", BUILT_IN)
def test_foreign_fingerprint_is_ours(env):
    spec = find_environment(env, {}).spec
    assert foreign_actor.fingerprint(json.loads(msgspec.json.encode(spec))) == spec.fingerprint


def test_foreign_fingerprint_follows_what_is_set():
    settings = {"slots": 4, "force_n": 5}
    assert foreign_actor.fingerprint(foreign_actor.cartpole_spec(settings)) == (
        find_environment("cartpole", settings).spec.fingerprint
    )


def test_envs_say_their_fingerprints():
    rows = json.loads(rustyrl("envs", "--json")[1])["envs"]
    assert {row["env"]: row["fingerprint"] for row in rows} == {
        env: find_environment(env, {}).spec.fingerprint for env in BUILT_IN
    }


@settings(max_examples=60, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(1e-7, 1e-3) | st.floats(1e14, 1e18) | st.text())
def test_foreign_canonical_numbers_and_strings_are_ours(value):
    assert foreign_actor.canonical([value]).encode() == msgspec.json.encode([value])


def as_arrays(lists: dict[str, Any], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    return {name: np.array(numbers, dtypes[name]) for name, numbers in lists.items()}


def test_foreign_evaluation_of_the_golden_policy_is_ours():
    expected = json.loads(FILES["policy.json"])
    assert json.loads(golden.golden()["policy.json"]).keys() == expected.keys()
    policy = foreign_actor.Policy(FILES["policy.safetensors"])
    observation = as_arrays(expected["observation"], {"body": "float32", "view": "float32"})
    mask = as_arrays(expected["action_mask"], {"gait": "bool"})
    raw, given_, log_prob = policy.act(observation, np.array(expected["noise"], np.float32), mask)
    np.testing.assert_allclose(policy.outputs(observation), expected["outputs"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_prob, expected["behavior_log_prob"], rtol=1e-5, atol=1e-5)
    for name in ("main", "gait"):
        np.testing.assert_allclose(raw[name], expected["action"][name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(given_[name], expected["bounded"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
@pytest.mark.parametrize(("box", "normalize"), [("clipped", True), ("squashed", False)])
def test_foreign_log_probabilities_are_ours(activation, box, normalize):
    spec = PolicySpec(SPEC.observation, SPEC.action, (8,), activation, normalize=normalize, box=box)
    rng = np.random.default_rng(3)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights_layout(spec).items()}
    if normalize:
        arrays["normalizer.variance"] = np.abs(arrays["normalizer.variance"])
    weights, slots = Weights(spec, arrays), 64
    observation = {a.name: rng.normal(size=(slots, *a.shape)).astype(np.float32) for a in spec.observation}
    mask = {"gait": rng.random((slots, 5)) < 0.6}
    mask["gait"][:, [0, 3]] = True
    noise = np.concatenate([rng.normal(size=(slots, 2)), rng.random((slots, 2))], 1).astype(np.float32)
    ours = Policy(weights, slots)
    action, bounded, log_prob = ours.allocate_action(), ours.allocate_action(), np.zeros(slots, np.float32)
    ours.act(observation, noise, action, log_prob, mask)
    ours.bound(action, bounded)
    raw, given_, theirs = foreign_actor.Policy(encode_weights(weights)).act(observation, noise, mask)
    np.testing.assert_array_equal(raw["gait"], action["gait"])
    np.testing.assert_allclose(raw["main"], action["main"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given_["main"], bounded["main"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(theirs, log_prob, rtol=1e-5, atol=2e-5)


# A run with it alone


class Foreign:
    """A foreign actor's process, to which the folders of this repository are unknown."""

    def __init__(self, link: str, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-I", foreign_actor.__file__, "--join", link, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def done(self) -> dict[str, Any]:
        """What it says it did, once it ended well."""
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return json.loads(out)


@pytest.fixture
def join():
    """Start foreign actors; what is left of them is killed after the test."""
    actors: list[Foreign] = []

    def begin(cluster, *arguments: str) -> Foreign:
        path = cluster.run / "cluster.json"
        poll(lambda: path.exists() and b'"running"' in path.read_bytes(), "a listening learner")
        actors.append(Foreign(json.loads(path.read_text())["link"], *arguments))
        return actors[-1]

    yield begin
    for actor in actors:
        if actor.process.poll() is None:
            actor.process.kill()
        actor.process.communicate()


LEARNER = ("learner", "cartpole", "--json", "--listen", "tcp://127.0.0.1:0")


def test_foreign_actor_alone_trains_a_policy(start, join):
    cluster = start(*LEARNER, "--total-steps", "2000", "--max-policy-lag", "0", *SMALL)
    did = join(cluster).done()
    code, out, err = cluster.wait()
    assert code == 0, err
    summary = json.loads(out)
    assert summary["steps"] >= 2000
    assert_balanced(summary)
    assert summary["tickets"]["rejected"].keys() <= {"warm-up"}
    books = summary["tickets"]
    assert did["rollouts"] - books["outstanding"] <= books["trained"] + books["rejected"].get("warm-up", 0)
    assert books["lost"] == 0
    assert did["versions"] == sorted(set(did["versions"]))
    assert did["fresh"][0] == [0, [0, 1, 2, 3]]
    assert not any(fresh for _, fresh in did["fresh"][1:])
    rows = [row for row in cluster.rows() if "first_ratio_error" in row]
    assert len(rows) > 5
    assert max(row["first_ratio_error"] for row in rows) < 1e-4  # its log-probabilities are the learner's
    cluster.assert_gone()


@pytest.mark.slow
def test_foreign_actor_learns_hands_over_and_follows_a_new_learner(start, join):
    cluster = start(*LEARNER, "--total-steps", "100000000", "--seed", "1")
    first = join(cluster)
    cluster.await_version(20)
    second = join(cluster)  # half of the worlds are handed over
    poll(lambda: len([a for a in verb(cluster, "status")["actors"] if a["rollouts"]]) == 2, "two actors at work")
    incarnation = verb(cluster, "status")["learner"]["incarnation"]
    for process in cluster.children("rustyrl_learner"):
        process.kill()
    await_learner(cluster, incarnation + 1)
    poll(lambda: (cluster.rows()[-1].get("return_mean") or 0) > 150, "a pole that stands for 3 s", 120.0)
    cluster.process.send_signal(signal.SIGTERM)
    code, out, err = cluster.wait()
    assert code == 143, err
    assert_balanced(json.loads(out))
    did = [actor.done() for actor in (first, second)]
    assert [one["joined"] >= 2 for one in did] == [True, True]
    assert did[0]["states"] > 0
    cluster.assert_gone()


@pytest.mark.slow
def test_foreign_actor_joins_with_a_key(start, join):
    cluster = start(*LEARNER[:-1], "tcp://0.0.0.0:0", "--total-steps", "2000", *SMALL)
    did = join(cluster, "--key", str(cluster.run / "keys" / "default.key")).done()
    code, out, err = cluster.wait()
    assert code == 0, err
    summary = json.loads(out)
    assert summary["steps"] >= 2000
    assert did["rollouts"] >= summary["tickets"]["trained"] > 0
