"""Between Gymnasium's values and the named arrays of the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rustyrl.errors import ContractError, UsageError
from rustyrl.spec import ArraySpec
from rustyrl_actors.environment import Arrays
from rustyrl_actors.spaces import has_parts, leaf_values, named_once

__all__ = ["GymAction", "GymReader"]

ONE_HOT_LIMIT = 65536  # choices of a Discrete observation, which is sent one-hot

Space = gymnasium.Space[Any]


class GymReader:
    """From observations in the form of their space to named arrays."""

    def __init__(self, env: str, space: Space) -> None:
        self._env = env
        self._space = space
        self._parts = [_observed(env, name, leaf) for name, leaf in named_once(env, "observation", space)]
        self._is_one = not has_parts(space)
        self.arrays = tuple(part.array for part in self._parts)

    def read(self, seen: Any, out: Arrays) -> None:
        """Write a batch in the form of the batched space, name to `[n, ...]`."""
        self._write(lambda: leaf_values(self._space, seen), out)

    def read_each(self, seen: list[Any], out: Arrays | None = None) -> Arrays:
        """Write n observations, name to `[n, ...]`; into arrays of their own where there is no ``out``."""
        if out is None:
            out = {array.name: np.empty((len(seen), *array.shape), array.dtype) for array in self.arrays}
        if self._is_one:
            self._write(lambda: iter((seen,)), out)
        else:
            self._write(lambda: zip(*(leaf_values(self._space, one) for one in seen), strict=True), out)
        return out

    def _write(self, values: Callable[[], Iterator[Any]], out: Arrays) -> None:
        try:
            for part, value in zip(self._parts, values(), strict=True):
                part.write(np.asarray(value), out[part.array.name])
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ContractError(
                f"environment {self._env!r}: an observation is not what its space {self._space} says: "
                f"{type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True, slots=True)
class _Observed:
    """One array of an observation, and how Gymnasium's values become it."""

    array: ArraySpec
    write: Callable[[NDArray[Any], NDArray[Any]], None]


def _observed(env: str, name: str, space: Space) -> _Observed:
    shape = tuple(int(size) for size in space.shape or ())
    if isinstance(space, spaces.Box):
        return _Observed(ArraySpec(name, shape, "uint8" if space.dtype == np.uint8 else "float32"), _put)
    if isinstance(space, spaces.MultiBinary):
        return _Observed(ArraySpec(name, shape, "bool"), _put)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        counts = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec).astype(np.int64)
        width = int(counts.sum())
        if width <= ONE_HOT_LIMIT:
            start = np.ravel(space.start).astype(np.int64)
            first = np.cumsum(counts) - counts

            def one_hot(value: NDArray[Any], out: NDArray[Any]) -> None:
                choice = value.astype(np.int64).reshape(len(out), len(counts)) - start
                if ((choice < 0) | (choice >= counts)).any():
                    raise ValueError(f"{name} is {value}, outside {space}")
                out[...] = False
                np.put_along_axis(out, choice + first, True, axis=1)

            return _Observed(ArraySpec(name, (width,), "bool"), one_hot)
    raise UsageError(
        f"environment {env!r}: observation {name!r} is {space}; expected Box, Discrete or MultiDiscrete (of at most "
        f"{ONE_HOT_LIMIT} choices), MultiBinary, or a Dict or Tuple of them"
    )


def _put(value: NDArray[Any], out: NDArray[Any]) -> None:
    if value.shape != out.shape:
        if [size for size in value.shape if size != 1] != [size for size in out.shape if size != 1]:
            raise ValueError(f"expected shape {out.shape}, got {value.shape}")
        value = value.reshape(out.shape)
    np.copyto(out, value, casting="unsafe")


class GymAction:
    """One part of an action, and how it becomes what Gymnasium expects."""

    def __init__(self, name: str, space: Space) -> None:
        self.name = name
        self._dtype = space.dtype
        self._rounds = isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating)
        self._box = (space.low, space.high) if isinstance(space, spaces.Box) else None
        starts = space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0
        self._start = np.asarray(starts, self._dtype) if np.any(starts) else None

    def to_gym(self, value: NDArray[np.generic]) -> NDArray[Any]:
        """`[E, ...]` as the batched space has it."""
        if self._rounds:
            value = np.rint(value)
        value = value.astype(self._dtype)
        if self._box is not None:  # a float32 within the bounds may lie outside them as a float64
            return np.clip(value, *self._box, out=value)
        return value if self._start is None else value + self._start
