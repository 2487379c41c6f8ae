"""The component that marks who is controlled."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Agent"]


@dataclass(slots=True)
class Agent:
    """What the framework and the processors of a world exchange, for the E slots of one entity.

    Before a step the framework points ``action`` at the actions and the other arrays at the rows of the
    rollout that this step writes; so write **into** them (``agent.reward[:] = ...``) and keep no reference.
    ``reward``, ``terminated`` and ``truncated`` start a step as zeros, ``valid`` as ones.

    observation: name to `[E, ...]`, written by the world's ``observe``
    action: `[E, ...]`, clipped to the action space
    reward: `[E]` float32
    terminated: `[E]` bool, the episode ended and the future is worth nothing
    truncated: `[E]` bool, the episode was cut; the framework sets it at the step limit
    valid: `[E]` bool, False where a slot held no agent in this step
    episode_metrics: name to `[E]` float32, owned by the world; read when an episode ends
    """

    observation: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    action: NDArray[np.generic] = field(default_factory=lambda: np.empty(0))
    reward: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    terminated: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    truncated: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    valid: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    episode_metrics: dict[str, NDArray[np.float32]] = field(default_factory=dict)
