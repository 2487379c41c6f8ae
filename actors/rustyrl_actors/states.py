"""The state of a world as named arrays, so that it can move to another process or into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl_actors.environment import Arrays

__all__ = ["can_save", "generators_of", "place_into", "save_generators", "save_world", "under"]

GENERATOR_WORDS = 13  # of a Philox generator: counter 4, key 2, buffer 4, position in it, and a spare half-word's two


def can_save(world: object) -> bool:
    """Whether a world's author wrote ``save_state`` and ``load_state``."""
    found = [name for name in ("save_state", "load_state") if callable(getattr(world, name, None))]
    if len(found) == 1:
        raise ContractError(f"a world with {found[0]}() needs both save_state() and load_state(), or neither")
    return bool(found)


def save_world(world: Any, env: str) -> Arrays:
    """Copies of what ``save_state`` gives, held against what it is to give."""
    state = world.save_state()
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ContractError(f"world {env!r}: save_state() returned {state!r}, expected a dict of named numpy arrays")
    copies: Arrays = {}
    for name, value in state.items():
        array = np.array(value)
        if array.dtype.kind not in "bifu":
            raise ContractError(
                f"world {env!r}: save_state()[{name!r}] has dtype {array.dtype}, expected numbers or truth values"
            )
        copies[f"world.{name}"] = array
    return copies


def under(state: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin with ``prefix`` and a dot, by the rest of their names."""
    return {name.removeprefix(f"{prefix}."): a for name, a in state.items() if name.startswith(f"{prefix}.")}


def place_into(target: NDArray[Any], state: Arrays, name: str) -> None:
    """Write one array of a state into the array that holds it; raises `ValueError` if it does not fit."""
    found = state.get(name)
    if found is None or found.shape != target.shape or found.dtype != target.dtype:
        came = "none" if found is None else f"{found.dtype} {found.shape}"
        raise ValueError(f"the state's {name!r}: expected {target.dtype} {target.shape}, got {came}")
    target[...] = found


def save_generators(generators: Sequence[np.random.Generator]) -> NDArray[np.uint64]:
    """`[n, 13]`: the state of Philox generators."""
    rows = np.zeros((len(generators), GENERATOR_WORDS), np.uint64)
    for row, generator in zip(rows, generators, strict=True):
        content: Any = generator.bit_generator.state
        row[:4], row[4:6] = content["state"]["counter"], content["state"]["key"]
        row[6:10] = content["buffer"]
        row[10:] = content["buffer_pos"], content["has_uint32"], content["uinteger"]
    return rows


def generators_of(rows: NDArray[Any]) -> list[np.random.Generator]:
    """The generators whose state `save_generators` gave; raises `ValueError` if it is no such state."""
    if rows.ndim != 2 or rows.shape[1] != GENERATOR_WORDS or rows.dtype != np.uint64 or (rows[:, 10] > 4).any():
        raise ValueError(f"expected the states of generators, uint64 (n, {GENERATOR_WORDS}), got {rows.shape}")
    generators = []
    for row in rows:
        bits = np.random.Philox(0)
        bits.state = {
            "bit_generator": "Philox",
            "state": {"counter": row[:4].copy(), "key": row[4:6].copy()},
            "buffer": row[6:10].copy(),
            "buffer_pos": int(row[10]),
            "has_uint32": int(row[11]),
            "uinteger": int(row[12]),
        }
        generators.append(np.random.Generator(bits))
    return generators
