"""Checks of episodes: seeds, resets, independence, leaks."""

from __future__ import annotations

import gc
import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from rustyrl.wire import decode_world_state, encode_world_state
from rustyrl_actors.catalog import EnvironmentSource
from rustyrl_actors.environment import Environment, StepRows, TimeStep, allocate_rows
from rustyrl_actors.testing.subject import DoesNotApplyError, Subject, ViolationError, force_end
from rustyrl_actors.testing.trial import ActionDraws, first_difference, run_trial, run_trials

__all__ = [
    "differs_between_seeds",
    "does_not_leak",
    "goes_on_from_a_saved_state",
    "keeps_slots_apart",
    "keeps_worlds_apart",
    "repeats_under_a_seed",
    "resets_cleanly",
    "resets_in_the_same_step",
]

GLOBAL_RANDOM = "the global random generator of Python or numpy"
LEAK_EPISODES = 1000
LEAK_OBJECTS = 500  # what the interpreter and caches may gain by themselves
LEAK_BYTES = 32 << 20


def repeats_under_a_seed(subject: Subject) -> None:
    """Run the same trial in a new environment."""
    before = _global_random()
    difference = first_difference(subject.trace(), subject.trial())
    if difference:
        drawn = f" ({GLOBAL_RANDOM} was drawn from)" if _global_random() != before else ""
        raise ViolationError(
            f"the same seed and the same actions gave other numbers{drawn}: {difference}",
            "draw from the rng that reset() gets, keep it for what is random between resets, do not look at the clock; "
            "a game in object style that draws from the global generators can say global_random = True; state in "
            "module globals or class attributes has to be put back too",
        )


def differs_between_seeds(subject: Subject) -> None:
    """Run the trial under another seed."""
    if subject.style == "gym":
        raise DoesNotApplyError("a Gymnasium environment may well have one start only")
    other = subject.trial(seed=subject.seed + 1)
    if not first_difference(subject.trace(), other):
        raise ViolationError(
            "two seeds gave the same numbers in every step",
            "draw the start of an episode from the rng that reset() gets; if nothing is random, policies will only be "
            "judged on the one episode that there is",
        )


