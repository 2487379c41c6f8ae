"""The struct that comes down: a policy as named float32 arrays.

The blob on the wire, the file of a checkpoint and the policy that a game ships are the same bytes with the
same reader: a safetensors container with one metadata key that holds the policy spec as canonical JSON. No
name, date, version or score inside, so equal policies are equal bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import safetensors
from msgspec import Meta
from numpy.typing import NDArray
from safetensors.numpy import save

from rustyrl.config import PolicyConfig
from rustyrl.errors import UsageError, WireError
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec, spaces_text

__all__ = [
    "VARIANCE_FLOOR",
    "PolicySpec",
    "Weights",
    "check_squashable",
    "decode_weights",
    "encode_weights",
    "policy_spec",
    "read_policy",
    "weights_layout",
]

METADATA_KEY = "rustyrl.policy"
MAX_HEADER_BYTES = 1 << 20
FORMAT = 2
LARGEST_SQUASHED = 1e30  # bounds beyond are no bounds
VARIANCE_FLOOR = 1e-8  # added to a variance before its root is taken, by whoever normalises


class _Format(msgspec.Struct):
    """The one thing that is read of a policy before all else."""

    format: int = 0


class PolicySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a reader needs to run the arrays of a policy.

    The observation arrays are flattened and joined in the order given, normalised if ``normalize`` with the
    normaliser's mean and variance and clipped to +-``observation_clip``, and passed through a multilayer
    perceptron with the ``hidden`` widths; its last layer gives, part after part, logits (discrete) or means (box).
    A box is a diagonal Gaussian whose samples are ``clipped`` to the bounds, or ``squashed`` into them by a tanh.
    """

    observation: tuple[ArraySpec, ...]
    action: Annotated[tuple[ActionSpec, ...], Meta(min_length=1, max_length=64)]
    hidden: tuple[Annotated[int, Meta(ge=1, le=65536)], ...]
    activation: Literal["tanh", "relu", "elu", "silu"]
    normalize: bool
    observation_clip: Annotated[float, Meta(gt=0)] = 10.0
    box: Literal["clipped", "squashed"] = "clipped"
    format: Literal[2] = 2

    def __post_init__(self) -> None:
        if self.box == "squashed":
            for part in self.action:
                check_squashable(part)

    @property
    def box_width(self) -> int:
        """How many numbers of an action are drawn from Gaussians."""
        return sum(part.width for part in self.action if part.kind == "box")

    @property
    def output_width(self) -> int:
        """The width of the network's last layer."""
        return sum(part.output_width for part in self.action)

    @property
    def summary(self) -> str:
        """What it maps to what and through what, in a line."""
        through = f"{' x '.join(map(str, self.hidden)) or 'no'} {self.activation}"
        return f"{spaces_text(self.observation, self.action)} through {through}{' normalised' * self.normalize}"


def check_squashable(part: ActionSpec) -> None:
    """Raise ValueError if a part of an action is a box whose bounds a tanh cannot be stretched to."""
    low, high = np.array(part.low, np.float32), np.array(part.high, np.float32)
    if (np.abs([low, high]) > LARGEST_SQUASHED).any() or (low >= high).any():
        raise ValueError(
            f"policy.box 'squashed' needs bounds, low below high; those of action {part.name!r} are {part.low} to "
            f"{part.high}"
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """One policy version: its spec and its arrays (names and shapes: `weights_layout`), all float32."""

    spec: PolicySpec
    arrays: dict[str, NDArray[np.float32]]


def policy_spec(policy: PolicyConfig, spec: EnvironmentSpec) -> PolicySpec:
    """The policy that a configuration asks for in an environment."""
    return PolicySpec(
        observation=spec.observation,
        action=spec.action,
        hidden=policy.hidden,
        activation=policy.activation,
        normalize=policy.normalize,
        observation_clip=policy.observation_clip,
        box=policy.box,
    )


def weights_layout(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """The name and shape of every array of a policy with this spec.

    ``policy.I.weight`` is `[in, out]` and ``policy.I.bias`` `[out]`, so that a layer is ``x @ weight + bias``.
    """
    width = sum(array.width for array in spec.observation)
    layout: dict[str, tuple[int, ...]] = {}
    sizes = [width, *spec.hidden, spec.output_width]
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        layout[f"policy.{index}.weight"] = (fan_in, fan_out)
        layout[f"policy.{index}.bias"] = (fan_out,)
    if spec.box_width:
        layout["log_std"] = (spec.box_width,)
    if spec.normalize:
        layout |= {"normalizer.mean": (width,), "normalizer.variance": (width,), "normalizer.count": (1,)}
    return layout


def encode_weights(weights: Weights) -> bytes:
    """Turn a policy into its bytes; equal policies give equal bytes."""
    _check_layout(weights)
    spec = msgspec.json.encode(weights.spec, order="deterministic").decode()
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(weights.arrays.items())}
    return bytes(save(arrays, metadata={METADATA_KEY: spec}))


def decode_weights(content: bytes | memoryview) -> Weights:
    """Read a policy from bytes that nobody has checked yet.

    Raises:
        WireError: naming what is wrong: not a policy, an unknown format, a missing or odd array, a number
            that is not finite.
    """
    content = bytes(content)
    spec = _read_policy_spec(content)
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise WireError("weights", f"not a safetensors container: {error}") from None
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors:
        if tensor["dtype"] != "F32":
            raise WireError("weights", f"array {name!r} is {tensor['dtype']}, expected F32")
        try:
            arrays[name] = np.frombuffer(tensor["data"], np.float32).reshape(tensor["shape"])
        except ValueError as error:  # more or larger dimensions than numpy has
            raise WireError("weights", f"array {name!r}: {error}") from None
    weights = Weights(spec, arrays)
    _check_layout(weights)
    return weights


def read_policy(path: Path) -> Weights:
    """Read a policy file; raises `UsageError` that names the file and what is wrong with it."""
    try:
        return decode_weights(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the policy {path}: {error.strerror}") from None
    except WireError as error:
        raise UsageError(f"{path} is not a rustyrl policy ({error})") from None


def _read_policy_spec(content: bytes) -> PolicySpec:
    # safetensors: 8 bytes little-endian header length, then JSON whose __metadata__ maps strings to strings.
    header_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header_bytes > min(MAX_HEADER_BYTES, len(content) - 8):
        raise WireError("weights", f"not a safetensors container: header of {header_bytes} bytes")
    try:
        header = msgspec.json.decode(content[8 : 8 + header_bytes], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.get("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        if METADATA_KEY not in metadata:
            raise WireError("weights", f"the file holds no {METADATA_KEY!r} metadata: not written by rustyrl")
        written = msgspec.json.decode(metadata[METADATA_KEY], type=_Format).format
        if written != FORMAT:
            raise WireError("weights", f"a policy of format {written}, this rustyrl reads format {FORMAT}")
        return msgspec.json.decode(metadata[METADATA_KEY], type=PolicySpec)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("weights", f"unreadable policy spec: {error}") from None


def _check_layout(weights: Weights) -> None:
    expected = weights_layout(weights.spec)
    if missing := expected.keys() - weights.arrays.keys():
        raise WireError("weights", f"missing arrays {sorted(missing)}")
    if unknown := weights.arrays.keys() - expected.keys():
        raise WireError("weights", f"unknown arrays {sorted(unknown)}")
    for name, shape in expected.items():
        array = weights.arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise WireError("weights", f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")
        if not np.isfinite(array).all():
            raise WireError("weights", f"{name} holds numbers that are not finite")
