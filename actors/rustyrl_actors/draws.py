"""Random numbers for the slots of a world: each slot has a generator of its own, drawn from together.

So what a slot draws depends on its seed and its own episodes alone, never on when its neighbours ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["SlotDraws", "slot_generator"]

Floats = NDArray[np.float64]
Size = int | tuple[int, ...]


def slot_generator(seed: tuple[int, ...], slot: int) -> np.random.Generator:
    """The generator of one slot of an environment that was reset with ``seed``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((*seed, slot))))


class SlotDraws:
    """Draws for n slots: every method returns `[n, *size]`, row i from the generator of slot i.

    The methods are those of `numpy.random.Generator`; for what is missing here, ``generators`` holds the n generators.
    """

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        self.generators = generators

    def __len__(self) -> int:
        return len(self.generators)

    def random(self, size: Size = ()) -> Floats:
        """Uniform in [0, 1)."""
        return np.stack([generator.random(size) for generator in self.generators])

    def uniform(self, low: ArrayLike = 0.0, high: ArrayLike = 1.0, size: Size | None = None) -> Floats:
        """Uniform in [low, high); without ``size`` that is the shape of the bounds."""
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        drawn: Floats = low + (high - low) * self.random(_size(size, low, high))
        return drawn

    def normal(self, loc: ArrayLike = 0.0, scale: ArrayLike = 1.0, size: Size | None = None) -> Floats:
        """Normal with this mean and deviation; without ``size`` that is their shape."""
        loc, scale = np.asarray(loc, np.float64), np.asarray(scale, np.float64)
        shape = _size(size, loc, scale)
        drawn: Floats = loc + scale * np.stack([generator.standard_normal(shape) for generator in self.generators])
        return drawn

    def integers(self, low: int, high: int | None = None, size: Size = ()) -> NDArray[np.int64]:
        """Integers in [low, high), or in [0, low) without ``high``."""
        return np.stack([np.asarray(generator.integers(low, high, size)) for generator in self.generators])


def _size(size: Size | None, *bounds: Floats) -> tuple[int, ...]:
    """The shape of a draw for one slot, which the bounds have to fit."""
    shape = np.broadcast_shapes(*(bound.shape for bound in bounds))
    if size is None:
        return shape
    wanted = (size,) if isinstance(size, int) else tuple(size)
    if len(shape) > len(wanted) or any(a not in (1, b) for a, b in zip(shape[::-1], wanted[::-1], strict=False)):
        raise ValueError(f"bounds of shape {shape} do not fit draws of size {wanted} for a slot")
    return wanted
