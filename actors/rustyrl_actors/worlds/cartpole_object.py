"""CartPole as an ordinary esper game: one entity is one cart, and its numbers are those of the column world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl_actors.agent import Agent
from rustyrl_actors.worlds.cartpole import (
    ANGLE_LIMIT_RAD,
    HALF_LENGTH_M,
    MASS_CART_KG,
    MASS_POLE_KG,
    POSITION_LIMIT_M,
    STEP_S,
    CartPoleParameters,
    cartpole_info,
)

__all__ = ["CartPoleObjectWorld"]


@dataclass(slots=True)
class Cart:
    """Where the cart is, in m, and how fast, in m/s."""

    position: float
    velocity: float


@dataclass(slots=True)
class Pole:
    """How the pole leans, in rad, and how fast it falls, in rad/s."""

    angle: float
    spin: float


class CartPoleProcessor(esper.Processor):
    """Pushes every cart by its action and says which poles fell."""

    def __init__(self, parameters: CartPoleParameters) -> None:
        self._parameters = parameters

    def process(self) -> None:
        """Advance by one step of 0.02 s."""
        total = MASS_CART_KG + MASS_POLE_KG
        moment = MASS_POLE_KG * HALF_LENGTH_M
        for _, (cart, pole, agent) in esper.get_components(Cart, Pole, Agent):
            force = self._parameters.force_n if agent.action == 1 else -self._parameters.force_n
            sine, cosine = float(np.sin(pole.angle)), float(np.cos(pole.angle))  # numpy's, as in the column world
            push = (force + moment * (pole.spin * pole.spin) * sine) / total
            spin_rate = (self._parameters.gravity_m_s2 * sine - cosine * push) / (
                HALF_LENGTH_M * (4.0 / 3.0 - MASS_POLE_KG * (cosine * cosine) / total)
            )
            acceleration = push - moment * spin_rate * cosine / total
            cart.position += STEP_S * cart.velocity
            cart.velocity += STEP_S * acceleration
            pole.angle += STEP_S * pole.spin
            pole.spin += STEP_S * spin_rate
            agent.reward += 1.0
            agent.terminated = abs(cart.position) > POSITION_LIMIT_M or abs(pole.angle) > ANGLE_LIMIT_RAD


class CartPoleObjectWorld:
    """Balance a pole on a cart, as ordinary esper objects."""

    style = "object"
    default_slots = 1
    Parameters = CartPoleParameters

    def __init__(self, slots: int, parameters: CartPoleParameters) -> None:
        self.info = cartpole_info()
        self._slots = slots
        self._parameters = parameters

    def reset(self, rng: np.random.Generator) -> None:
        """Place the carts near the middle with their poles nearly upright."""
        esper.add_processor(CartPoleProcessor(self._parameters))
        for _ in range(self._slots):
            position, velocity, angle, spin = rng.uniform(-0.05, 0.05, 4).tolist()
            esper.create_entity(Cart(position, velocity), Pole(angle, spin), Agent())

    def save_state(self) -> dict[str, NDArray[Any]]:
        """Every cart, in the order of the entities, and whether its pole has fallen."""
        carts = sorted(esper.get_components(Cart, Pole, Agent), key=lambda found: found[0])
        return {
            "cart": np.array([(c.position, c.velocity, p.angle, p.spin) for _, (c, p, _) in carts]),
            "fallen": np.array([agent.terminated for _, (_, _, agent) in carts]),
        }

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """Make the carts anew."""
        esper.add_processor(CartPoleProcessor(self._parameters))
        for (position, velocity, angle, spin), fallen in zip(state["cart"].tolist(), state["fallen"], strict=True):
            esper.create_entity(Cart(position, velocity), Pole(angle, spin), Agent(terminated=bool(fallen)))

    def observe(self) -> None:
        """The state itself."""
        for _, (cart, pole, agent) in esper.get_components(Cart, Pole, Agent):
            agent.observation[:] = (cart.position, cart.velocity, pole.angle, pole.spin)
