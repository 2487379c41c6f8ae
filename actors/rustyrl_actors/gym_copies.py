"""The environments behind a ``gym:ID``: copies that are stepped one after another, or their own batch."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from rustyrl.errors import ContractError, UsageError
from rustyrl_actors.environment import Arrays, StepRows
from rustyrl_actors.gym_values import GymReader
from rustyrl_actors.spaces import has_parts, leaf_values, leaves, rebuild

__all__ = ["Env", "GymBatch", "GymCopies", "Vector", "close_all", "make_gym"]

log = logging.getLogger(__name__)

Env = gymnasium.Env[Any, Any]
Vector = VectorEnv[Any, Any, Any]


class GymCopies:
    """Environments that are stepped one after another, and reset as soon as they end.

    Gymnasium's `SyncVectorEnv` would do, but its same-step reset hands out final observations that an environment
    which writes into one array overwrites in its reset, and it falls over infos that cannot be stacked.
    """

    def __init__(self, env: str, envs: list[Env]) -> None:
        self._env = env
        self._envs = envs
        self.action_space = envs[0].action_space
        self._reader = GymReader(env, envs[0].observation_space)
        self._has_parts = has_parts(self.action_space)
        self._is_number = [isinstance(leaf, spaces.Discrete) for _, leaf in leaves(self.action_space)]
        self._left = np.zeros(len(envs), np.int64)  # env steps until a slot's first episode is cut short; 0 is never

    def reset(self, seeds: Sequence[int], out: Arrays, first_lengths: Sequence[int] = ()) -> None:
        """Start new episodes, one seed a slot, and write their first observations.

        Args:
            seeds: one for each slot.
            out: written.
            first_lengths: env steps after which these first episodes are truncated, if they last so long.
        """
        self._left[:] = first_lengths or 0
        self._reader.read_each([env.reset(seed=seed)[0] for env, seed in zip(self._envs, seeds, strict=True)], out)

    def step(self, actions: list[NDArray[Any]], out: StepRows) -> Arrays | None:
        """Write the outcome; what those saw last that ended, or None."""
        out.valid.fill(True)
        steps = [env.step(action) for env, action in zip(self._envs, self._each(actions), strict=True)]
        seen, rewards, terminated, truncated, _ = map(list, zip(*steps, strict=True))
        out.reward[:] = [one if isinstance(one, float) else self._number(one) for one in rewards]
        out.terminated[:] = list(map(bool, terminated))
        out.truncated[:] = list(map(bool, truncated))
        if self._left.any():
            first = self._left > 0
            self._left -= first
            np.logical_or(out.truncated, first & (self._left == 0), out=out.truncated)
            self._left[out.terminated | out.truncated] = 0
        slots = np.flatnonzero(out.terminated | out.truncated).tolist()
        last = [copy.deepcopy(seen[slot]) for slot in slots]  # a reset may write into the same arrays
        for slot in slots:
            seen[slot], _ = self._envs[slot].reset()
        self._reader.read_each(seen, out.observation)
        return self._reader.read_each(last) if last else None

    def close(self) -> None:
        """Close what is behind it."""
        close_all(self._envs)

    def _each(self, actions: list[NDArray[Any]]) -> list[Any]:
        """What each environment is given: a number for a Discrete, an array, also for shape (), for all else."""
        columns = [
            list(part) if is_number or part.ndim > 1 else [part[slot, ...] for slot in range(len(part))]
            for part, is_number in zip(actions, self._is_number, strict=True)
        ]
        if not self._has_parts:
            return columns[0]
        return [rebuild(self.action_space, iter(values)) for values in zip(*columns, strict=True)]

    def _number(self, reward: Any) -> float:
        try:
            return float(np.asarray(reward).item())
        except (TypeError, ValueError):
            raise ContractError(f"environment {self._env!r}: expected a number as reward, got {reward!r}") from None


class GymBatch:
    """An environment's own batched implementation, in any of Gymnasium's ways of resetting."""

    def __init__(self, env: str, vector: Vector) -> None:
        self._env = env
        self._vector = vector
        self.action_space = vector.single_action_space
        self._reader = GymReader(env, vector.single_observation_space)
        self._mode = _autoreset_mode(vector)
        self._resetting = np.zeros(vector.num_envs, bool)  # slots whose next env step is spent on their reset

    def reset(self, seeds: Sequence[int], out: Arrays) -> None:
        """Start new episodes, one seed a slot, and write their first observations."""
        self._resetting[:] = False
        self._reader.read(self._vector.reset(seed=seeds[0])[0], out)

    def step(self, actions: list[NDArray[Any]], out: StepRows) -> Arrays | None:
        """Write the outcome; what those saw last that ended, or None."""
        seen, reward, terminated, truncated, info = self._vector.step(rebuild(self.action_space, iter(actions)))
        np.logical_not(self._resetting, out=out.valid)
        for given, row in ((reward, out.reward), (terminated, out.terminated), (truncated, out.truncated)):
            row[:] = np.where(out.valid, np.reshape(given, len(row)), 0)
        self._reader.read(seen, out.observation)
        ended = out.terminated | out.truncated
        if self._mode is None and ended.any():
            self._mode = AutoresetMode.SAME_STEP if "final_obs" in info else AutoresetMode.NEXT_STEP
            log.warning("%r does not say how it resets; going by what it gives, %s", self._env, self._mode)
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resetting = ended
        if not ended.any():
            return None
        slots = np.flatnonzero(ended)
        if self._mode is AutoresetMode.SAME_STEP:
            return self._final_from_info(info, slots)
        final = {name: array[slots] for name, array in out.observation.items()}
        if self._mode is AutoresetMode.DISABLED:
            self._reader.read(self._vector.reset(options={"reset_mask": ended})[0], out.observation)
        return final

    def close(self) -> None:
        """Close what is behind it."""
        self._vector.close()

    def _final_from_info(self, info: dict[str, Any], slots: NDArray[np.intp]) -> Arrays:
        """The last observations of these slots from ``final_obs``, one object for each slot or a batch."""
        if "final_obs" not in info:
            raise ContractError(f"environment {self._env!r} resets in the same step, but gives no 'final_obs'")
        given, space = info["final_obs"], self._vector.single_observation_space
        if has_parts(space) and isinstance(given, Mapping | tuple):
            parts = list(leaf_values(space, given))
            return self._reader.read_each([rebuild(space, (part[slot] for part in parts)) for slot in slots])
        return self._reader.read_each([given[slot] for slot in slots])


def _autoreset_mode(vector: Vector) -> AutoresetMode | None:
    """How it resets, as it says itself; None where it does not say."""
    said = vector.metadata.get("autoreset_mode")
    return next((mode for mode in AutoresetMode if said in (mode, mode.name, mode.value)), None)


def make_gym(env: str, env_id: str, slots: int, settings: Mapping[str, Any], *, copies: int) -> Vector | list[Env]:
    """Its own batch of ``slots``, where it has one, else ``copies`` single environments."""
    try:
        found = _find_spec(env, env_id)
        # -1 takes the limit away, but from single environments only.
        unlimited = settings.get("max_episode_steps") == -1
        if found.vector_entry_point is not None and not found.additional_wrappers and not unlimited:
            vector = gymnasium.make_vec(found, slots, vectorization_mode="vector_entry_point", **settings)
            if vector.num_envs != slots:
                vector.close()
                raise UsageError(f"environment {env!r} comes in batches of {vector.num_envs}; set env.slots to that")
            return vector
        with ExitStack() as stack:
            made = []
            for number in range(copies):  # Gymnasium's checker looks at the first only: it takes its time in every step
                checked = {"disable_env_checker": True, **settings} if number else settings
                made.append(stack.enter_context(closing(gymnasium.make(found, **checked))))
            stack.pop_all()
            return made
    except (gymnasium.error.Error, ImportError) as error:
        raise UsageError(f"environment {env!r}: {error}") from None
    except UsageError:
        raise
    except Exception as error:
        if not settings and not isinstance(error, TypeError):
            raise
        given = ", ".join(f"env.{key}={value!r}" for key, value in settings.items()) or "no keyword arguments"
        raise UsageError(f"environment {env!r} does not take {given}: {type(error).__name__}: {error}") from error


def close_all(made: Vector | list[Env]) -> None:
    """Close a batch, or every copy."""
    for one in made if isinstance(made, list) else [made]:
        one.close()


def _find_spec(env: str, env_id: str) -> gymnasium.envs.registration.EnvSpec:
    """The registered spec, after the import that ``module:ID`` asks for."""
    module, colon, name = env_id.rpartition(":")
    if colon:
        importlib.import_module(module)
    if versions := [known for known in gymnasium.registry if known.rpartition("-v")[0] == name]:
        raise UsageError(f"environment {env!r}: say which version, {' or '.join(versions)}")
    return gymnasium.spec(name)
