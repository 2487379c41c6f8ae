"""What an environment is to everyone but its own process: names, shapes, ranges, metrics, goal.

The actor package describes an environment once (``python -m rustyrl_actors describe ENV``); this is the
result. It travels as JSON (``spec.json`` in the run folder), and its fingerprint is what an actor and a
learner compare before they exchange a single step.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

__all__ = ["ActionSpec", "ArraySpec", "EnvironmentSpec", "MetricSpec", "read_spec", "spaces_text", "spec_to_json"]

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
# Sixteen dimensions are more than any world has and fewer than numpy takes.
Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31)], ...], Meta(max_length=16)]
DTypeName = Literal["float32", "int32", "int64", "uint8", "bool"]
Scalar = bool | int | float | str


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
    """The action of one slot: ``discrete`` is one integer below ``count``, ``box`` is `shape` float32.

    ``low`` and ``high`` are the bounds of a box, flattened; actions are clipped to them before the world sees
    them and stored raw in the rollout.
    """

    kind: Literal["discrete", "box"]
    name: Name = "main"
    count: Annotated[int, Meta(ge=0)] = 0
    shape: Shape = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @property
    def array(self) -> ArraySpec:
        """The array that a rollout stores for this action."""
        return ArraySpec(self.name, self.shape, "int64" if self.kind == "discrete" else "float32")

    @property
    def parameter_count(self) -> int:
        """The number of outputs of a policy network for this action: logits, or means."""
        return self.count if self.kind == "discrete" else math.prod(self.shape)


class MetricSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure over many episodes: ``aggregate`` of the per-episode number ``episode_metric``.

    An episode for which the number means nothing reports NaN and is left out of the aggregate.
    """

    name: Name
    episode_metric: Name
    aggregate: Literal["mean", "median"]


class EnvironmentSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the learner, the launcher and a policy file need to know of an environment.

    ``slots`` is the number of agents of one world; ``goal`` and ``evaluate_from`` are conditions as
    ``--stop-at`` takes them: the default stop, and what training episodes must reach before a version is
    evaluated; ``defaults`` are the configuration values that the world's author recommends.
    """

    env: str
    observation: tuple[ArraySpec, ...]
    action: ActionSpec
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
    """Decode and check a spec; raises `msgspec.ValidationError` naming the field that is wrong."""
    return msgspec.json.decode(content, type=EnvironmentSpec)


def spaces_text(observation: tuple[ArraySpec, ...], action: ActionSpec) -> str:
    """Observation and action spaces in a line, for messages."""
    seen = ", ".join(f"{array.name} {array.shape}" for array in observation)
    done = f"{action.count} choices" if action.kind == "discrete" else f"a box {action.shape}"
    return f"{seen} to {done}"
