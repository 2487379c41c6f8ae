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

    def uniform(self, low: ArrayLike = 0.0, high: ArrayLike = 1.0, size: Size = ()) -> Floats:
        """Uniform in [low, high); the bounds broadcast against ``size``."""
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        drawn: Floats = low + (high - low) * self.random(size)
        return drawn

    def normal(self, loc: ArrayLike = 0.0, scale: ArrayLike = 1.0, size: Size = ()) -> Floats:
        """Normal with this mean and deviation, which broadcast against ``size``."""
        drawn = np.stack([generator.standard_normal(size) for generator in self.generators])
        return np.asarray(loc, np.float64) + np.asarray(scale, np.float64) * drawn

    def integers(self, low: int, high: int | None = None, size: Size = ()) -> NDArray[np.int64]:
        """Integers in [low, high), or in [0, low) without ``high``."""
        return np.stack([np.asarray(generator.integers(low, high, size)) for generator in self.generators])
