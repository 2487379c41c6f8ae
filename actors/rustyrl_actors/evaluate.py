"""Fly a policy greedily on fresh seeds and say how well it does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError, RunFailedError, UsageError
from rustyrl.figures import episode_figures
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import EnvironmentSpec, spaces_text
from rustyrl.weights import Weights
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import Arrays, Environment, StepRows, allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.joined import JoinedEnvironment

__all__ = ["evaluate", "first_episode_figures", "first_episodes"]

EVALUATION_STREAM = 1_000_003  # keeps the seeds apart from those of training worlds
OBJECT_SLOTS = 128  # stepped side by side where the number of slots is part of the game
METRIC = "metric."  # keeps the world's own figures apart
STEP_LIMIT = 100_000  # ends the episodes of an environment that has no limit of its own


def evaluate(env: str, env_config: Mapping[str, Any], weights: Weights, episodes: int, seed: int) -> dict[str, float]:
    """Run the first episode of each of ``episodes`` slots, acting greedily.

    Only first episodes count, so that short ones are not over-represented.

    Returns:
        ``episodes, return_mean, return_std, length_mean`` and the metrics that the world declares.

    Raises:
        ContractError: the world gave a number that is not finite.
    """
    source = find_environment(env, env_config)
    _check_policy(source.spec, weights)
    parts: list[dict[str, Any]] = []
    left = episodes
    while left > 0:
        if source.resizable:
            count, slots = 1, min(left, source.resizable)
            source = find_environment(env, {**env_config, "slots": slots})
        else:
            slots = source.spec.slots
            count = -(-min(left, OBJECT_SLOTS) // slots)
        environment = JoinedEnvironment([source.make() for _ in range(count)])
        part = first_episodes(environment, _greedy(Policy(weights, environment.spec.slots)), seed, left)
        parts.append({name: values[:left] for name, values in part.items()})
        left -= count * slots
    return first_episode_figures(source.spec, parts)


def first_episode_figures(spec: EnvironmentSpec, parts: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of all that `first_episodes` gave."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics = {name: joined[METRIC + name] for name in spec.episode_metrics}
    return episode_figures(spec, joined["return"], joined["length"], metrics)


def _greedy(policy: Policy) -> Callable[[StepRows, Arrays], None]:
    def act(rows: StepRows, action: Arrays) -> None:
        policy.act(rows.observation, None, action, mask=rows.action_mask)
        policy.bound(action, action)

    return act


def _check_policy(spec: EnvironmentSpec, weights: Weights) -> None:
    if (weights.spec.observation, weights.spec.action) != (spec.observation, spec.action):
        raise UsageError(
            f"the policy is for another environment: it maps "
            f"{spaces_text(weights.spec.observation, weights.spec.action)}, {spec.env!r} needs "
            f"{spaces_text(spec.observation, spec.action)}"
        )


def first_episodes(
    environment: Environment, act: Callable[[StepRows, Arrays], None], seed: int, left: int
) -> dict[str, Any]:
    """Run the first episode of every slot, those that hold no agent at the start left out, and close the environment.

    Args:
        environment: any number of slots.
        act: reads the rows' observations and masks, and writes the actions that the environment is given.
        seed: of the evaluation.
        left: how many episodes are still to come, so that every part of an evaluation has other starts.

    Returns:
        ``return``, ``length`` and ``metric.NAME`` to `[n]`.
    """
    spec, rows = environment.spec, allocate_rows(environment.spec)
    action: Arrays = {part.name: np.zeros((spec.slots, *part.shape), part.array.dtype) for part in spec.action}
    first = {name: np.zeros(spec.slots) for name in ("return", "length", *(METRIC + m for m in spec.episode_metrics))}
    running = np.ones(spec.slots, bool)
    counted = running.copy()
    with closing(environment):
        environment.reset((seed, EVALUATION_STREAM, left), rows)
        for steps in itertools.count():
            act(rows, action)
            episodes = environment.step(action, rows).episodes
            _check_finite(spec.env, steps, rows, running)
            if episodes is not None:
                _note_first(episodes, running, first)
            if steps == 0:
                counted &= rows.valid
                running &= rows.valid
            if not running.any() or steps == STEP_LIMIT:
                counted &= ~running
                break
    if not counted.any():
        raise RunFailedError(f"no episode of {spec.env!r} ended within {STEP_LIMIT} steps; give it a step limit")
    return {name: values[counted] for name, values in first.items()}


def _note_first(episodes: EpisodeRows, running: NDArray[np.bool_], first: dict[str, Any]) -> None:
    """Write down the episodes of slots whose first still runs."""
    _, index = np.unique(episodes.slot, return_index=True)
    news = index[running[episodes.slot[index]]]
    slots = episodes.slot[news]
    first["return"][slots] = episodes.episode_return[news]
    first["length"][slots] = episodes.length[news]
    for name, values in episodes.metrics.items():
        first[METRIC + name][slots] = values[news]
    running[slots] = False


def _check_finite(env: str, step: int, rows: StepRows, running: NDArray[np.bool_]) -> None:
    """Refuse numbers that are not finite, of the episodes that count and still run."""
    for name, array in {"reward": rows.reward, **rows.observation}.items():
        if array.dtype.kind == "f" and not np.isfinite(array[running]).all():
            slot = int(np.argwhere(~np.isfinite(array) & running.reshape(-1, *[1] * (array.ndim - 1)))[0][0])
            raise ContractError(f"{env!r}, slot {slot}, step {step} of an evaluation: {name} is not finite")
