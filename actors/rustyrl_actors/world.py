"""What the author of an esper world writes, and how it becomes a spec."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import msgspec
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import UsageError
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec, MetricSpec
from rustyrl_actors.agent import Agent

__all__ = ["SINGLE_ARRAY", "World", "WorldClass", "WorldInfo", "describe_world"]

SINGLE_ARRAY = "main"  # the name of an observation or action that is one array


class WorldInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a world declares of itself; spaces are those of one slot.

    ``goal`` is the default ``--stop-at``; ``evaluate_from`` are the conditions on training episodes from which
    on versions are evaluated; ``defaults`` are recommended configuration values by section.
    """

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    step_s: float
    max_episode_steps: int
    ticks_per_step: int = 1
    metrics: tuple[MetricSpec, ...] = ()
    goal: tuple[str, ...] = ()
    evaluate_from: tuple[str, ...] = ()
    defaults: dict[str, dict[str, Any]] = {}


class World(Protocol):
    """An esper world whose components hold E slots as arrays with a leading row axis (column style)."""

    info: WorldInfo

    def build(self) -> Agent:
        """Create entities and processors in the current esper world; return the `Agent` among them."""
        ...

    def reset(self, rows: NDArray[np.intp], rng: np.random.Generator) -> None:
        """Start a new episode in these slots, drawing from ``rng`` alone."""
        ...

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        """Write the observation of these slots into ``agent.observation``."""
        ...


class WorldClass(Protocol):
    """A class that makes worlds: its name, its declared parameters, its usual number of slots."""

    name: str
    default_slots: int
    Parameters: type[msgspec.Struct]

    def __call__(self, slots: int, parameters: Any) -> World:
        """Make a world for this number of slots."""
        ...


def describe_world(env: str, world: World, slots: int, parameters: msgspec.Struct) -> EnvironmentSpec:
    """The spec of a world: everything about it that crosses a process boundary."""
    info = world.info
    return EnvironmentSpec(
        env=env,
        observation=_observation_arrays(env, info.observation_space),
        action=_action_spec(env, info.action_space),
        slots=slots,
        step_s=info.step_s,
        max_episode_steps=info.max_episode_steps,
        metrics=info.metrics,
        goal=info.goal,
        evaluate_from=info.evaluate_from,
        parameters=msgspec.to_builtins(parameters),
        defaults=info.defaults,
    )


def _observation_arrays(env: str, space: gymnasium.Space[Any]) -> tuple[ArraySpec, ...]:
    if isinstance(space, gymnasium.spaces.Dict):
        return tuple(_box_array(env, name, part) for name, part in sorted(space.spaces.items()))
    return (_box_array(env, SINGLE_ARRAY, space),)


def _box_array(env: str, name: str, space: gymnasium.Space[Any]) -> ArraySpec:
    if not isinstance(space, gymnasium.spaces.Box) or space.dtype != np.float32:
        raise UsageError(
            f"environment {env!r}: observation {name!r} is {space}; expected a float32 Box or a Dict of them"
        )
    return ArraySpec(name, space.shape, "float32")


def _action_spec(env: str, space: gymnasium.Space[Any]) -> ActionSpec:
    if isinstance(space, gymnasium.spaces.Discrete) and space.start == 0:
        return ActionSpec("discrete", SINGLE_ARRAY, count=int(space.n))
    if isinstance(space, gymnasium.spaces.Box) and space.dtype == np.float32:
        low, high = (tuple(float(v) for v in bound.ravel()) for bound in (space.low, space.high))
        return ActionSpec("box", SINGLE_ARRAY, shape=space.shape, low=low, high=high)
    raise UsageError(
        f"environment {env!r}: action space {space} is not supported; expected Discrete(n) or a float32 Box"
    )
