"""Fly a policy greedily on fresh seeds and say how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rustyrl.errors import ContractError, UsageError
from rustyrl.figures import episode_figures
from rustyrl.spec import spaces_text
from rustyrl.weights import Weights
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import StepRows, allocate_rows
from rustyrl_actors.inference import Policy

__all__ = ["evaluate"]

EVALUATION_STREAM = 1_000_003  # keeps the seeds apart from those of training worlds
MAX_SLOTS = 1024


def evaluate(env: str, env_config: Mapping[str, Any], weights: Weights, episodes: int, seed: int) -> dict[str, float]:
    """Run the first episode of each of ``episodes`` slots, acting greedily.

    Only first episodes count, so that short ones are not over-represented.

    Returns:
        ``episodes, return_mean, return_std, length_mean`` and the metrics that the world declares.

    Raises:
        ContractError: the world gave a number that is not finite.
    """
    parts: list[dict[str, Any]] = []
    left = episodes
    while left > 0:
        slots = min(left, MAX_SLOTS)
        parts.append(_first_episodes(env, {**env_config, "slots": slots}, weights, (seed, EVALUATION_STREAM, left)))
        left -= slots
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics = {name.removeprefix("metric."): values for name, values in joined.items() if name.startswith("metric.")}
    return episode_figures(find_environment(env, env_config).spec, joined["return"], joined["length"], metrics)


def _first_episodes(env: str, env_config: Mapping[str, Any], weights: Weights, seed: tuple[int, ...]) -> dict[str, Any]:
    source = find_environment(env, env_config)
    spec = source.spec
    if (weights.spec.observation, weights.spec.action) != (spec.observation, spec.action):
        raise UsageError(
            f"the policy is for another environment: it maps "
            f"{spaces_text(weights.spec.observation, weights.spec.action)}, {env!r} needs "
            f"{spaces_text(spec.observation, spec.action)}"
        )
    policy = Policy(weights, spec.slots)
    environment = source.make()
    rows = allocate_rows(spec)
    action = np.zeros((spec.slots, *spec.action.shape), spec.action.array.dtype)
    first = {"return": np.zeros(spec.slots), "length": np.zeros(spec.slots)}
    first |= {f"metric.{name}": np.zeros(spec.slots) for name in spec.episode_metrics}
    running = np.ones(spec.slots, bool)
    try:
        environment.reset(seed, rows.observation)
        steps = 0
        while running.any():
            policy.act(rows.observation, None, action)
            step = environment.step(policy.clip(action, action), rows)
            _check_finite(env, steps, rows)
            steps += 1
            if (episodes := step.episodes) is None:
                continue
            news = running[episodes.slot]
            slots = episodes.slot[news]
            first["return"][slots] = episodes.episode_return[news]
            first["length"][slots] = episodes.length[news]
            for name, values in episodes.metrics.items():
                first[f"metric.{name}"][slots] = values[news]
            running[slots] = False
    finally:
        environment.close()
    return first


def _check_finite(env: str, step: int, rows: StepRows) -> None:
    for name, array in {"reward": rows.reward, **rows.observation}.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            slot = int(np.argwhere(~np.isfinite(array))[0][0])
            raise ContractError(f"{env!r}, slot {slot}, step {step} of an evaluation: {name} is not finite")
