"""A trained policy as an esper processor: the shipped game runs the inference that training ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError
from rustyrl.weights import Weights, read_policy
from rustyrl_actors.agent import Agent
from rustyrl_actors.inference import Policy
from rustyrl_actors.spaces import SINGLE_ARRAY, in_form

__all__ = ["PolicyProcessor"]

Arrays = dict[str, NDArray[Any]]


class PolicyProcessor(esper.Processor):
    """Acts, greedily, for every entity with an `Agent`: one inference over all agents in object style.

    Gives an agent that has none the arrays of the policy to observe into, calls ``observe`` (the world's own), and
    writes ``agent.action``, within the bounds of the action space. Agents in object style hold one slot, in column
    style as many as the leading axis of the observation that they bring says.

    Args:
        weights: the policy.
        observe: writes the observations of all agents; None where processors that run before this one do.
        every: acts in every so many ticks, as the world's ``ticks_per_step`` says, and leaves the actions between.
    """

    def __init__(self, weights: Weights, observe: Callable[[], None] | None = None, every: int = 1) -> None:
        self._weights = weights
        self._observe = observe
        self._every = every
        self._tick = -1
        self._policies: dict[int, Policy] = {}  # by number of slots
        self._one_observation = [array.name for array in weights.spec.observation] == [SINGLE_ARRAY]
        self._one_action = [part.name for part in weights.spec.action] == [SINGLE_ARRAY]

    @classmethod
    def from_file(cls, path: Path | str, observe: Callable[[], None] | None = None, every: int = 1) -> PolicyProcessor:
        """Read a policy file, or the ``policy.safetensors`` of a run folder."""
        path = Path(path)
        return cls(read_policy(path / "policy.safetensors" if path.is_dir() else path), observe, every)

    def process(self, *_args: Any, **_kwargs: Any) -> None:
        """Choose an action for every slot of every agent."""
        self._tick += 1
        agents = [agent for entity, agent in esper.get_component(Agent) if esper.entity_exists(entity)]
        for agent in agents:
            self._equip(agent)
        if self._tick % self._every:
            return
        if self._observe is not None:
            self._observe()
        objects = [agent for agent in agents if self._is_object(agent)]
        if objects:
            self._act_for_objects(objects)
        for agent in agents:
            if not self._is_object(agent):
                self._act_for_columns(agent)

    def _equip(self, agent: Agent) -> None:
        """Give an agent the arrays that it lacks; masks that ``observe`` will write allow everything before it does."""
        spec = self._weights.spec
        if agent.observation is None:
            # Not a number, where there is such a thing, until somebody has observed.
            seen = {
                array.name: np.full(array.shape, np.nan if array.dtype == "float32" else 0, array.dtype)
                for array in spec.observation
            }
            agent.observation = in_form(seen, single=self._one_observation)
        masked = [part for part in spec.action if part.masked]
        if not masked:
            return
        own = {SINGLE_ARRAY: agent.action_mask} if self._one_action else agent.action_mask or {}
        if not all(isinstance(own.get(part.name), np.ndarray) for part in masked):
            if agent.action_mask is not None and self._observe is None:
                return  # a list, which a processor wrote
            lead = () if self._is_object(agent) else (len(next(iter(self._seen(agent).values()))),)
            own = {part.name: np.ones((*lead, *part.mask.shape), bool) for part in masked}
            agent.action_mask = in_form(own, single=self._one_action)
        elif self._observe is not None:
            for mask in own.values():
                mask.fill(True)

    def _is_object(self, agent: Agent) -> bool:
        first = self._weights.spec.observation[0]
        return bool(np.shape(self._seen(agent)[first.name]) == first.shape)

    def _seen(self, agent: Agent) -> Mapping[str, Any]:
        return {SINGLE_ARRAY: agent.observation} if self._one_observation else agent.observation

    def _masks(self, agent: Agent) -> Arrays | None:
        if agent.action_mask is None:
            return None
        masks = {SINGLE_ARRAY: agent.action_mask} if self._one_action else agent.action_mask
        return {name: np.asarray(mask, bool) for name, mask in masks.items()}

    def _act_for_objects(self, agents: list[Agent]) -> None:
        seen = [self._seen(agent) for agent in agents]
        masks = [self._masks(agent) or {} for agent in agents]
        observation = {
            array.name: np.stack([np.asarray(s[array.name], array.dtype) for s in seen])
            for array in self._weights.spec.observation
        }
        if any(np.isnan(array).any() for array in observation.values() if array.dtype.kind == "f"):
            raise ContractError(
                "an Agent's observation was not written before PolicyProcessor acted: give it the world's observe "
                "(PolicyProcessor.from_file(path, observe=world.observe)), or a lower priority than what observes"
            )
        mask = {name: np.stack([m[name] for m in masks]) for name in masks[0]}
        action = self._act(len(agents), observation, mask)
        for row, agent in enumerate(agents):
            own = {
                part.name: int(action[part.name][row]) if part.is_number else action[part.name][row]
                for part in self._weights.spec.action
            }
            agent.action = in_form(own, single=self._one_action)

    def _act_for_columns(self, agent: Agent) -> None:
        seen = dict(self._seen(agent))
        action = self._act(len(next(iter(seen.values()))), seen, self._masks(agent))
        agent.action = in_form(action, single=self._one_action)

    def _act(self, slots: int, observation: Arrays, mask: Arrays | None) -> Arrays:
        policy = self._policies.get(slots)
        if policy is None:
            policy = self._policies[slots] = Policy(self._weights, slots)
        action = policy.allocate_action()
        policy.act(observation, None, action, mask=mask)
        policy.bound(action, action)
        return action
