"""An ordinary esper game, one entity to an object, behind the environment contract."""

from __future__ import annotations

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
from rustyrl_actors.environment import Arrays, StepRows, TimeStep, allocate_rows
from rustyrl_actors.seat import Form, Seat, arrays_like
from rustyrl_actors.states import can_save, generators_of, save_generators, save_world, under
from rustyrl_actors.world import ObjectWorld

__all__ = ["ObjectEnvironment"]


class ObjectEnvironment:
    """Steps one game. Every entity with an `Agent` has a slot; who ended has none until a new `Agent` takes one.

    The game begins anew, in an empty esper world, within the step in which its last agent ends; at the step limit
    all end together. With ``stagger`` the first game starts with a random part of the step limit already used.
    """

    def __init__(self, world: ObjectWorld, spec: EnvironmentSpec, *, stagger: bool = False) -> None:
        self.spec = spec
        self.place = Place(spec.env)
        self._world = world
        self._saves = can_save(world)
        self._tick = getattr(world, "tick", esper.process)
        self._countdown = range(world.info.ticks_per_step - 1, -1, -1)
        self._stagger = stagger
        self._context = Context(global_random=getattr(world, "global_random", False))
        self._form = Form(world.info, spec)
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

    def save(self) -> Arrays | None:
        """The game's state, its generators, who sits where, and the running episodes; None without ``save_state``."""
        if not self._saves:
            return None
        self._context.enter()
        seats = [seat for seat in self._seats if seat is not None]
        order = sorted(range(len(seats)), key=lambda position: seats[position].entity)
        slots = np.flatnonzero([seat is not None for seat in self._seats])
        return {
            **save_world(self._world, self.spec.env),
            **self._context.save(),
            "own.generator": save_generators([self._generator]),
            "own.elapsed": np.array([self._elapsed], np.int64),
            "own.slot": slots[order].astype(np.int64),  # of those who play, by their entities
            "own.length": np.array([seats[position].length for position in order], np.int64),
            "own.return": np.array([seats[position].episode_return for position in order], np.float64),
            **self.place.save(),
        }

    def load(self, state: Arrays) -> None:
        """Go on from such a state in an empty esper world; agents sit down by the order of their entities."""
        self._context.empty()
        self._known.clear()
        self._listed = None
        self._seats = [None] * self.spec.slots
        self.place = Place.of(self.spec.env, state)
        try:
            self._context.load(state)
            (self._generator,) = generators_of(state["own.generator"])
            (elapsed,), slots = state["own.elapsed"], state["own.slot"]
            lengths, returns = state["own.length"], state["own.return"]
        except KeyError as error:
            raise ValueError(f"the state lacks {error}") from None
        self._elapsed = int(elapsed)
        self._world.load_state(under(state, "world"))  # type: ignore[attr-defined]
        listed = sorted(esper.get_component(Agent), key=_by_entity)
        self._known = {id(agent): agent for _, agent in listed}
        playing = [(entity, agent) for entity, agent in listed if not (agent.terminated or agent.truncated)]
        if len(playing) != len(slots):
            raise ValueError(f"load_state() made {len(playing)} agents whose episodes go on, expected {len(slots)}")
        for (entity, agent), slot, length, total in zip(playing, slots, lengths, returns, strict=True):
            self._seats[int(slot)] = Seat(entity, agent, length=int(length), episode_return=float(total))
        rows = allocate_rows(self.spec)
        action: Arrays = {a.name: np.zeros((1, *a.shape), a.array.dtype) for a in self.spec.action}
        for entity, agent in listed:
            if agent.terminated or agent.truncated:  # what it does and sees is of no account, but must be there
                seen = {name: array[0] for name, array in rows.observation.items()}
                masks = {name: mask[0] for name, mask in rows.action_mask.items()}
                seat = Seat(entity, agent, seen=seen, masks=masks)
                self._form.show(seat)
                self._form.hand_out(action, seat, 0)

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
            self._form.hand_out(action, seat, slot)
            agent.reward = 0.0
            agent.terminated = agent.truncated = False
            self._form.point(seat, slot, out)

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
            self._form.show(seat)
            self._seats[slot] = None
            leavers.append(seat)
        self._observe(out)
        for slot, seat in zip(ended, leavers, strict=True):
            self._form.accept(seat, slot, self.place)
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
            error.add_note(
                f"raised in observe(); {fields_text(arrays_like(out.observation), arrays_like(out.action_mask))}"
            )
            raise
        for slot, seat in enumerate(self._seats):
            if seat is not None:
                self._form.accept(seat, slot, self.place)
        if self._form.masked:
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
                    self._form.show(
                        Seat(entity, agent, seen=arrays_like(out.observation), masks=arrays_like(out.action_mask))
                    )
                else:
                    self._seat(entity, agent, out)

    def _equip_newcomers(self, out: StepRows) -> None:
        """Give who has no seat yet arrays to write into, in the middle of a step."""
        for entity, agent in esper.get_component(Agent):
            if id(agent) not in self._known:
                self._form.show(
                    Seat(entity, agent, seen=arrays_like(out.observation), masks=arrays_like(out.action_mask))
                )

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
        self._form.point(seat, slot, out)

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


def _by_entity(item: tuple[int, Agent]) -> int:
    return item[0]
