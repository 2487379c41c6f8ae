"""Errors of a user's world in the user's terms: which field, what was expected, what came, where and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl.rollout import Rollout, first_final_not_finite, first_not_finite
from rustyrl.spec import ActionSpec

__all__ = ["Place", "check_finite", "check_masks", "describe_value", "fields_text"]


@dataclass(slots=True)
class Place:
    """Where an environment stands, for its errors.

    step, tick: env steps, and ticks of the game, since it was reset with ``seed``
    """

    env: str
    seed: tuple[int, ...] = ()
    step: int = 0
    tick: int = 0

    def save(self) -> dict[str, NDArray[np.generic]]:
        """As named arrays."""
        return {
            "own.seed": np.array(self.seed, np.int64),
            "own.place": np.array([self.step, self.tick], np.int64),
        }

    @classmethod
    def of(cls, env: str, state: dict[str, NDArray[np.generic]]) -> Place:
        """The place that `save` gave."""
        try:
            step, tick = (int(number) for number in state["own.place"])
            return cls(env, tuple(int(number) for number in state["own.seed"]), step, tick)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state holds no place: {error}") from None

    def text(self, slot: int | None = None) -> str:
        """Slot, tick and seed in words."""
        where = "" if slot is None else f"slot {slot}, "
        return f"world {self.env!r}, {where}tick {self.tick} (env step {self.step}) after reset with seed {self.seed}"

    def error(self, field: str, expected: str, came: str, slot: int | None = None) -> ContractError:
        """A field of the `Agent` component that is not what it should be."""
        return ContractError(f"{self.text(slot)}: component Agent, field {field}: expected {expected}, got {came}")


def describe_value(value: Any) -> str:
    """A value in a few words: dtype and shape of an array, type and content of anything else."""
    if isinstance(value, np.ndarray):
        array: NDArray[Any] = value
        return f"{array.dtype} {array.shape}"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"


def fields_text(observation: Mapping[str, NDArray[Any]], action_mask: Mapping[str, NDArray[Any]]) -> str:
    """What the fields of the `Agent` component are there to take, in words."""
    fields = {"observation": observation, "action_mask": action_mask}
    return "component Agent: " + ", ".join(
        f"field {field}{f'[{name!r}]' if len(arrays) > 1 else ''} is {describe_value(array)}"
        for field, arrays in fields.items()
        for name, array in arrays.items()
    )


def check_masks(place: Place, action: tuple[ActionSpec, ...], masks: dict[str, NDArray[np.bool_]]) -> None:
    """Refuse masks `[E, choices]` that allow no choice at all for one of the numbers of an action."""
    for part in action:
        if not part.masked:
            continue
        allowed = np.logical_or.reduceat(masks[part.name], part.first, axis=1)
        if not allowed.all():
            slot, number = (int(i) for i in np.argwhere(~allowed)[0])
            which = f" for its number {number}" if len(part.counts) > 1 else ""
            expected = f"at least one choice that is allowed{which}"
            raise place.error(f"action_mask[{part.name!r}]", expected, "none", slot)


def check_finite(rollout: Rollout, places: list[Place], worlds: list[int], batch: int) -> None:
    """Refuse numbers that nothing can be learned from, once a rollout is complete.

    Args:
        rollout: its slots stand world by world, in equal numbers.
        places: of the worlds, as they stand after the rollout's last step.
        worlds: their indices.
        batch: what the rollout is for.

    Raises:
        ContractError: naming world, slot, step, seed and field.
    """
    numbers: dict[str, NDArray[Any]] = {f"observation {name!r}": a for name, a in rollout.observation.items()}
    numbers["reward"] = rollout.reward
    found = first_not_finite(rollout, numbers) or first_final_not_finite(rollout)
    if found is None:
        return
    t, slot, what = found
    slots = rollout.slots // len(places)
    place = places[slot // slots]
    step = place.step - rollout.unroll_length + 1 + t
    raise ContractError(
        f"world {worlds[slot // slots]} of {place.env!r}, slot {slot % slots}, step {t} of batch {batch}: {what}; "
        f"a world must give finite numbers (env step {step} after reset with seed {place.seed})"
    )
