"""The other way round: worlds as Gymnasium environments, one at a time and batched.

``import rustyrl_actors`` registers the built-in ones (``rustyrl/Drone-v0``) and ``rustyrl/World-v0``, which takes the
name of any: ``gymnasium.make("rustyrl/World-v0", env="my_game.py:Arena")``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rustyrl.errors import UsageError
from rustyrl_actors.catalog import BUILT_IN, find_environment
from rustyrl_actors.context import Context
from rustyrl_actors.environment import Arrays, StepRows, TimeStep, allocate_rows
from rustyrl_actors.joined import JoinedEnvironment
from rustyrl_actors.spaces import has_parts, in_form, leaf_values, leaves, rebuild

__all__ = ["WorldEnv", "WorldVectorEnv", "register_worlds"]

Space = gymnasium.Space[Any]


def register_worlds() -> None:
    """Register the built-in worlds with Gymnasium as ``rustyrl/Name-v0``; done when ``rustyrl_actors`` is imported."""
    for env in BUILT_IN:
        name = "".join(word.capitalize() for word in env.split("-")).replace("pole", "Pole")
        _register(f"rustyrl/{name}-v0", env=env)
    _register("rustyrl/World-v0")


def _register(env_id: str, **settings: Any) -> None:
    if env_id not in gymnasium.registry:
        gymnasium.register(
            env_id,
            entry_point="rustyrl_actors.gym_world:WorldEnv",
            vector_entry_point="rustyrl_actors.gym_world:WorldVectorEnv",
            kwargs=settings,
        )


class WorldVectorEnv(gymnasium.vector.VectorEnv[Any, Any, NDArray[Any]]):
    """Any esper world as a Gymnasium vector environment with resets in the same step.

    ``info`` holds ``final_obs`` and ``final_info`` where episodes ended (``episode_metrics``, if the world declares
    some), and ``action_mask`` where the world masks its choices.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, env: str, num_envs: int = 1, render_mode: str | None = None, **settings: Any) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._stepper = _Stepper(env, num_envs, settings)
        self.single_observation_space = self._stepper.observation_space
        self.single_action_space = self._stepper.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere; a list of seeds is taken as one seed made of them all.

        Without a seed, or with None in the list, what is drawn goes on from the last one.
        """
        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed), options=options)
        elif len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} environments; expected as many, or one number")
        elif None not in seed:
            self.np_random = np.random.default_rng([int(one) for one in seed if one is not None])
        self._stepper.reset((int(self.np_random.integers(2**62)),))
        return self._stepper.observation(), self._info()

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Step every slot once."""
        step, rows = self._stepper.step(actions)
        info = self._info()
        if step.episodes is not None and step.final_observation is not None:
            self._add_final(info, step)
        return (
            self._stepper.observation(),
            rows.reward.astype(np.float64),
            rows.terminated.copy(),
            rows.truncated.copy(),
            info,
        )

    def close_extras(self, **_settings: Any) -> None:
        """Close the world."""
        self._stepper.close()

    def _info(self) -> dict[str, Any]:
        masks = self._stepper.masks()
        return {} if masks is None else {"action_mask": masks}

    def _add_final(self, info: dict[str, Any], step: TimeStep) -> None:
        observation = np.full(self.num_envs, None, object)
        final_info: dict[str, Any] = {}
        ended = np.zeros(self.num_envs, bool)
        for row, slot in enumerate(step.episodes.slot):  # type: ignore[union-attr]
            observation[slot] = self._stepper.one_observation(step.final_observation or {}, row)
            final_info = self._add_info(final_info, _episode_info(step, row), int(slot))
            ended[slot] = True
        info |= {"final_obs": observation, "_final_obs": ended, "final_info": final_info, "_final_info": ended.copy()}


