"""A game in object style whose numbers can be known: fighters die, are taken away, respawn and join late.

What happens is planned tick by tick by a test, drawn by chance with ``unrest``, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import esper
import gymnasium
import msgspec
import numpy as np

from rustyrl.spec import MetricSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.world import WorldInfo

CHOICES = 3
Act = Callable[["Arena"], object]


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """unrest: the chance that something befalls a fighter in a tick; fighters: at the start, 0 are as many as slots."""

    fighters: int = 0
    limit: int = 20
    ticks: int = 1
    unrest: float = 0.0


@dataclass(slots=True)
class Fighter:
    """number: counted from 1 in each game; age: in ticks; draw: what it drew at its birth."""

    number: int
    draw: float
    age: int = 0


class FightProcessor(esper.Processor):
    """Ages every fighter, pays it one unit and ten times its action, and carries out what is planned for the tick."""

    def __init__(self, game: Arena) -> None:
        self._game = game

    def process(self) -> None:
        game = self._game
        game.tick += 1
        for _, (fighter, agent) in esper.get_components(Fighter, Agent):
            fighter.age += 1
            agent.reward += 1 + 10 * (agent.action or 0)  # who joined within the step was not asked yet
            agent.episode_metrics["age"] = fighter.age
        for act in game.plan.get(game.tick, ()):
            act(game)
        if game.parameters.unrest:
            game.stir()


class Arena:
    """Everyone sees its number, age and draw, and how many fighters there are."""

    style = "object"
    default_slots = 4
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters, plan: Mapping[int, Sequence[Act]] | None = None) -> None:
        limit = np.full(3, np.inf, np.float32)
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Dict(
                {
                    "body": gymnasium.spaces.Box(-limit, limit, dtype=np.float32),
                    "crowd": gymnasium.spaces.Box(0, 255, (1,), np.uint8),
                }
            ),
            action_space=gymnasium.spaces.Discrete(CHOICES),
            action_mask=True,
            step_s=0.1 * parameters.ticks,
            max_episode_steps=parameters.limit,
            ticks_per_step=parameters.ticks,
            metrics=(MetricSpec("age_mean", "age", "mean"),),
        )
        self.parameters = parameters
        self.plan = plan or {}
        self.games = 0
        self._slots = slots

    def reset(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.games += 1
        self.tick = self.born = 0
        esper.add_processor(FightProcessor(self))
        for _ in range(self.parameters.fighters or self._slots):
            self.join()

    def observe(self) -> None:
        everyone = esper.get_components(Fighter, Agent)
        for _, (fighter, agent) in everyone:
            agent.observation["body"][:] = fighter.number, fighter.age, fighter.draw
            agent.observation["crowd"][:] = len(everyone)
            agent.action_mask[fighter.number % CHOICES] = False

    def join(self) -> int:
        """One more fighter; the entity."""
        self.born += 1
        return esper.create_entity(Fighter(self.born, self.rng.random()), Agent())

    def find(self, number: int) -> tuple[int, Agent]:
        """The entity and the Agent of a fighter."""
        return next((e, agent) for e, (f, agent) in esper.get_components(Fighter, Agent) if f.number == number)

    def respawn(self, number: int) -> None:
        """The fighter dies, and goes on in the same entity as another one with a fresh Agent."""
        entity, agent = self.find(number)
        agent.terminated = True
        self.born += 1
        esper.add_component(entity, Fighter(self.born, self.rng.random()))
        esper.add_component(entity, Agent())

    def stir(self) -> None:
        """Let chance have its way with everyone who has not ended in this step."""
        living = [number for number in self.numbers() if not _has_ended(self.find(number)[1])]
        for number in living:
            entity, agent = self.find(number)
            if agent.action is None or self.rng.random() >= self.parameters.unrest:
                continue
            fate = self.rng.integers(5)
            if fate == 0:
                self.respawn(number)
                continue
            agent.terminated = bool(fate < 3)
            agent.truncated = bool(fate >= 3)
            if fate == 1:
                esper.delete_entity(entity, immediate=True)
            elif fate == 2 or (fate == 3 and self.parameters.ticks == 1):  # who is cut is kept until the step is over
                esper.delete_entity(entity)
        if len(living) < self._slots and self.rng.random() < self.parameters.unrest:
            self.join()

    def numbers(self) -> list[int]:
        """Of the fighters that have an Agent."""
        return sorted(
            fighter.number for e, (fighter, _) in esper.get_components(Fighter, Agent) if esper.entity_exists(e)
        )


def die(number: int, *, gone: bool | None = None) -> Act:
    """It terminates, and stays, or is deleted (False: at the next tick; True: at once)."""
    return lambda game: _end(game, number, gone, terminated=True)


def cut(number: int, *, gone: bool | None = None) -> Act:
    """The same, truncated."""
    return lambda game: _end(game, number, gone, truncated=True)


def both(number: int) -> Act:
    """Terminated and truncated."""
    return lambda game: _end(game, number, None, terminated=True, truncated=True)


def vanish(number: int, *, gone: bool) -> Act:
    """Deleted without a flag."""
    return lambda game: _end(game, number, gone)


def respawn(number: int) -> Act:
    return lambda game: game.respawn(number)


def join(game: Arena) -> None:
    game.join()


def _has_ended(agent: Agent) -> bool:
    return bool(agent.terminated or agent.truncated)


def _end(game: Arena, number: int, gone: bool | None, **flags: bool) -> None:
    entity, agent = game.find(number)
    for name, value in flags.items():
        setattr(agent, name, value)
    if gone is not None:
        esper.delete_entity(entity, immediate=gone)
