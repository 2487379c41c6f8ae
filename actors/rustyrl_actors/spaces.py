"""From Gymnasium's spaces to the flat named arrays that cross the wire."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rustyrl.errors import UsageError
from rustyrl.spec import UNBOUNDED, ActionSpec, ArraySpec

__all__ = [
    "SINGLE_ARRAY",
    "action_parts",
    "has_parts",
    "in_form",
    "leaf_values",
    "leaves",
    "named_once",
    "observation_arrays",
    "rebuild",
]

MAX_NAME = 46  # "final_observation." and it are a name on the wire, of 64 characters at most
MAX_PARTS = 64
SINGLE_ARRAY = "main"  # the name of an observation or action that is one array
Space = gymnasium.Space[Any]


def has_parts(space: Space) -> bool:
    """Whether it is a Dict or Tuple, whose parts are named arrays, rather than one array."""
    return isinstance(space, spaces.Dict | spaces.Tuple)


def leaves(space: Space, name: str = "") -> Iterator[tuple[str, Space]]:
    """The parts of a space that are not Dicts or Tuples, by name: nested keys are joined by dots.

    A space without parts has one leaf, named ``main``; the i-th item of a Tuple is ``item_i``.
    """
    if isinstance(space, spaces.Dict):
        parts = [(str(key), part) for key, part in _by_key(space)]
    elif isinstance(space, spaces.Tuple):
        parts = [(f"item_{index}", part) for index, part in enumerate(space.spaces)]
    else:
        yield name or SINGLE_ARRAY, space
        return
    for key, part in parts:
        key = re.sub(r"[^A-Za-z0-9_-]", "_", key)
        key = key if re.match(r"[A-Za-z_]", key) else f"_{key}"
        yield from leaves(part, f"{name}.{key}" if name else key)


def leaf_values(space: Space, value: Any) -> Iterator[Any]:
    """The values of the leaves of a space, batched or not, in the order of `leaves`."""
    if isinstance(space, spaces.Dict):
        for key, part in _by_key(space):
            yield from leaf_values(part, value[key])
    elif isinstance(space, spaces.Tuple):
        for part, item in zip(space.spaces, value, strict=True):
            yield from leaf_values(part, item)
    else:
        yield value


def rebuild(space: Space, values: Iterator[Any]) -> Any:
    """The other way round: a value of the space from those of its leaves."""
    if isinstance(space, spaces.Dict):
        return {key: rebuild(part, values) for key, part in _by_key(space)}
    if isinstance(space, spaces.Tuple):
        return tuple(rebuild(part, values) for part in space.spaces)
    return next(values)


def _by_key(space: spaces.Dict) -> list[tuple[Any, Space]]:
    """The parts of a Dict in the order in which everything here goes through them."""
    return sorted(space.spaces.items(), key=lambda item: str(item[0]))


def in_form(arrays: Mapping[str, Any], *, single: bool) -> Any:
    """Named arrays in the form of their space: the array itself where there is a single one, else a dict of its own."""
    return next(iter(arrays.values())) if single else dict(arrays)


def observation_arrays(env: str, space: Space) -> tuple[ArraySpec, ...]:
    """The arrays of an observation that a world writes itself.

    Raises:
        UsageError: a part is of a kind that a world cannot write as it stands, with what to declare instead.
    """
    return tuple(_observation_array(env, name, leaf) for name, leaf in named_once(env, "observation", space))


def action_parts(env: str, space: Space, *, masked: bool = False, translated: bool = False) -> tuple[ActionSpec, ...]:
    """The parts of an action: Discrete, MultiDiscrete, MultiBinary, Box, and Dicts and Tuples of them.

    Args:
        env: for messages.
        space: of one slot.
        masked: whether its choices come with masks.
        translated: whether actions are translated for the environment, so that choices may start anywhere and boxes
            may be of integers.

    Raises:
        UsageError: a part is of another kind.
    """
    named = named_once(env, "action", space)
    for name, leaf in named if not translated else []:
        if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete) and np.any(leaf.start):
            raise UsageError(f"environment {env!r}: action {name!r} is {leaf}; expected choices that start at 0")
    parts = tuple(_action_part(env, name, leaf, masked, translated) for name, leaf in named)
    if masked and not any(part.masked for part in parts):
        raise UsageError(f"environment {env!r} declares an action mask, but its action space {space} has no choices")
    return parts


def named_once(env: str, what: str, space: Space) -> list[tuple[str, Space]]:
    """The leaves of a space; raises `UsageError` if two have one name, or a name is too long for the wire."""
    found = list(leaves(space))
    names = [name for name, _ in found]
    if not found or len(set(names)) < len(names):
        raise UsageError(f"environment {env!r}: the parts of its {what} space need names of their own, got {names}")
    if long := [name for name in names if len(name) > MAX_NAME]:
        raise UsageError(f"environment {env!r}: the {what} {long[0]!r} has a name of more than {MAX_NAME} characters")
    if len(found) > MAX_PARTS:
        raise UsageError(f"environment {env!r}: its {what} has {len(found)} parts, at most {MAX_PARTS} cross the wire")
    for name, leaf in found:
        if leaf.shape is not None and 0 in leaf.shape:
            raise UsageError(f"environment {env!r}: the {what} {name!r} is {leaf}, which holds nothing")
    return found


def _observation_array(env: str, name: str, space: Space) -> ArraySpec:
    if isinstance(space, spaces.Box) and space.dtype in (np.float32, np.uint8):
        return ArraySpec(name, tuple(map(int, space.shape)), str(space.dtype))  # type: ignore[arg-type]
    if isinstance(space, spaces.MultiBinary):
        return ArraySpec(name, tuple(map(int, space.shape)), "bool")
    advice = "a float32 or uint8 Box, a MultiBinary, or a Dict or Tuple of them"
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        advice += "; a choice among n is observed one-hot, as a MultiBinary of n"
    elif isinstance(space, spaces.Box):
        advice += f"; this Box is {space.dtype}, give it dtype=np.float32"
    raise UsageError(f"environment {env!r}: observation {name!r} is {space}; expected {advice}")


def _action_part(env: str, name: str, space: Space, masked: bool, translated: bool) -> ActionSpec:
    if isinstance(space, spaces.Discrete):
        return ActionSpec("discrete", name, counts=(int(space.n),), masked=masked)
    if isinstance(space, spaces.MultiDiscrete):
        counts = tuple(int(count) for count in space.nvec.ravel())
        return ActionSpec("discrete", name, tuple(map(int, space.shape)), counts=counts, masked=masked)
    if isinstance(space, spaces.MultiBinary):
        shape = tuple(map(int, space.shape))
        return ActionSpec("discrete", name, shape, counts=(2,) * int(np.prod(shape)), masked=masked)
    if isinstance(space, spaces.Box) and (translated or np.issubdtype(space.dtype, np.floating)):
        low, high = (
            tuple(np.clip(b.ravel().astype(np.float64), -UNBOUNDED, UNBOUNDED).tolist())
            for b in (space.low, space.high)
        )
        return ActionSpec("box", name, tuple(map(int, space.shape)), low=low, high=high)
    raise UsageError(
        f"environment {env!r}: action {name!r} is {space}; expected Discrete, MultiDiscrete, MultiBinary, "
        "a Box of floats, or a Dict or Tuple of them"
    )
