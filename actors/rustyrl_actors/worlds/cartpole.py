"""CartPole as an esper world in column style: equal to Gymnasium's CartPole-v1 step for step.

Dynamics and constants: Barto, Sutton and Anderson, 'Neuronlike Adaptive Elements That Can Solve Difficult
Learning Control Problems' (1983), with the explicit Euler step of 0.02 s that Gymnasium uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import esper
import gymnasium
import msgspec
import numpy as np
from numpy.typing import NDArray

from rustyrl_actors.agent import Agent
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.world import WorldInfo

__all__ = ["Cart", "CartPoleParameters", "CartPoleWorld", "cartpole_info"]

STEP_S = 0.02
MASS_CART_KG = 1.0
MASS_POLE_KG = 0.1
HALF_LENGTH_M = 0.5
POSITION_LIMIT_M = 2.4
ANGLE_LIMIT_RAD = 12 * 2 * math.pi / 360

# Steps cost next to nothing here, so that few long updates with large minibatches are through first.
QUICKLY_LEARNED: dict[str, dict[str, Any]] = {
    "batch": {"unroll_length": 128},
    "ppo": {"epochs": 4, "minibatch_size": 2048, "learning_rate": 3e-3, "max_learning_rate": 1e-2},
}


class CartPoleParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What can be set of the world with ``--set env.NAME=VALUE``."""

    force_n: float = 10.0
    gravity_m_s2: float = 9.8


@dataclass(slots=True)
class Cart:
    """The state of E carts with their poles.

    state: `[E, 4]` float64: position in m, velocity in m/s, pole angle in rad, angular velocity in rad/s
    """

    state: NDArray[np.float64]


class CartPoleProcessor(esper.Processor):
    """Pushes every cart by its action and says which poles fell."""

    def __init__(self, parameters: CartPoleParameters) -> None:
        self._parameters = parameters

    def process(self) -> None:
        """Advance by one step of 0.02 s."""
        for _, (cart, agent) in esper.get_components(Cart, Agent):
            position, velocity, angle, spin = cart.state.T
            force = np.where(agent.action == 1, self._parameters.force_n, -self._parameters.force_n)
            sine, cosine = np.sin(angle), np.cos(angle)
            total = MASS_CART_KG + MASS_POLE_KG
            moment = MASS_POLE_KG * HALF_LENGTH_M
            push = (force + moment * np.square(spin) * sine) / total
            spin_rate = (self._parameters.gravity_m_s2 * sine - cosine * push) / (
                HALF_LENGTH_M * (4.0 / 3.0 - MASS_POLE_KG * np.square(cosine) / total)
            )
            acceleration = push - moment * spin_rate * cosine / total
            position += STEP_S * velocity
            velocity += STEP_S * acceleration
            angle += STEP_S * spin
            spin += STEP_S * spin_rate
            agent.reward.fill(1.0)
            np.logical_or(np.abs(position) > POSITION_LIMIT_M, np.abs(angle) > ANGLE_LIMIT_RAD, out=agent.terminated)


def cartpole_info(defaults: dict[str, dict[str, Any]] | None = None) -> WorldInfo:
    """What CartPole declares, in either style; ``defaults`` are settings that suit one of them."""
    high = np.array([2 * POSITION_LIMIT_M, np.inf, 2 * ANGLE_LIMIT_RAD, np.inf], np.float32)
    return WorldInfo(
        observation_space=gymnasium.spaces.Box(-high, high, dtype=np.float32),
        action_space=gymnasium.spaces.Discrete(2),
        step_s=STEP_S,
        max_episode_steps=500,
        goal=("return_mean>=475",),
        evaluate_from=("return_mean>=400",),
        defaults=defaults or {},
    )


class CartPoleWorld:
    """Balance a pole on a cart by pushing left (0) or right (1)."""

    name = "cartpole"
    default_slots = 16
    Parameters = CartPoleParameters

    def __init__(self, slots: int, parameters: CartPoleParameters) -> None:
        self.info = cartpole_info(QUICKLY_LEARNED)
        self._parameters = parameters
        self._cart = Cart(np.zeros((slots, 4)))
        self._agent = Agent()

    def build(self) -> Agent:
        """Create the one entity that stands for every cart."""
        esper.create_entity(self._cart, self._agent)
        esper.add_processor(CartPoleProcessor(self._parameters))
        return self._agent

    def reset(self, rows: NDArray[np.intp], rng: SlotDraws) -> None:
        """Place the carts near the middle with their poles nearly upright."""
        self._cart.state[rows] = rng.uniform(-0.05, 0.05, 4)

    def save_state(self) -> dict[str, NDArray[np.float64]]:
        """Everything that changes from step to step."""
        return {"state": self._cart.state}

    def load_state(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Go on from it."""
        self._cart.state[:] = state["state"]

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        """The state itself, as float32."""
        self._agent.observation[rows] = self._cart.state[rows]
