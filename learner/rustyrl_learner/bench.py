"""How fast the learner is on its own: on a batch of made-up experience of the right shapes."""

from __future__ import annotations

import time
from typing import Any

import torch

from rustyrl.config import Config
from rustyrl.spec import EnvironmentSpec, action_blocks
from rustyrl.windows import make_part
from rustyrl_learner.advantage import training_batch, uses_vtrace
from rustyrl_learner.batch import Batch
from rustyrl_learner.device import choose_device
from rustyrl_learner.ppo import ppo_update
from rustyrl_learner.rows import TrainingBatch
from rustyrl_learner.training import Training

__all__ = ["measure_learner"]


def measure_learner(config: Config, spec: EnvironmentSpec, seconds: float, windows: int) -> list[dict[str, Any]]:
    """Update over and over.

    Returns:
        ``learner_samples_s`` (samples a second and epoch, the update alone), ``learner_sps`` (env steps a second that
        it could train on, advantages included) and ``advantages_ms`` of a batch, see `rustyrl.windows.make_part`.
    """
    device = choose_device(config.run.device)
    training = Training(config, spec, device)
    batch = _made_up(config, spec, device)
    samples_s: list[float] = []
    sps: list[float] = []
    advantages_ms: list[float] = []
    for window in range(windows + 1):  # the first is the warm-up
        started = time.perf_counter()
        update_s = whole_s = 0.0
        samples = steps = 0
        while time.perf_counter() - started < seconds or not steps:
            before = time.perf_counter()
            rows = _prepare(training, batch, config)
            _finish(device)
            prepared = time.perf_counter()
            rate = config.ppo.learning_rate
            given = (training.network, training.optimizer, rows, config.ppo, rate, training.shuffle)
            losses = ppo_update(*given, graphs=training.graphs)
            _finish(device)
            after = time.perf_counter()
            update_s += after - prepared
            whole_s += after - before
            samples += losses.epochs * len(rows.advantage)
            steps += len(rows.advantage)
        if window:
            samples_s.append(samples / update_s)
            sps.append(steps / whole_s)
            advantages_ms.append(1000 * (whole_s - update_s) * batch.reward.numel() / steps)
    return [
        make_part("learner_samples_s", samples_s, "samples/s and epoch"),
        make_part("learner_sps", sps, "env steps/s"),
        make_part("advantages_ms", advantages_ms, "ms"),
    ]


def _prepare(training: Training, batch: Batch, config: Config) -> TrainingBatch:
    return training_batch(
        training.network,
        batch,
        config.ppo,
        normalizer=training.normalizer,
        rewards=training.rewards,
        values=training.values,
        lagged=config.batch.max_policy_lag > 0,
        corrected=uses_vtrace(config.ppo, config.batch.max_policy_lag),
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _made_up(config: Config, spec: EnvironmentSpec, device: torch.device) -> Batch:
    """A batch whose episodes end once in 200 steps; everything else is noise that the action space allows."""
    steps, slots = config.batch.unroll_length, config.batch.worlds * spec.slots
    generator = torch.Generator().manual_seed(config.run.seed)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(steps, slots, generator=generator) < share

    action = torch.zeros(steps, slots, spec.action_width)
    for block in action_blocks(spec.action):
        shape = (steps, slots, block.groups)
        if block.kind == "box":
            action[..., block.column] = 0.5 * torch.randn(shape, generator=generator)
        else:
            action[..., block.column] = torch.randint(block.choices, shape, generator=generator).float()
    truncated, width = chance(0.0025), spec.observation_width
    cut = truncated.nonzero()
    given = Batch(
        observation=torch.randn(steps + 1, slots, width, generator=generator),
        action=action,
        action_mask=torch.ones(steps, slots, spec.mask_width, dtype=torch.bool) if spec.mask_width else None,
        behavior_log_prob=-1 - torch.rand(steps, slots, generator=generator),
        reward=torch.randn(steps, slots, generator=generator),
        terminated=chance(0.0025),
        truncated=truncated,
        valid=torch.ones(steps, slots, dtype=torch.bool),
        final_index=cut,
        final_observation=torch.randn(len(cut), width, generator=generator),
        fresh=torch.zeros(slots, dtype=torch.bool),
    )
    arrays: dict[str, Any] = {name: getattr(given, name) for name in Batch.__dataclass_fields__}
    moved: dict[str, Any] = {name: None if array is None else array.to(device) for name, array in arrays.items()}
    return Batch(**moved)
