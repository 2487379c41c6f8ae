"""A trained policy as an esper processor: the shipped game runs the inference that training ran."""

from __future__ import annotations

import esper
import numpy as np

from rustyrl.weights import Weights
from rustyrl_actors.agent import Agent
from rustyrl_actors.inference import Policy

__all__ = ["PolicyProcessor"]


class PolicyProcessor(esper.Processor):
    """Acts for every entity that has an `Agent`, greedily, from what stands in ``agent.observation``.

    Writes ``agent.action``, clipped to the action space. Give it a priority above the processors that read
    actions and below those that write observations.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._policies: dict[int, Policy] = {}  # by number of slots

    def process(self) -> None:
        """Choose an action for every slot of every agent."""
        spec = self._weights.spec
        for _, agent in esper.get_component(Agent):
            slots = len(agent.observation[spec.observation[0].name])
            policy = self._policies.get(slots)
            if policy is None:
                policy = self._policies[slots] = Policy(self._weights, slots)
            shape = (slots, *spec.action.shape)
            if agent.action.shape != shape:
                agent.action = np.zeros(shape, spec.action.array.dtype)
            policy.act(agent.observation, None, agent.action)
            policy.clip(agent.action, agent.action)
