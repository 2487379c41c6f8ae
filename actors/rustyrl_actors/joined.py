"""Several environments of one kind, stepped as one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from rustyrl_actors.contract import Place
from rustyrl_actors.environment import Arrays, Environment, StepRows, TimeStep, join_episodes, rows_between
from rustyrl_actors.states import under

__all__ = ["JoinedEnvironment"]


class JoinedEnvironment:
    """Environments side by side: their slots follow one another, each is seeded by the seed and its index."""

    def __init__(self, environments: Sequence[Environment]) -> None:
        slots = environments[0].spec.slots
        self.spec = msgspec.structs.replace(environments[0].spec, slots=len(environments) * slots)
        self.place = Place(self.spec.env)
        self._environments = environments
        self._columns = [slice(index * slots, (index + 1) * slots) for index in range(len(environments))]

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        """Start new episodes everywhere; see `Environment.reset`."""
        self.place = Place(self.spec.env, seed)
        for index, (environment, columns) in enumerate(zip(self._environments, self._columns, strict=True)):
            environment.reset((*seed, index), rows_between(out, columns))

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        """Step every environment with its columns of the action; see `Environment.step`."""
        self.place.step += 1
        ends: list[tuple[int, TimeStep]] = []
        for environment, columns in zip(self._environments, self._columns, strict=True):
            mine = {name: array[columns] for name, array in action.items()}
            step = environment.step(mine, rows_between(out, columns))
            if step.episodes is not None:
                ends.append((columns.start, step))
        if not ends:
            return TimeStep()
        episodes = join_episodes([(first, step.episodes) for first, step in ends if step.episodes is not None])
        finals = [step.final_observation for _, step in ends if step.final_observation is not None]
        return TimeStep(episodes, {name: np.concatenate([final[name] for final in finals]) for name in out.observation})

    def save(self) -> Arrays | None:
        """What every environment gives, by its index; None if one gives nothing."""
        parts = [environment.save() for environment in self._environments]
        joined: Arrays = self.place.save()
        for index, part in enumerate(parts):
            if part is None:
                return None
            joined |= {f"{index}.{name}": array for name, array in part.items()}
        return joined

    def load(self, state: Arrays) -> None:
        """Go on from such a state."""
        self.place = Place.of(self.spec.env, state)
        for index, environment in enumerate(self._environments):
            environment.load(under(state, str(index)))

    def close(self) -> None:
        """Close them all."""
        for environment in self._environments:
            environment.close()
