"""Environments of which Gymnasium steps many in one call, under IDs that it steps one at a time: CartPoleSingle-v1.

``rustyrl train gym:single:CartPoleSingle-v1`` asks for what the other libraries ask for; of CartPole-v1 it asks for
a batch, which they do not.
"""

from __future__ import annotations

import gymnasium

__all__ = ["has_batch", "single_id"]


def has_batch(env: str) -> bool:
    """Whether Gymnasium steps many of these in one call."""
    return gymnasium.spec(env).vector_entry_point is not None


def single_id(env: str) -> str:
    """The other ID of such an environment."""
    name, _, version = env.rpartition("-v")
    return f"{name}Single-v{version}"


for found in [spec for spec in gymnasium.registry.values() if spec.vector_entry_point and spec.entry_point]:
    gymnasium.register(
        single_id(found.id),
        entry_point=found.entry_point,
        max_episode_steps=found.max_episode_steps,
        reward_threshold=found.reward_threshold,
        kwargs=found.kwargs,
    )
