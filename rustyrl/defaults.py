"""Settings that suit a run's spaces and scale, below what its world's author and its user say."""

from __future__ import annotations

from typing import Any

from rustyrl.config import Config
from rustyrl.spec import EnvironmentSpec

__all__ = ["recommend"]

FEW_STEPS = 4096  # of a batch; worlds that give no more are slow, and the learner has time
MINIBATCHES = 8
SMALLEST_MINIBATCH = 256


def recommend(spec: EnvironmentSpec, config: Config) -> dict[str, dict[str, Any]]:
    """A layer of settings for `build_config`; docs/decisions/0005 has the measurements behind them.

    Values are learned in units of their own whatever the reward's scale. Worlds that give few steps are learned from
    more often and in smaller minibatches: experience is what is dear there. Choices keep a little entropy.

    Args:
        spec: of the environment.
        config: with everything that the author and the user ask for; its batch decides about the scale.
    """
    batch_steps = config.batch.worlds * spec.slots * config.batch.unroll_length
    ppo: dict[str, Any] = {"normalize_value": True}
    if batch_steps <= FEW_STEPS:
        ppo |= {
            "epochs": 10,
            "minibatch_size": max(SMALLEST_MINIBATCH, batch_steps // MINIBATCHES),
            "learning_rate": 3e-4,
            "max_learning_rate": 1e-3,
        }
    if all(part.kind == "discrete" for part in spec.action):
        ppo["entropy"] = 0.01
    return {"ppo": ppo}
