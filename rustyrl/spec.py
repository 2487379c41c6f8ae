"""What an environment is to everyone but its own process: names, shapes, ranges, metrics, goal.

The actor package describes an environment once (``python -m rustyrl_actors describe ENV``); this is the
result. It travels as JSON (``spec.json`` in the run folder), and its fingerprint is what an actor and a
learner compare before they exchange a single step.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

__all__ = [
    "UNBOUNDED",
    "ActionBlock",
    "ActionSpec",
    "ArraySpec",
    "DTypeName",
    "EnvironmentSpec",
    "MetricSpec",
    "action_blocks",
    "read_spec",
    "spaces_text",
    "spec_to_json",
]

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
# Sixteen dimensions are more than any world has and fewer than numpy takes.
Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31)], ...], Meta(max_length=16)]
DTypeName = Literal["float32", "int32", "int64", "uint8", "bool"]
Scalar = bool | int | float | str
Aggregate = Literal["mean", "median"]
UNBOUNDED = 3.4028234663852886e38  # the largest float32: clipping to it changes nothing


class ArraySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One named array of one slot, without the time and slot axes."""

    name: Name
    shape: Shape
    dtype: DTypeName

    @property
    def width(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class ActionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One named part of the action of one slot; most environments have one part, a Dict or Tuple has several.

    ``discrete`` is `shape` int64, each number a choice below its entry of ``counts`` (flattened): Discrete has one,
    MultiDiscrete several, MultiBinary twos. ``box`` is `shape` float32 between ``low`` and ``high``, flattened, which
    are +-``UNBOUNDED`` where there is no bound.
    A ``masked`` part comes with a mask of `[sum(counts)]` bool that says which choices are allowed now.
    """

    kind: Literal["discrete", "box"]
    name: Name = "main"
    shape: Shape = ()
    counts: Annotated[tuple[Annotated[int, Meta(ge=1, le=2**20)], ...], Meta(max_length=65536)] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    masked: bool = False

    def __post_init__(self) -> None:
        width = math.prod(self.shape)
        if not width:
            raise ValueError(f"action {self.name!r} of shape {self.shape} holds nothing to choose")
        if not all(map(math.isfinite, (*self.low, *self.high))):  # JSON has no infinities
            raise ValueError(f"action {self.name!r}: a side without a bound is +-{UNBOUNDED}, not infinite")
        lengths = {"discrete": (width, 0, 0), "box": (0, width, width)}[self.kind]
        if (len(self.counts), len(self.low), len(self.high)) != lengths:
            raise ValueError(
                f"action {self.name!r}: counts, low and high do not fit a {self.kind} of shape {self.shape}"
            )
        if self.masked and self.kind == "box":
            raise ValueError(f"action {self.name!r}: only discrete parts are masked")

    @property
    def array(self) -> ArraySpec:
        """The array that a rollout stores for this part."""
        return ArraySpec(self.name, self.shape, "int64" if self.kind == "discrete" else "float32")

    @property
    def mask(self) -> ArraySpec:
        """The array that a rollout stores for the mask of this part."""
        return ArraySpec(self.name, (sum(self.counts),), "bool")

    @property
    def first(self) -> tuple[int, ...]:
        """Where each number's choices begin within the mask, or the logits, of this part."""
        return tuple(itertools.accumulate((0, *self.counts[:-1])))

    @property
    def width(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_number(self) -> bool:
        """Whether it is one choice without a shape: a plain whole number to whoever acts for one slot."""
        return self.kind == "discrete" and not self.shape

    @property
    def output_width(self) -> int:
        """The number of outputs of a policy network for this part: logits, or means."""
        return sum(self.counts) if self.kind == "discrete" else self.width

    @property
    def text(self) -> str:
        """It in words, for messages."""
        if self.kind == "box":
            return f"a box {self.shape}"
        return f"{' x '.join(map(str, self.counts))} choices{' masked' * self.masked}"


class ActionBlock(NamedTuple):
    """A run of like numbers within the joined action of a slot: what sampling and log-probability work on.

    ``groups`` choices among ``choices`` each, or a box of ``groups`` numbers (``choices`` 1).

    part: which `ActionSpec`; within: its columns of that part, flattened
    column: its columns of the joined action, all parts flattened and joined in order
    output: its columns of the network's output
    mask: its columns of the joined masks, None if all choices are always allowed
    """

    kind: Literal["discrete", "box"]
    part: int
    groups: int
    choices: int
    within: slice
    column: slice
    output: slice
    mask: slice | None


def action_blocks(action: tuple[ActionSpec, ...]) -> tuple[ActionBlock, ...]:
    """Lay out the parts of an action: neighbouring choices with equal counts make one block, a box is one."""
    blocks: list[ActionBlock] = []
    column = output = mask = 0
    for index, part in enumerate(action):
        runs = (
            [(1, part.width)]
            if part.kind == "box"
            else [(count, len(list(run))) for count, run in itertools.groupby(part.counts)]
        )
        start = 0
        for count, groups in runs:
            width = groups * count
            blocks.append(
                ActionBlock(
                    part.kind,
                    index,
                    groups,
                    count,
                    slice(start, start + groups),
                    slice(column, column + groups),
                    slice(output, output + width),
                    slice(mask, mask + width) if part.masked else None,
                )
            )
            start, column, output, mask = start + groups, column + groups, output + width, mask + width * part.masked
    return tuple(blocks)


class MetricSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure over many episodes: ``aggregate`` of the per-episode number ``episode_metric``.

    An episode for which the number means nothing reports NaN and is left out of the aggregate.
    """

    name: Name
    episode_metric: Name
    aggregate: Aggregate

    def __post_init__(self) -> None:
        known = get_args(Aggregate)
        if self.aggregate not in known:
            raise ValueError(f"metric {self.name!r}: aggregate is {self.aggregate!r}, expected {' or '.join(known)}")


class EnvironmentSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Everything that the learner, the launcher and a policy file need to know of an environment.

    ``slots`` is the number of agents of one world; ``goal`` and ``evaluate_from`` are conditions as
    ``--stop-at`` takes them: the default stop, and what training episodes must reach before a version is
    evaluated; ``defaults`` are the configuration values that the world's author recommends.
    """

    env: str
    observation: tuple[ArraySpec, ...]
    action: Annotated[tuple[ActionSpec, ...], Meta(min_length=1, max_length=64)]
    slots: Annotated[int, Meta(ge=1)]
    step_s: float
    max_episode_steps: Annotated[int, Meta(ge=1)]
    metrics: tuple[MetricSpec, ...] = ()
    goal: tuple[str, ...] = ()
    evaluate_from: tuple[str, ...] = ()
    parameters: dict[str, Scalar] = {}
    defaults: dict[str, dict[str, Any]] = {}

    @property
    def episode_metrics(self) -> tuple[str, ...]:
        """The per-episode numbers that the world reports, sorted, each once."""
        return tuple(sorted({metric.episode_metric for metric in self.metrics}))

    @property
    def observation_width(self) -> int:
        """The length of one slot's observation when its arrays are flattened and joined by name."""
        return sum(array.width for array in self.observation)

    @property
    def action_width(self) -> int:
        """The numbers of one slot's action when its parts are flattened and joined in order."""
        return sum(part.width for part in self.action)

    @property
    def mask_width(self) -> int:
        """The numbers of one slot's action masks, joined in order; 0 if no part is masked."""
        return sum(sum(part.counts) for part in self.action if part.masked)

    @cached_property  # every rollout is held against it
    def fingerprint(self) -> str:
        """16 hex digits that agree exactly when two processes mean the same environment."""
        content = {
            "env": self.env.rpartition("/")[2],  # a moved project is the same environment
            "observation": msgspec.to_builtins(self.observation),
            "action": msgspec.to_builtins(self.action),
            "slots": self.slots,
            "step_s": self.step_s,
            "max_episode_steps": self.max_episode_steps,
            "metrics": msgspec.to_builtins(self.metrics),
            "parameters": self.parameters,
        }
        return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:16]


def spec_to_json(spec: EnvironmentSpec) -> bytes:
    """Encode a spec for ``spec.json``."""
    return msgspec.json.format(msgspec.json.encode(spec, order="deterministic"), indent=2)


def read_spec(content: bytes) -> EnvironmentSpec:
    """Decode and check a spec; raises `msgspec.DecodeError`, which names the field that is wrong."""
    try:
        return msgspec.json.decode(content, type=EnvironmentSpec)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"the spec is damaged: {error}") from None


def spaces_text(observation: tuple[ArraySpec, ...], action: tuple[ActionSpec, ...]) -> str:
    """Observation and action spaces in a line, for messages."""
    seen = ", ".join(f"{array.name} {array.shape}" for array in observation)
    named = len(action) > 1
    return f"{seen} to {', '.join(f'{part.name} {part.text}' if named else part.text for part in action)}"
