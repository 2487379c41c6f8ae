"""Action noise from a counter-based generator, keyed so that neither timing nor ownership can change it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rustyrl.spec import EnvironmentSpec

__all__ = ["allocate_noise", "fill_noise", "noise_generator"]

ACTION_STREAM = 1  # keeps action noise apart from the streams that worlds draw from


def noise_generator(seed: int, world: int, batch: int) -> np.random.Generator:
    """The generator of one world's action noise in one batch.

    Philox (Salmon et al., 'Parallel Random Numbers: As Easy as 1, 2, 3', 2011): key and counter alone fix the
    stream, so an actor that takes a world over draws what its former owner would have drawn.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, (world << 8) | ACTION_STREAM], np.uint64)
    counter = np.array([0, 0, batch, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def allocate_noise(spec: EnvironmentSpec, unroll_length: int, slots: int) -> NDArray[np.float32]:
    """Room for the noise of a rollout: `[T, W, A]`, one number for each number of an action."""
    return np.empty((unroll_length, slots, spec.action_width), np.float32)


def fill_noise(
    noise: NDArray[np.float32], spec: EnvironmentSpec, columns: slice, generator: np.random.Generator
) -> None:
    """Fill one world's columns, part by part: standard normal for a box, uniform in [0, 1) for choices."""
    start = 0
    for part in spec.action:
        shape = (noise.shape[0], columns.stop - columns.start, part.width)
        draw = generator.standard_normal if part.kind == "box" else generator.random
        noise[:, columns, start : start + part.width] = draw(shape, np.float32)
        start += part.width
