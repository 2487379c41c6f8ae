"""An ordinary esper game, one entity to an object, behind the environment contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.context import Context
from rustyrl_actors.contract import Place, check_masks, describe_value, fields_text
from rustyrl_actors.draws import slot_generator
from rustyrl_actors.environment import Arrays, Masks, StepRows, TimeStep
from rustyrl_actors.spaces import has_parts
from rustyrl_actors.world import ObjectWorld

__all__ = ["ObjectEnvironment"]


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


class ObjectEnvironment:
    """Steps one game. Every entity with an `Agent` has a slot; who ended has none until a new `Agent` takes one.

    The game begins anew, in an empty esper world, within the step in which its last agent ends; at the step limit
    all end together. With ``stagger`` the first game starts with a random part of the step limit already used.
    """

    def __init__(self, world: ObjectWorld, spec: EnvironmentSpec, *, stagger: bool = False) -> None:
        self.spec = spec
        self.place = Place(spec.env)
        self._world = world
        self._tick = getattr(world, "tick", esper.process)
        self._countdown = range(world.info.ticks_per_step - 1, -1, -1)
        self._stagger = stagger
        self._context = Context(global_random=getattr(world, "global_random", False))
        self._one_observation = not has_parts(world.info.observation_space)
        self._one_action = not has_parts(world.info.action_space)
        self._masked = any(part.masked for part in spec.action)
        self._is_number = {part.name: part.kind == "discrete" and not part.shape for part in spec.action}
        self._generator = slot_generator((0,), 0)
        self._elapsed = 0
        self._seats: list[Seat | None] = [None] * spec.slots
        self._known: dict[int, Agent] = {}  # by id, everyone who has or had a seat in this game
        self._listed: list[tuple[int, Agent]] | None = None  # who was there when seats were given last

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        """Begin a new game, write its first observations, and seed what follows."""
        self.place = Place(self.spec.env, seed)
        self._generator = slot_generator(seed, 0)
        aside = slot_generator(seed, self.spec.slots)  # a stream that no game draws from
        self._context.seed(aside)
        self._begin(out)
        if self._stagger:
            self._elapsed = int(aside.integers(0, self.spec.max_episode_steps))

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        """Step the game once, write the outcome into ``out``, begin anew if it ended."""
        self._context.enter()
        self.place.step += 1
        self._elapsed += 1
        try:
            return self._step(action, out)
        except Exception as error:
            self._note(error)
            raise

    def close(self) -> None:
        """Delete the esper world."""
        self._context.close()

    def _step(self, action: Arrays, out: StepRows) -> TimeStep:
        self._hand_out(action, out)
        for left in self._countdown:
            self.place.tick += 1
            self._tick()
            if left and self._ended_early(out):
                break
        ended = self._take_in(out)
        if not ended:
            self._observe(out)
            return TimeStep()
        return self._end_episodes(ended, out)

    def _note(self, error: Exception) -> None:
        """Say where the game stood when its own code raised, and what may be behind it."""
        if isinstance(error, ContractError):
            return  # it says so itself
        error.add_note(f"raised in {self.place.text()}")
        for slot, seat in enumerate(self._seats):
            if seat is not None and not (seat.agent.terminated or seat.agent.truncated) and not _is_there(seat):
                error.add_note(
                    f"entity {seat.entity}, the agent in slot {slot}, was deleted while its episode went on; set "
                    "agent.terminated or agent.truncated before that"
                )

    def _hand_out(self, action: Arrays, out: StepRows) -> None:
        """Give every agent its action, and clean fields and rows to answer in."""
        for slot, seat in enumerate(self._seats):
            out.valid[slot] = seat is not None
            if seat is None:
                out.reward[slot] = 0.0
                out.terminated[slot] = out.truncated[slot] = False
                continue
            agent = seat.agent
            if self._one_action:
                for name, array in action.items():  # a copy, which the game may keep: the arrays are used again
                    agent.action = int(array[slot]) if self._is_number[name] else array[slot].copy()
            else:
                agent.action = {
                    name: int(array[slot]) if self._is_number[name] else array[slot].copy()
                    for name, array in action.items()
                }
            agent.reward = 0.0
            agent.terminated = agent.truncated = False
            self._point(seat, slot, out)

    def _ended_early(self, out: StepRows) -> bool:
        """Between two ticks of a step: whether nobody plays on. Who was just cut is looked at while it is there."""
        playing = [seat for seat in self._seats if seat is not None]
        cut = [seat for seat in playing if seat.agent.truncated and not seat.agent.terminated and seat.last is None]
        if cut:
            self._observe(out, newcomers=False)
            for seat in cut:
                seat.last = {name: array.copy() for name, array in seat.seen.items()}
        return all(seat.agent.terminated or seat.agent.truncated for seat in playing)

    def _take_in(self, out: StepRows) -> list[int]:
        """Read rewards and flags; the slots whose episode ended in this step."""
        cut = self._elapsed >= self.spec.max_episode_steps
        unchanged = esper.get_component(Agent) is self._listed  # then nobody lost an Agent; entities may be dying
        ended: list[int] = []
        for slot, seat in enumerate(self._seats):
            if seat is None:
                continue
            agent = seat.agent
            terminated, truncated = agent.terminated, agent.truncated
            if terminated is not False or truncated is not False:
                terminated, truncated = self._flag("terminated", agent, slot), self._flag("truncated", agent, slot)
            there = (unchanged and esper.entity_exists(seat.entity)) or _is_there(seat)
            if not there and not terminated and seat.last is None:
                self._check_leaver(seat, truncated, slot)
            try:
                reward = float(agent.reward)
            except (TypeError, ValueError):
                raise self.place.error("reward", "a number", describe_value(agent.reward), slot) from None
            truncated = (truncated or cut) and not terminated  # if both, terminated wins
            out.reward[slot], out.terminated[slot], out.truncated[slot] = reward, terminated, truncated
            seat.length += 1
            seat.episode_return += reward
            if terminated or truncated:
                agent.truncated = truncated
                ended.append(slot)
        return ended

    def _end_episodes(self, ended: list[int], out: StepRows) -> TimeStep:
        """Take the last observations, free the slots, and begin anew if nobody is left."""
        leavers: list[Seat] = []
        for slot in ended:
            seat = self._seats[slot]
            assert seat is not None  # noqa: S101 - _take_in found it there
            # What it sees last it writes aside: another agent may take its slot, and with it its row, at once.
            seat.seen = {name: array.copy() for name, array in seat.seen.items()}
            seat.masks = {name: array.copy() for name, array in seat.masks.items()}
            self._show(seat)
            self._seats[slot] = None
            leavers.append(seat)
        self._observe(out)
        for slot, seat in zip(ended, leavers, strict=True):
            self._accept(seat, slot)
            seat.seen = seat.last or seat.seen
        episodes = EpisodeRows(
            slot=np.array(ended, np.int32),
            episode_return=np.array([seat.episode_return for seat in leavers], np.float32),
            length=np.array([seat.length for seat in leavers], np.int32),
            metrics={name: self._metric(name, leavers, ended) for name in self.spec.episode_metrics},
        )
        if self._elapsed >= self.spec.max_episode_steps or all(seat is None for seat in self._seats):
            self._begin(out)
        return TimeStep(episodes, {name: np.stack([seat.seen[name] for seat in leavers]) for name in out.observation})

    def _begin(self, out: StepRows) -> None:
        """Begin a new game in an empty esper world."""
        self._context.empty()
        self._elapsed = 0
        self._known.clear()
        self._listed = None
        self._seats = [None] * self.spec.slots
        try:
            self._world.reset(self._generator)
        except Exception as error:
            error.add_note(f"raised in reset() of {self.place.text()}")
            raise
        self._seat_newcomers(out)
        if all(seat is None for seat in self._seats):
            raise ContractError(
                f"{self.place.text()}: reset() created no entity with an Agent component; give one to every entity "
                "that is to be controlled: esper.add_component(entity, Agent())"
            )
        self._observe(out)

    def _observe(self, out: StepRows, *, newcomers: bool = True) -> None:
        """Seat who is new, have everyone write what they see, and clear the rows of empty slots."""
        if newcomers:
            self._seat_newcomers(out)
        else:
            self._equip_newcomers(out)
        if None in self._seats:
            self._clear_empty(out)
        try:
            self._world.observe()
        except (ValueError, TypeError, IndexError) as error:
            error.add_note(f"raised in observe(); {fields_text(_like(out.observation), _like(out.action_mask))}")
            raise
        for slot, seat in enumerate(self._seats):
            if seat is not None and (seat.agent.observation is not seat.given or self._masked):
                self._accept(seat, slot)
        if self._masked:
            check_masks(self.place, self.spec.action, out.action_mask)

    def _seat_newcomers(self, out: StepRows) -> None:
        listed = esper.get_component(Agent)  # esper hands out the same list until something changes
        if listed is self._listed:
            return
        self._listed = listed
        for entity, agent in sorted(listed, key=_by_entity):
            if id(agent) not in self._known and esper.entity_exists(entity):
                self._known[id(agent)] = agent
                if agent.terminated or agent.truncated:  # it ended before its first observation: no episode, no seat
                    self._show(Seat(entity, agent, seen=_like(out.observation), masks=_like(out.action_mask)))
                else:
                    self._seat(entity, agent, out)

    def _equip_newcomers(self, out: StepRows) -> None:
        """Give who has no seat yet arrays to write into, in the middle of a step."""
        for entity, agent in esper.get_component(Agent):
            if id(agent) not in self._known:
                self._show(Seat(entity, agent, seen=_like(out.observation), masks=_like(out.action_mask)))

    def _clear_empty(self, out: StepRows) -> None:
        empty = [slot for slot, seat in enumerate(self._seats) if seat is None]
        for array in out.observation.values():
            array[empty] = 0
        for mask in out.action_mask.values():
            mask[empty] = True

    def _seat(self, entity: int, agent: Agent, out: StepRows) -> None:
        if None not in self._seats:
            raise ContractError(
                f"{self.place.text()}: entity {entity} is one agent more than the {self.spec.slots} slots of "
                f"this world; build it for more with --set env.slots={self.spec.slots + 1}"
            )
        slot = self._seats.index(None)
        seat = self._seats[slot] = Seat(entity, agent)
        self._point(seat, slot, out)

    def _point(self, seat: Seat, slot: int, out: StepRows) -> None:
        """Point an agent at the rows of its slot."""
        if self._one_observation:
            for name, array in out.observation.items():
                seat.given = seat.seen[name] = seat.agent.observation = array[slot, ...]
        else:
            seat.seen = {name: array[slot, ...] for name, array in out.observation.items()}
            seat.agent.observation = seat.seen.copy()
        if self._masked:
            seat.masks = {name: array[slot] for name, array in out.action_mask.items()}
            for mask in seat.masks.values():
                mask.fill(True)
            self._show_masks(seat)

    def _show(self, seat: Seat) -> None:
        """Give the agent the arrays of its seat in the form of its spaces."""
        seat.agent.observation = next(iter(seat.seen.values())) if self._one_observation else seat.seen.copy()
        if self._masked:
            self._show_masks(seat)

    def _show_masks(self, seat: Seat) -> None:
        seat.agent.action_mask = next(iter(seat.masks.values())) if self._one_action else seat.masks.copy()

    def _accept(self, seat: Seat, slot: int) -> None:
        """Copy in what was put in place of the arrays that were given, if it fits."""
        self._accept_field("observation", seat.agent.observation, seat.seen, self._one_observation, slot)
        if self._masked:
            self._accept_field("action_mask", seat.agent.action_mask, seat.masks, self._one_action, slot)

    def _accept_field(self, what: str, found: Any, given: Arrays | Masks, single: bool, slot: int) -> None:
        if single:
            for name, array in given.items():
                if found is array:
                    return
                found = {name: found}
        elif not isinstance(found, dict) or found.keys() != given.keys():
            names = sorted(found) if isinstance(found, dict) else describe_value(found)
            raise self.place.error(what, f"a dict of {sorted(given)}", str(names), slot)
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
                raise self.place.error(where, expected, describe_value(found[name]), slot) from None

    def _check_leaver(self, seat: Seat, truncated: bool, slot: int) -> None:
        """Refuse an agent that is gone and did not end, or that was cut and cannot be looked at any more."""
        if not truncated:
            raise ContractError(
                f"{self.place.text(slot)}: the entity was deleted, or lost its Agent, while its episode went on; set "
                "agent.terminated (it died) or agent.truncated (it was taken away) before that"
            )
        if all(seat.agent is not other for _, other in esper.get_component(Agent)):
            raise ContractError(
                f"{self.place.text(slot)}: the entity was truncated and removed at once, so what it saw last cannot be "
                "observed; keep it until the env step is over (esper.delete_entity without immediate=True, in its "
                "last tick)"
            )

    def _flag(self, name: str, agent: Agent, slot: int) -> bool:
        value = getattr(agent, name)
        if isinstance(value, bool | np.bool_):
            return bool(value)
        raise self.place.error(name, "True or False", describe_value(value), slot)

    def _metric(self, name: str, seats: list[Seat], slots: list[int]) -> NDArray[np.float32]:
        values = []
        for seat, slot in zip(seats, slots, strict=True):
            value = seat.agent.episode_metrics.get(name)
            try:
                values.append(float(value))  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise self.place.error(
                    f"episode_metrics[{name!r}]", "a number, as the world declares it", describe_value(value), slot
                ) from None
        return np.array(values, np.float32)


def _is_there(seat: Seat) -> bool:
    """Whether the entity lives and still has this very Agent."""
    return esper.entity_exists(seat.entity) and esper.try_component(seat.entity, Agent) is seat.agent


def _like(rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of one slot for who has none to write into."""
    return {name: np.zeros_like(array[0]) for name, array in rows.items()}


def _exactly(value: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The same whole numbers in another dtype; raises ValueError if one is not there."""
    if value.dtype.kind not in "biu" or not np.array_equal(converted := value.astype(dtype), value):
        raise ValueError(value.dtype)
    return converted


def _by_entity(item: tuple[int, Agent]) -> int:
    return item[0]
