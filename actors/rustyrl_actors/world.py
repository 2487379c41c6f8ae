"""What the author of an esper world writes, and how it becomes a spec."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import msgspec
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec, MetricSpec, read_spec, spec_to_json
from rustyrl_actors.agent import Agent
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.spaces import action_parts, observation_arrays

__all__ = [
    "ColumnWorld",
    "NoParameters",
    "ObjectWorld",
    "World",
    "WorldClass",
    "WorldInfo",
    "as_others_see_it",
    "describe_world",
]


class WorldInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a world declares of itself; spaces are those of one slot.

    ``step_s`` is the simulated time of an env step in s, which is ``ticks_per_step`` ticks of the game (the decision
    interval); ``action_mask`` says that the world masks the choices of its actions; ``goal`` is the default
    ``--stop-at``; ``evaluate_from`` are the conditions on training episodes from which on versions are evaluated;
    ``defaults`` are recommended configuration values by section.
    """

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    step_s: float
    max_episode_steps: int
    ticks_per_step: int = 1
    action_mask: bool = False
    metrics: tuple[MetricSpec, ...] = ()
    goal: tuple[str, ...] = ()
    evaluate_from: tuple[str, ...] = ()
    defaults: dict[str, dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name in ("ticks_per_step", "max_episode_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"WorldInfo.{name} is {value!r}, expected a whole number from 1 on")
        if not self.step_s > 0:
            raise UsageError(f"WorldInfo.step_s is {self.step_s!r}, expected seconds of simulated time, more than 0")
        for name, kind, example in (
            ("metrics", MetricSpec, "(MetricSpec(...),)"),
            ("goal", str, "('return_mean>=1',)"),
            ("evaluate_from", str, "('return_mean>=1',)"),
        ):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
                raise UsageError(f"WorldInfo.{name} is {value!r}, expected a tuple: {example}")


class ColumnWorld(Protocol):
    """An esper world whose components hold E slots as arrays with a leading row axis (column style)."""

    info: WorldInfo

    def build(self) -> Agent:
        """Create entities and processors in the current esper world; return the `Agent` among them."""
        ...

    def reset(self, rows: NDArray[np.intp], rng: SlotDraws) -> None:
        """Start a new episode in these slots, drawing from ``rng`` alone: `[len(rows), *size]` a call."""
        ...

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        """Write the observation of these slots into ``agent.observation``."""
        ...


class ObjectWorld(Protocol):
    """An ordinary esper game: one entity is one object, those with an `Agent` are controlled (object style).

    May have ``tick(self)``, which advances the game by one tick; without it that is ``esper.process()``. A game that
    draws from the global generators of Python's `random` or of numpy says ``global_random = True``: each world then
    has a state of them of its own, seeded with the world.
    """

    info: WorldInfo

    def reset(self, rng: np.random.Generator) -> None:
        """Begin a new game: add processors and create entities in an empty esper world, drawing from ``rng`` alone."""
        ...

    def observe(self) -> None:
        """Write the observation of every entity with an `Agent`."""
        ...


World = ColumnWorld | ObjectWorld


class NoParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of a world that declares none."""


class WorldClass(Protocol):
    """A class that makes worlds.

    It may have ``style`` ("column" unless it says "object"), ``default_slots`` (agents of one world: 64 in column
    style, 1 in object style) and ``Parameters``, a `msgspec.Struct` of what can be set with ``--set env.NAME=VALUE``.
    """

    def __call__(self, slots: int, parameters: Any) -> World:
        """Make a world for this number of slots."""
        ...


def describe_world(
    env: str, info: WorldInfo, slots: int, parameters: msgspec.Struct, defaults: dict[str, dict[str, Any]]
) -> EnvironmentSpec:
    """The spec of a world: everything about it that crosses a process boundary.

    Args:
        env: its name.
        info: what it declares; its defaults win over ``defaults``.
        slots: agents of one world.
        parameters: as they are set.
        defaults: configuration values that go with its style.
    """
    sections = {*defaults, *info.defaults}
    spec = EnvironmentSpec(
        env=env,
        observation=observation_arrays(env, info.observation_space),
        action=action_parts(env, info.action_space, masked=info.action_mask),
        slots=slots,
        step_s=info.step_s,
        max_episode_steps=info.max_episode_steps,
        metrics=info.metrics,
        goal=info.goal,
        evaluate_from=info.evaluate_from,
        parameters=msgspec.to_builtins(parameters),
        defaults={name: {**defaults.get(name, {}), **info.defaults.get(name, {})} for name in sorted(sections)},
    )
    return as_others_see_it(spec)


def as_others_see_it(spec: EnvironmentSpec) -> EnvironmentSpec:
    """The spec as it is after its way through JSON, so that every process has the same fingerprint of it.

    Raises:
        UsageError: something in it does not survive that, or is not what it should be.
    """
    try:
        return read_spec(spec_to_json(spec))
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise UsageError(f"environment {spec.env!r} declares what cannot be sent: {error}") from None
