"""How fast one actor is: its worlds alone, its policy alone, and both with recording."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rustyrl.rollout import RolloutOrigin, Ticket, allocate_rollout
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, Weights, weights_layout
from rustyrl.windows import make_part, measure_rate
from rustyrl_actors.catalog import EnvironmentSource, find_environment
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll

__all__ = ["measure_actor"]

SEED = 1


def measure_actor(
    env: str,
    env_config: Mapping[str, Any],
    policy: PolicySpec,
    worlds: int,
    unroll_length: int,
    seconds: float,
    windows: int,
) -> list[dict[str, Any]]:
    """Measure one actor that owns some worlds, in this process and without a learner.

    Returns:
        ``env_sps``, ``inference_sps`` and ``actor_sps`` (env steps a second), and ``actor_overhead`` (the share of an
        actor's time that is neither), as `rustyrl.windows.make_part` gives them.
    """
    source = find_environment(env, env_config)
    weights = _random_weights(policy)
    slots = source.spec.slots * worlds
    recording = _Recording(source, weights, worlds, unroll_length)
    try:
        recording.collect()
        rates = measure_rate(recording.collect, seconds, windows)
        stages = recording.stages.take()
        env_sps = measure_rate(recording.step, seconds, windows)
    finally:
        recording.close()
    acting = Policy(weights, slots)
    observation = {name: array[0] for name, array in recording.buffer.rollout.observation.items()}
    masks = {name: array[0] for name, array in recording.buffer.rollout.action_mask.items()}
    action, log_prob, noise = acting.allocate_action(), np.empty(slots, np.float32), recording.buffer.noise[0]

    def act() -> int:
        acting.act(observation, noise, action, log_prob, masks)
        acting.bound(action, recording.buffer.bounded)
        return slots

    overhead = 1 - (stages["act"] + stages["step"]) / stages["whole"]
    return [
        make_part("env_sps", env_sps, "env steps/s"),
        make_part("inference_sps", measure_rate(act, seconds, windows), "env steps/s"),
        make_part("actor_sps", rates, "env steps/s"),
        make_part("actor_overhead", [overhead], "share"),
        make_part("rollout_bytes", [recording.bytes / (slots * unroll_length)], "bytes/env step"),
    ]


class _Recording:
    """An actor's worlds, policy and buffer, without the link."""

    def __init__(self, source: EnvironmentSource, weights: Weights, worlds: int, unroll_length: int) -> None:
        self._spec, slots = source.spec, source.spec.slots * worlds
        columns = [slice(i * source.spec.slots, (i + 1) * source.spec.slots) for i in range(worlds)]
        origin = RolloutOrigin(self._spec.fingerprint, "main", Ticket(0, 0, tuple(range(worlds))), 0, 0, 0)
        rollout = allocate_rollout(self._spec, unroll_length, slots, origin)
        self.buffer = UnrollBuffer(rollout, columns, allocate_noise(self._spec, unroll_length, slots))
        self.bytes = sum(array.nbytes for array in (*rollout.observation.values(), *rollout.action.values()))
        self.stages = Stages()
        self._policy = Policy(weights, slots)
        self._worlds = [OwnedWorld(i, source.make(), 0, allocate_rows(self._spec)) for i in range(worlds)]
        self._batch = 0
        for world in self._worlds:
            world.environment.reset((SEED, world.index, 0), world.now)

    def collect(self) -> int:
        """Answer a ticket; how many env steps that was."""
        started = time.perf_counter()
        for world, columns in zip(self._worlds, self.buffer.columns, strict=True):
            fill_noise(self.buffer.noise, self._spec, columns, noise_generator(SEED, world.index, self._batch))
        rollout = unroll(self._worlds, self._policy, self.buffer, self.stages)
        self._batch += 1
        for world in self._worlds:
            world.next_batch = self._batch
        self.stages.add("whole", time.perf_counter() - started)
        return rollout.unroll_length * rollout.slots

    def step(self) -> int:
        """Step every world with the actions that were recorded last; how many env steps that was."""
        rollout = self.buffer.rollout
        for t in range(rollout.unroll_length):
            action = {name: array[t] for name, array in rollout.action.items()}
            self._policy.bound(action, self.buffer.bounded)
            for world, given, rows in zip(self._worlds, self.buffer.given, self.buffer.rows, strict=True):
                world.environment.step(given, rows[t])
        return rollout.unroll_length * rollout.slots

    def close(self) -> None:
        for world in self._worlds:
            world.environment.close()


def _random_weights(policy: PolicySpec) -> Weights:
    generator = np.random.default_rng(SEED)
    arrays = {}
    for name, shape in weights_layout(policy).items():
        size = 1 / np.sqrt(shape[0]) if name.endswith(".weight") else 0.0
        arrays[name] = (size * generator.standard_normal(shape)).astype(np.float32)
    if policy.normalize:
        arrays["normalizer.variance"] += np.float32(1)
        arrays["normalizer.count"] += np.float32(1)
    return Weights(policy, arrays)
