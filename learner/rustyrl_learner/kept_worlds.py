"""Worlds in a checkpoint: one safetensors file, each array named by its world and its name there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from rustyrl.wire import decode_world_state, encode_world_state
from rustyrl_learner.gathering import KeptWorld

__all__ = ["pack_worlds", "unpack_worlds"]


def pack_worlds(worlds: Mapping[int, KeptWorld]) -> bytes:
    """The file's content; raises `WireError` if a state is not what its message says."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for world, (state, blob) in worlds.items():
        found = decode_world_state(state, memoryview(blob))
        arrays |= {f"{world}/{name}": array for name, array in found.items()}
    return save_arrays(arrays)


def unpack_worlds(content: bytes, batch: int, built: Mapping[int, int]) -> dict[int, KeptWorld]:
    """Messages by world.

    Args:
        content: what `pack_worlds` gave.
        batch: that the worlds stand before.
        built: the batch that the episodes of each world began with.
    """
    by_world: dict[int, dict[str, NDArray[np.generic]]] = {world: {} for world in built}
    for name, array in load_arrays(content).items():
        world, _, of_it = name.partition("/")
        by_world[int(world)][of_it] = array
    return {world: encode_world_state(world, batch, built[world], arrays) for world, arrays in by_world.items()}
