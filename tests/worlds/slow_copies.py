"""A cart-pole whose state takes long to copy."""

from __future__ import annotations

import time
from typing import Any

from rustyrl_actors.worlds.cartpole import CartPoleWorld

COPY_S = 0.6


class SlowCopies(CartPoleWorld):
    """Balance a pole, and take a while to say where it stands."""

    name = "slow-copies"

    def save_state(self) -> dict[str, Any]:
        """Everything that changes from step to step."""
        time.sleep(COPY_S)
        return super().save_state()


class SlowFromThenOn(CartPoleWorld):
    """Balance a pole, and take too long to say where it stands but for the first time."""

    name = "slow-from-then-on"
    copied = False

    def save_state(self) -> dict[str, Any]:
        """Everything that changes from step to step."""
        time.sleep(3.0 * self.copied)
        self.copied = True
        return super().save_state()
