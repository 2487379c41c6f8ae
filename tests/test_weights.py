"""The policy container: equal policies are equal bytes, and what is not a policy is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from rustyrl.errors import UsageError, WireError
from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl.weights import METADATA_KEY, PolicySpec, Weights, decode_weights, encode_weights, read_policy
from rustyrl.weights import weights_layout as layout_of

BOX = ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0))
DISCRETE = ActionSpec("discrete", counts=(3,))
HYBRID = (ActionSpec("discrete", "gait", shape=(2,), counts=(3, 4), masked=True), BOX)
Header = dict[str, Any]


Action = ActionSpec | tuple[ActionSpec, ...]


def make_spec(action: Action = BOX, *, normalize: bool = True, hidden: tuple[int, ...] = (5, 6)) -> PolicySpec:
    observation = (ArraySpec("camera", (2, 2), "float32"), ArraySpec("body", (3,), "float32"))
    return PolicySpec(observation, action if isinstance(action, tuple) else (action,), hidden, "tanh", normalize)


def make_weights(spec: PolicySpec, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights(spec, {name: rng.normal(size=shape).astype(np.float32) for name, shape in layout_of(spec).items()})


def altered(change: Callable[[Header], object], content: bytes | None = None) -> bytes:
    """A policy whose safetensors header went through ``change``; its data stay."""
    content = encode_weights(make_weights(make_spec())) if content is None else content
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + size :]


def altered_spec(**changes: object) -> bytes:
    def change(header: Header) -> None:
        spec = json.loads(header["__metadata__"][METADATA_KEY])
        header["__metadata__"][METADATA_KEY] = json.dumps({**spec, **changes})

    return altered(change)


def refusal(content: bytes) -> str:
    """What a refused policy is refused with."""
    with pytest.raises(WireError) as caught:
        decode_weights(content)
    assert caught.value.reason == "weights"
    return str(caught.value)


@pytest.mark.parametrize("action", [BOX, DISCRETE, HYBRID], ids=["box", "discrete", "hybrid"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("hidden", [(5, 6), ()], ids=["deep", "linear"])
def test_round_trip_keeps_spec_and_every_bit(action: Action, normalize: bool, hidden: tuple[int, ...]) -> None:
    weights = make_weights(make_spec(action, normalize=normalize, hidden=hidden))
    read = decode_weights(memoryview(encode_weights(weights)))
    assert read.spec == weights.spec
    assert read.arrays.keys() == weights.arrays.keys()
    for name, array in weights.arrays.items():
        assert read.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(read.arrays[name], array)


def test_layout_names_every_array_with_its_shape() -> None:
    assert layout_of(make_spec()) == {
        "policy.0.weight": (7, 5),
        "policy.0.bias": (5,),
        "policy.1.weight": (5, 6),
        "policy.1.bias": (6,),
        "policy.2.weight": (6, 2),
        "policy.2.bias": (2,),
        "log_std": (2,),
        "normalizer.mean": (7,),
        "normalizer.variance": (7,),
        "normalizer.count": (1,),
    }
    assert "log_std" not in layout_of(make_spec(DISCRETE))
    hybrid = layout_of(make_spec(HYBRID))
    assert hybrid["policy.2.weight"] == (6, 3 + 4 + 2)
    assert hybrid["log_std"] == (2,)
    assert not any(name.startswith("normalizer") for name in layout_of(make_spec(normalize=False)))


def test_equal_policies_are_equal_bytes_however_they_are_held() -> None:
    weights = make_weights(make_spec())
    content = encode_weights(weights)
    backwards = Weights(make_spec(), dict(reversed(weights.arrays.items())))
    assert encode_weights(backwards) == content
    strided = {name: np.asfortranarray(np.repeat(array, 2, axis=0))[::2] for name, array in weights.arrays.items()}
    assert encode_weights(Weights(make_spec(), strided)) == content
    assert encode_weights(decode_weights(content)) == content


def test_another_number_or_spec_is_other_bytes() -> None:
    weights = make_weights(make_spec())
    content = encode_weights(weights)
    weights.arrays["log_std"][1] = np.nextafter(weights.arrays["log_std"][1], np.float32(9))
    assert encode_weights(weights) != content
    spec = msgspec.structs.replace(make_spec(), activation="relu")
    assert encode_weights(make_weights(spec)) != content


def test_any_safetensors_reader_reads_the_arrays() -> None:
    weights = make_weights(make_spec())
    arrays = safetensors.numpy.load(encode_weights(weights))
    assert arrays.keys() == weights.arrays.keys()
    np.testing.assert_array_equal(arrays["policy.1.weight"], weights.arrays["policy.1.weight"])


def test_every_truncation_is_refused() -> None:
    content = encode_weights(make_weights(make_spec()))
    for size in [*range(0, len(content), 7), len(content) - 1]:
        refusal(content[:size])


def test_trailing_bytes_are_refused() -> None:
    assert "not a safetensors container" in refusal(encode_weights(make_weights(make_spec())) + b"\0")


@pytest.mark.parametrize("claimed", [2**20 + 1, 2**40, 2**64 - 1])
def test_a_huge_claimed_header_is_refused_before_anything_is_built(claimed: int) -> None:
    assert f"header of {claimed} bytes" in refusal(claimed.to_bytes(8, "little") + bytes(100))


def test_an_array_of_another_type_is_refused() -> None:
    assert "array 'log_std' is I32, expected F32" in refusal(altered(lambda h: h["log_std"].update(dtype="I32")))


def test_an_array_of_another_shape_is_refused() -> None:
    message = refusal(altered(lambda h: h["policy.0.weight"].update(shape=[5, 7])))
    assert "policy.0.weight is float32 (5, 7), expected float32 (7, 5)" in message


@pytest.mark.parametrize("shape", [[1] * 64 + [2], [2] + [1] * 500], ids=["65", "501"])
def test_an_array_of_absurdly_many_dimensions_is_refused(shape: list[int]) -> None:
    assert "log_std" in refusal(altered(lambda h: h["log_std"].update(shape=shape)))


def test_an_empty_array_of_absurd_shape_is_refused() -> None:
    def change(header: Header) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["extra"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [end, end]}

    assert "extra" in refusal(altered(change))


def test_missing_and_unknown_arrays_are_refused_by_name() -> None:
    def rename(header: Header) -> None:
        header["log_sdt"] = header.pop("log_std")

    assert "missing arrays ['log_std']" in refusal(altered(rename))
    weights = make_weights(make_spec())
    extra = {**weights.arrays, "value.0.bias": np.zeros(1, np.float32)}
    content = safetensors.numpy.save(extra, metadata={METADATA_KEY: msgspec.json.encode(weights.spec).decode()})
    assert "unknown arrays ['value.0.bias']" in refusal(content)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    content = encode_weights(make_weights(make_spec()))
    content = content[:-4] + np.float32(value).tobytes()
    assert "holds numbers that are not finite" in refusal(content)


def test_a_file_without_our_metadata_is_refused() -> None:
    assert "not written by rustyrl" in refusal(altered(lambda h: h.pop("__metadata__")))
    assert "not written by rustyrl" in refusal(altered(lambda h: h["__metadata__"].clear()))
    foreign = safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, metadata={"format": "pt"})
    assert "not written by rustyrl" in refusal(foreign)


def test_unreadable_metadata_is_refused() -> None:
    for text in ("", "{", "[]", "null", '"spec"', "[" * 5000):
        assert "unreadable policy spec" in refusal(
            altered(lambda h, t=text: h["__metadata__"].update({METADATA_KEY: t}))
        )
    assert "unreadable policy spec" in refusal(altered(lambda h: h.update(__metadata__=3)))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"format": 3},
        {"activation": "gelu"},
        {"hidden": [5, 0]},
        {"hidden": [5, 65537]},
        {"observation_clip": 0},
        {"observation_clip": None},
        {"normalize": 1},
        {"score": 3.0},
        {"observation": [{"name": "body", "shape": [-1], "dtype": "float32"}]},
        {"observation": [{"name": "../body", "shape": [3], "dtype": "float32"}]},
        {"observation": [{"name": "body", "shape": [3], "dtype": "object"}]},
        {"action": {"kind": "tuple"}},
        {"action": []},
        {"action": [{"kind": "tuple"}]},
        {"action": [{"kind": "discrete"}]},
        {"action": [{"kind": "discrete", "counts": [3, 3]}]},
        {"action": [{"kind": "discrete", "counts": [0]}]},
        {"action": [{"kind": "box", "shape": [2], "low": [0.0], "high": [1.0, 1.0]}]},
        {"action": [{"kind": "box", "low": [0.0], "high": [1.0], "masked": True}]},
        {"box": "folded"},
        {"box": "squashed", "action": [{"kind": "box", "shape": [2], "low": [0.0, 1.0], "high": [1.0, 1.0]}]},
    ],
    ids=str,
)
def test_a_spec_out_of_range_or_of_another_format_is_refused(changes: Header) -> None:
    said = refusal(altered_spec(**changes))
    assert "this rustyrl reads format 2" in said if "format" in changes else "unreadable policy spec" in said


def test_a_spec_that_claims_more_than_the_file_holds_is_refused() -> None:
    assert "missing arrays" in refusal(altered_spec(hidden=[65536] * 100))
    assert "policy.0.weight is float32 (7, 5)" in refusal(altered_spec(hidden=[65536, 65536]))


def test_only_complete_finite_policies_are_written() -> None:
    weights = make_weights(make_spec())
    weights.arrays["log_std"][0] = np.nan
    with pytest.raises(WireError, match="log_std holds numbers that are not finite"):
        encode_weights(weights)
    del weights.arrays["log_std"]
    with pytest.raises(WireError, match="missing arrays"):
        encode_weights(weights)
    weights.arrays["log_std"] = np.zeros(2, np.float64)  # type: ignore[assignment]
    with pytest.raises(WireError, match="log_std is float64"):
        encode_weights(weights)


def test_reading_a_policy_file_names_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(UsageError, match=r"cannot read the policy .*policy\.safetensors: No such file"):
        read_policy(path)
    path.write_bytes(b"not a policy at all")
    with pytest.raises(UsageError, match=r"policy\.safetensors is not a rustyrl policy"):
        read_policy(path)
    weights = make_weights(make_spec())
    path.write_bytes(encode_weights(weights))
    assert read_policy(path).spec == weights.spec
