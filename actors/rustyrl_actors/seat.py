"""A seat in a game of object style: an agent, what it is given, and how what it answers is taken in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.contract import Place, describe_value
from rustyrl_actors.environment import Arrays, Masks, StepRows
from rustyrl_actors.spaces import has_parts, in_form
from rustyrl_actors.world import WorldInfo

__all__ = ["Form", "Seat", "arrays_like"]


@dataclass(slots=True, eq=False)
class Seat:
    """An agent in a slot, the arrays by name that it was given to write into, and its episode so far."""

    entity: int
    agent: Agent
    given: Any = None  # the observation as the agent has it, if that is one array
    seen: Arrays = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    last: Arrays | None = None  # what it saw when it was cut before the last tick of a step
    length: int = 0
    episode_return: float = 0.0


class Form:
    """The form that observations, actions and masks have for an agent: arrays, or dicts of them, as the spaces say."""

    def __init__(self, info: WorldInfo, spec: EnvironmentSpec) -> None:
        self.masked = any(part.masked for part in spec.action)
        self._one_observation = not has_parts(info.observation_space)
        self._one_action = not has_parts(info.action_space)
        self._is_number = {part.name: part.is_number for part in spec.action}
        lone = spec.action[0]
        self._lone_choice = lone.name if self._one_action and lone.is_number else None

    def hand_out(self, action: Arrays, seat: Seat, slot: int) -> None:
        """Give an agent its action: an int for a lone choice, a copy, which the game may keep, of anything else."""
        if self._lone_choice is not None:
            seat.agent.action = int(action[self._lone_choice][slot])
            return
        own: dict[str, Any] = {}
        for name, array in action.items():
            own[name] = int(array[slot]) if self._is_number[name] else array[slot].copy()
        seat.agent.action = in_form(own, single=self._one_action)

    def point(self, seat: Seat, slot: int, out: StepRows) -> None:
        """Point an agent at the rows of its slot."""
        if self._one_observation:
            for name, array in out.observation.items():
                seat.given = seat.seen[name] = seat.agent.observation = array[slot, ...]
        else:
            seat.seen = {name: array[slot, ...] for name, array in out.observation.items()}
            seat.agent.observation = seat.seen.copy()
        if self.masked:
            seat.masks = {name: array[slot] for name, array in out.action_mask.items()}
            for mask in seat.masks.values():
                mask.fill(True)
            self._show_masks(seat)

    def show(self, seat: Seat) -> None:
        """Give the agent the arrays of its seat in the form of its spaces."""
        seat.agent.observation = in_form(seat.seen, single=self._one_observation)
        if self.masked:
            self._show_masks(seat)

    def _show_masks(self, seat: Seat) -> None:
        seat.agent.action_mask = in_form(seat.masks, single=self._one_action)

    def accept(self, seat: Seat, slot: int, place: Place) -> None:
        """Copy in what was put in place of the arrays that were given, if it fits.

        Raises:
            ContractError: it does not, with field, expected and given shape and dtype, slot and place.
        """
        if seat.agent.observation is seat.given and not self.masked:
            return
        _accept("observation", seat.agent.observation, seat.seen, self._one_observation, slot, place)
        if self.masked:
            _accept("action_mask", seat.agent.action_mask, seat.masks, self._one_action, slot, place)


def arrays_like(rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of one slot for who has none to write into."""
    return {name: np.zeros_like(array[0]) for name, array in rows.items()}


def _accept(what: str, found: Any, given: Arrays | Masks, single: bool, slot: int, place: Place) -> None:
    if single:
        for name, array in given.items():
            if found is array:
                return
            found = {name: found}
    elif not isinstance(found, dict) or found.keys() != given.keys():
        names = sorted(found) if isinstance(found, dict) else describe_value(found)
        raise place.error(what, f"a dict of {sorted(given)}", str(names), slot)
    for name, array in given.items():
        if found[name] is array:
            continue
        try:
            value = np.asarray(found[name])
            if value.shape != array.shape:
                raise ValueError(value.shape)
            if not np.can_cast(value.dtype, array.dtype, "same_kind"):
                value = _exactly(value, array.dtype)
            np.copyto(array, value, casting="same_kind")
        except (TypeError, ValueError):
            where = what if single else f"{what}[{name!r}]"
            expected = f"numbers that fit {describe_value(array)}"
            raise place.error(where, expected, describe_value(found[name]), slot) from None


def _exactly(value: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The same whole numbers in another dtype; raises ValueError if one is not there."""
    if value.dtype.kind not in "biu" or not np.array_equal(converted := value.astype(dtype), value):
        raise ValueError(value.dtype)
    return converted
