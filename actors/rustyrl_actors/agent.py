"""The component that marks who is controlled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Agent"]


@dataclass(slots=True)
class Agent:
    """What the framework and the processors of a world exchange.

    Observations and actions have the form of their spaces: one array, or for a Dict or Tuple a dict of arrays by name.

    **Column style**: one Agent stands for the E slots of a world, and every array has a leading slot axis. Before a
    step the framework points ``action`` at the actions and the rest at the rows of the rollout that this step
    writes; so write **into** them (``agent.reward[:] = ...``) and keep no reference.

    **Object style**: one Agent is one slot. Before a step ``action`` is set (an int for a Discrete space), ``reward``
    is 0.0 and the flags are False; set them (``agent.reward += ...``, ``agent.terminated = True``).

    observation: `[E, ...]` or `[...]`, written by the world's ``observe``
    action: `[E, ...]` or `[...]`, within the bounds of the action space
    action_mask: `[E, choices]` or `[choices]` bool where the world declares one; all True before ``observe``
    reward: `[E]` float32, or a number
    terminated: `[E]` bool, or a bool: the episode ended and the future is worth nothing
    truncated: `[E]` bool, or a bool: the episode was cut; the framework sets it at the step limit
    valid: `[E]` bool, False where a slot held no agent in this step (column style alone)
    episode_metrics: name to `[E]` float32, or to a number, owned by the world; read when an episode ends
    """

    observation: Any = None
    action: Any = None
    action_mask: Any = None
    reward: Any = 0.0
    terminated: Any = False
    truncated: Any = False
    valid: Any = True
    episode_metrics: dict[str, Any] = field(default_factory=dict)
