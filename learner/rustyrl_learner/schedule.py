"""What changes while a run goes on: learning rate, clip, entropy weight and discount."""

from __future__ import annotations

import msgspec

from rustyrl.config import PPOConfig

__all__ = ["scheduled"]


def scheduled(ppo: PPOConfig, progress: float, learning_rate: float) -> PPOConfig:
    """The settings of one update.

    Args:
        ppo: as configured: values at the start.
        progress: 0 at the start, 1 at ``run.total_steps``; more is taken as 1.
        learning_rate: the one to go on with where the rate follows the KL.

    Returns:
        The same with ``learning_rate, clip, entropy, gamma`` as they are now.
    """
    progress = min(progress, 1.0)

    def now(start: float, end: float) -> float:
        return start if end < 0 else start + (end - start) * progress

    rate = {"kl": learning_rate, "constant": ppo.learning_rate, "linear": now(ppo.learning_rate, 0.0)}
    return msgspec.structs.replace(
        ppo,
        learning_rate=rate[ppo.schedule],
        clip=now(ppo.clip, ppo.clip_end),
        entropy=now(ppo.entropy, ppo.entropy_end),
        gamma=now(ppo.gamma, ppo.gamma_end),
    )