def resets_cleanly(subject: Subject) -> None:
    """Run the usual trial again in an environment that has been used before, for longer and shorter."""
    environment, seed = subject.source.make(), (subject.seed, 0, 0)
    try:
        for used in (subject.steps, subject.steps // 2 + 1, subject.steps // 3 + 2):
            run_trial(environment, (subject.seed + used, 0, 0), subject.draws(), used)
            again = run_trial(environment, seed, subject.draws(), subject.steps)
            if difference := first_difference(subject.trace(), again):
                raise ViolationError(
                    f"a world that had been used before gave other numbers after its reset: {difference}",
                    "reset() must put back everything that an episode changes: components, processors that are kept, "
                    "attributes, and globals of the game's modules",
                )
    finally:
        environment.close()


def resets_in_the_same_step(subject: Subject) -> None:
    """Cut every episode and look at what is shown next."""
    if subject.style == "gym":
        raise DoesNotApplyError("Gymnasium's environments reset as their batch does; we translate")
    environment, rows = subject.source.make(), allocate_rows(subject.source.spec)
    draws = subject.draws()
    try:
        environment.reset((subject.seed, 0, 0), rows)
        for t in range(min(3, subject.steps)):
            environment.step(draws.at(t, rows.action_mask), rows)
        force_end(environment)
        step = environment.step(draws.at(3, rows.action_mask), rows)
        _compare_new_start(subject, environment, step, rows)
    finally:
        environment.close()


def goes_on_from_a_saved_state(subject: Subject) -> None:
    """Take the state in the middle of a trial, and go on with it in another environment."""
    moving = _Moving(subject.source, subject.steps // 2)
    try:
        moved = run_trial(moving, (subject.seed, 0, 0), subject.draws(), subject.steps)
    finally:
        moving.close()
    if difference := first_difference(subject.trace(), moved):
        raise ViolationError(
            f"a world that went on from its saved state gave other numbers: {difference}",
            "save_state() must give everything that changes from step to step, load_state() must put all of it back: "
            "components, counters of processors, attributes, and the episode metrics of agents in object style",
        )


def keeps_slots_apart(subject: Subject) -> None:
    """Give slot 0 other actions, and cut its episode early: nobody else may notice."""
    slots = subject.source.spec.slots
    if slots == 1:
        raise DoesNotApplyError("a world has one slot")
    if subject.style == "object":
        raise DoesNotApplyError("the agents of one game may meet")
    others = range(1, slots)
    draws = subject.draws()
    draws.replace(0, subject.seed + 1)
    if difference := first_difference(subject.trace(), subject.trial(draws=draws), others):
        if subject.style == "gym":
            raise DoesNotApplyError("its own batch draws for all slots from one generator")
        raise ViolationError(
            f"other actions in slot 0 changed what happens elsewhere: {difference}",
            "let every row of the arrays depend on that row alone; reset() and observe() must touch only the rows that "
            "they are given, and rng draws one row for each",
        )
    if subject.style == "column":
        environment = subject.source.make()
        try:
            started = _EndsEarly(environment)
            early = run_trial(started, (subject.seed, 0, 0), subject.draws(), subject.steps)
        finally:
            environment.close()
        if difference := first_difference(subject.trace(), early, others):
            raise ViolationError(
                f"the reset of slot 0 changed another slot: {difference}",
                "reset(rows, rng) must touch the rows it is given and no others, and so must observe(rows)",
            )


def keeps_worlds_apart(subject: Subject) -> None:
    """Step two worlds in turns."""
    pair = [subject.source.make(), subject.source.make()]
    other = ActionDraws(subject.source.spec, subject.steps, subject.seed + 3)
    seeds = [(subject.seed, 0, 0), (subject.seed + 9, 1, 0)]
    try:
        together = run_trials(pair, seeds, [subject.draws(), other], subject.steps)[0]
    finally:
        for environment in pair:
            environment.close()
    if difference := first_difference(subject.trace(), together):
        raise ViolationError(
            f"a second world in the same process changed the first: {difference}",
            "keep the state of a game in its components and processors; where it has module globals or class "
            "attributes, set them in every tick and count what changed within it (docs/worlds.md, 'Global state')",
        )


def does_not_leak(subject: Subject) -> None:
    """Run a thousand short episodes and count what is left."""
    if subject.style == "gym":
        raise DoesNotApplyError("its episodes cannot be cut short from here")
    environment, rows = subject.source.make(), allocate_rows(subject.source.spec)
    draws = subject.draws()
    process = psutil.Process()
    try:
        environment.reset((subject.seed, 0, 0), rows)

        def episodes(count: int) -> tuple[int, int]:
            for t in itertools.islice(itertools.cycle(range(subject.steps)), count):
                force_end(environment)
                environment.step(draws.at(t, rows.action_mask), rows)
            gc.collect()
            # What the collector follows, and what has no place in it, like arrays.
            return len(gc.get_objects()) + sys.getallocatedblocks(), process.memory_info().rss

        objects, memory = episodes(LEAK_EPISODES // 10)
        more_objects, more_memory = episodes(LEAK_EPISODES)
    finally:
        environment.close()
    left, grown = more_objects - objects, more_memory - memory
    if left > LEAK_OBJECTS or grown > LEAK_BYTES:
        raise ViolationError(
            f"{LEAK_EPISODES} resets left {left} objects and {grown >> 20} MiB behind",
            "delete what an episode created, and do not collect it in lists or globals",
        )


class _Moving:
    """An environment that goes on in another one after a few steps, as a world that moves to another actor does."""

    def __init__(self, source: EnvironmentSource, steps: int) -> None:
        self._source = source
        self._environment = source.make()
        self._left = steps
        self.spec = source.spec

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        self._environment.reset(seed, out)

    def step(self, action: Any, out: StepRows) -> Any:
        self._left -= 1
        if self._left == 0:
            state = self._environment.save()
            if state is None:
                raise DoesNotApplyError("the world has no save_state() and load_state()")
            message, blob = encode_world_state(0, 0, 0, state)
            self._environment.close()
            self._environment = self._source.make()
            self._environment.load(decode_world_state(message, memoryview(blob)))
        return self._environment.step(action, out)

    def close(self) -> None:
        self._environment.close()


class _EndsEarly:
    """An environment whose slot 0 is cut after a few steps, and only that."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.spec, self.place = environment.spec, environment.place
        self._steps = 0

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        self._environment.reset(seed, out)

    def step(self, action: Any, out: StepRows) -> Any:
        self._steps += 1
        if self._steps == 5:
            self._environment._elapsed[0] = self.spec.max_episode_steps
        return self._environment.step(action, out)

    def close(self) -> None:
        self._environment.close()


def _global_random() -> tuple[Any, bytes]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)  # noqa: S101 - that is what legacy=False gives
    return random.getstate(), state["state"]["key"].tobytes() + bytes(str(state["state"]["pos"]), "ascii")


def _compare_new_start(subject: Subject, environment: Environment, step: TimeStep, rows: StepRows) -> None:
    """After every episode was cut: the observations are new, and observing some rows is as observing all."""
    shown = {name: array.copy() for name, array in rows.observation.items()}
    if step.episodes is None or step.final_observation is None:
        raise ViolationError("no episode ended at its step limit", "look at max_episode_steps")
    slots = step.episodes.slot
    if all(np.array_equal(final, shown[name][slots]) for name, final in step.final_observation.items()):
        raise ViolationError(
            "the observation after an episode's end is still its last one: the world was not reset",
            "reset() must start a new episode at once, in the rows it is given, and observe() must show it there",
        )
    if subject.style == "column":
        observe: Callable[[Any], None] = environment._world.observe  # type: ignore[attr-defined]
        environment._context.enter()  # type: ignore[attr-defined]
        observe(slice(None))
        for name, array in rows.observation.items():
            if not np.array_equal(array, shown[name]):
                slot = int(np.argwhere(array != shown[name])[0][0])
                raise ViolationError(
                    f"observation {name!r} of slot {slot} differs between observe(rows) after a reset and observe(all)",
                    "let observe(rows) write for exactly these rows what it writes for them when it is asked for all",
                )
