"""Gymnasium environments behind the environment contract: ``gym:ID``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.contract import Place
from rustyrl_actors.environment import Arrays, StepRows, TimeStep
from rustyrl_actors.gym_copies import GymBatch, GymCopies, close_all, make_gym
from rustyrl_actors.gym_values import GymAction, GymReader
from rustyrl_actors.spaces import action_parts, leaves
from rustyrl_actors.tally import EpisodeTally

__all__ = ["GYM_EVALUATION_SLOTS", "GYM_SLOTS", "GymEnvironment", "describe_gym"]

GYM_SLOTS = 16
GYM_EVALUATION_SLOTS = 64
MARGIN = 0.02  # of the reward threshold
NO_LIMIT = 2**31 - 1  # of steps


def describe_gym(env: str, env_id: str, slots: int, settings: Mapping[str, Any]) -> tuple[EnvironmentSpec, str]:
    """The spec of a Gymnasium environment, and a line about it.

    Its reward threshold, where it has one, is the goal, with a margin: the version that is chosen for meeting a goal
    has been lucky, and does a little worse on fresh seeds.

    Raises:
        UsageError: there is none with this ID, it does not take these keyword arguments, or a space is of a kind that
            this framework has no policy for.
    """
    made = make_gym(env, env_id, slots, settings, copies=1)
    try:
        if isinstance(made, list):
            known, metadata = made[0].spec, made[0].metadata
            limit = None if known is None else known.max_episode_steps
            seen, acted = made[0].observation_space, made[0].action_space
        else:
            known, metadata = made.spec, made.metadata
            limit = None if known is None else known.kwargs.get("max_episode_steps", known.max_episode_steps)
            seen, acted = made.single_observation_space, made.single_action_space
        arrays = GymReader(env, seen).arrays
        actions = action_parts(env, acted, translated=True)
    finally:
        close_all(made)
    threshold = None if known is None else known.reward_threshold
    fps = metadata.get("render_fps")
    defaults: dict[str, dict[str, Any]] = {}
    if all(array.dtype == "bool" for array in arrays):  # one-hot: there is no scale to find out
        defaults["policy"] = {"normalize": False}
    spec = EnvironmentSpec(
        env=env,
        observation=arrays,
        action=actions,
        slots=slots,
        step_s=1.0 / fps if fps else 0.0,
        max_episode_steps=limit or NO_LIMIT,
        goal=() if threshold is None else (f"return_mean>={threshold + MARGIN * abs(threshold):.12g}",),
        parameters=dict(settings),
        defaults=defaults,
    )
    return spec, f"Gymnasium's {env_id}"


class GymEnvironment:
    """E copies of a Gymnasium environment: its own batched implementation where it has one, else one after another.

    Whatever way of resetting the batch has, what comes out is the same-step reset of the contract; an env step that a
    next-step reset spends on resetting is a row that is not valid. With ``stagger`` the first episode of each copy is
    truncated after a random part of its step limit, so that later ones do not all end together; a batch has no way to
    be asked for that.
    """

    def __init__(self, spec: EnvironmentSpec, settings: Mapping[str, Any], *, stagger: bool = False) -> None:
        self.spec = spec
        self.place = Place(spec.env)
        made = make_gym(spec.env, spec.env.partition(":")[2], spec.slots, settings, copies=spec.slots)
        self._copies = GymCopies(spec.env, made) if isinstance(made, list) else GymBatch(spec.env, made)
        self._acted = [GymAction(name, leaf) for name, leaf in leaves(self._copies.action_space)]
        self._tally = EpisodeTally(spec.slots)
        self._stagger = stagger and spec.max_episode_steps < NO_LIMIT

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        """Start new episodes in every slot, write their first observation, and seed what follows."""
        self.place = Place(self.spec.env, seed)
        self._tally.clear()
        seeds = [np.random.SeedSequence((*seed, slot)).generate_state(1)[0] for slot in range(self.spec.slots)]
        numbers = [int(one) >> 1 for one in seeds]  # 31 bits: not all take 32
        if self._stagger and isinstance(self._copies, GymCopies):
            lengths = np.random.default_rng(seed).integers(1, self.spec.max_episode_steps + 1, self.spec.slots)
            self._copies.reset(numbers, out.observation, lengths.tolist())
        else:
            self._copies.reset(numbers, out.observation)

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        """Step every slot in one call, write the outcome into ``out``, have what ended reset."""
        self.place.step += 1
        self.place.tick += 1
        final = self._copies.step([acted.to_gym(action[acted.name]) for acted in self._acted], out)
        np.logical_and(out.truncated, ~out.terminated, out=out.truncated)  # if both, terminated wins
        self._tally.add(out.reward, out.valid)
        if final is None:
            return TimeStep()
        return TimeStep(self._tally.take(np.flatnonzero(out.terminated | out.truncated), {}), final)

    def save(self) -> Arrays | None:
        """None: Gymnasium has no way to ask for it."""
        return None

    def load(self, state: Arrays) -> None:  # noqa: ARG002 - whatever it is
        """Not to be had."""
        raise ValueError(f"{self.spec.env!r} cannot go on from a state: Gymnasium's environments have none to give")

    def close(self) -> None:
        """Close every copy."""
        self._copies.close()