class WorldEnv(gymnasium.Env[Any, Any]):
    """Any esper world with one slot as a Gymnasium environment."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, env: str, render_mode: str | None = None, **settings: Any) -> None:
        self.render_mode = render_mode
        self._stepper = _Stepper(env, 1, settings)
        self.observation_space = self._stepper.observation_space
        self.action_space = self._stepper.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a new episode."""
        super().reset(seed=seed, options=options)
        self._stepper.reset((int(self.np_random.integers(2**62)),))
        return self._stepper.one_observation(self._stepper.rows.observation, 0), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step once; after an end, `reset` comes before the next."""
        batched = iter([np.asarray(value)[None] for value in leaf_values(self.action_space, action)])
        step, rows = self._stepper.step(rebuild(self.action_space, batched))
        info = self._info()
        seen = rows.observation
        if step.final_observation is not None:
            seen = step.final_observation
            info |= _episode_info(step, 0)
        observation = self._stepper.one_observation(seen, 0)
        return observation, float(rows.reward[0]), bool(rows.terminated[0]), bool(rows.truncated[0]), info

    def close(self) -> None:
        """Close the world."""
        self._stepper.close()

    def _info(self) -> dict[str, Any]:
        masks = self._stepper.masks()
        if masks is None:
            return {}
        one = {name: mask[0] for name, mask in masks.items()} if isinstance(masks, dict) else masks[0]
        return {"action_mask": one}


@contextmanager
def _visit() -> Iterator[None]:
    """Be in our worlds for a while, and leave the rest of the process as it was."""
    try:
        yield
    finally:
        Context.hand_back()


class _Stepper:
    """The worlds behind both, stepped as one, and the way between their arrays and Gymnasium's values."""

    observation_space: Space
    action_space: Space

    def __init__(self, env: str, slots: int, settings: dict[str, Any]) -> None:
        source = find_environment(env, settings)
        info = source.info
        if info is None:
            raise UsageError(f"{env!r} is a Gymnasium environment already")
        if "slots" in settings and source.resizable:
            raise UsageError(f"{env!r}: num_envs says how many; slots is not to be set")
        if source.resizable:
            source = find_environment(env, {**settings, "slots": slots})
        elif source.spec.slots != 1:
            raise UsageError(
                f"{env!r} has {source.spec.slots} agents in one world; Gymnasium has no way to say that some of them "
                "are gone; set slots=1, or train on it with rustyrl"
            )
        # Copies: a world's spaces may be shared, and whoever samples actions seeds them.
        self.observation_space, self.action_space = map(copy.deepcopy, (info.observation_space, info.action_space))
        self._environment = JoinedEnvironment([source.make() for _ in range(slots // source.spec.slots)])
        self.spec = self._environment.spec
        self.rows = allocate_rows(self.spec)
        self._begun = False
        self._parts = self.spec.action
        self._bounds = {
            part.name: [np.reshape(bound, part.shape).astype(np.float32) for bound in (part.low, part.high)]
            for part in self._parts
            if part.kind == "box"
        }
        self._dtypes = [leaf.dtype for _, leaf in leaves(self.observation_space)]

    def reset(self, seed: tuple[int, ...]) -> None:
        """Start new episodes everywhere."""
        with _visit():
            self._environment.reset(seed, self.rows)
        self._begun = True

    def step(self, action: Any) -> tuple[TimeStep, StepRows]:
        """Step with an action in the form of the batched space; boxes are clipped to their bounds."""
        if not self._begun:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        arrays: Arrays = {}
        values = leaf_values(self.action_space, action)
        for part, value in zip(self._parts, values, strict=True):
            array = np.asarray(value).reshape(self.spec.slots, *part.shape)
            if part.kind == "discrete":
                choice = array.astype(np.int64)
                if ((choice < 0) | (choice >= np.reshape(part.counts, part.shape))).any():
                    raise ValueError(f"action {part.name!r} is {value!r}; expected {self.action_space}")
                arrays[part.name] = choice
            else:
                arrays[part.name] = np.clip(array.astype(np.float32), *self._bounds[part.name])
        with _visit():
            return self._environment.step(arrays, self.rows), self.rows

    def observation(self) -> Any:
        """What every slot sees, copied, in the form of the batched space."""
        return self._in_form(array.copy() for array in self.rows.observation.values())

    def one_observation(self, arrays: Arrays, row: int) -> Any:
        """One row of named arrays in the form of the space."""
        return self._in_form(array[row, ...].copy() for array in arrays.values())  # an array also for shape ()

    def masks(self) -> Any:
        """What every slot may do, copied: one array, or by part where the action has several; None without masks."""
        if not self.rows.action_mask:
            return None
        masks = {name: mask.astype(np.int8) for name, mask in self.rows.action_mask.items()}
        return in_form(masks, single=not has_parts(self.action_space))

    def close(self) -> None:
        """Close the worlds."""
        self._environment.close()

    def _in_form(self, arrays: Iterable[NDArray[Any]]) -> Any:
        typed = [array.astype(dtype, copy=False) for array, dtype in zip(arrays, self._dtypes, strict=True)]
        return rebuild(self.observation_space, iter(typed))


def _episode_info(step: TimeStep, row: int) -> dict[str, Any]:
    """The world's metrics of an episode that ended; not as ``episode``, which Gymnasium's statistics claim."""
    assert step.episodes is not None  # noqa: S101 - a final observation comes with an episode
    metrics = {name: float(values[row]) for name, values in step.episodes.metrics.items()}
    return {"episode_metrics": metrics} if metrics else {}
