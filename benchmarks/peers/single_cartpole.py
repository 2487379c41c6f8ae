"""CartPole-v1 under an ID without a batch of its own, so that ``rustyrl train gym:...`` steps it one at a time.

Gymnasium steps many CartPole-v1 in one call where it is asked for a batch, as rustyrl asks and the others do not.
"""

from __future__ import annotations

import gymnasium

gymnasium.register(
    "CartPoleSingle-v1",
    entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv",
    max_episode_steps=500,
    reward_threshold=475.0,
)
