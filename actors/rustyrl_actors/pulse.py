"""How others can tell that this actor lives, and what it is doing."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from rustyrl.black_box import BlackBox
from rustyrl.channels import RolloutSender
from rustyrl.wire import Lease

__all__ = ["Pulse"]

Arrays = dict[str, NDArray[np.generic]]

LEASE_S = 1.0  # how often the learner hears that this actor lives, if it hears nothing else


class Pulse:
    """Tells the launcher through a black box, if there is one, and the learner by leases."""

    def __init__(self, link: RolloutSender, box: BlackBox | None) -> None:
        self._link = link
        self._box = box
        self._steps = self._answered = 0
        self._leased = time.monotonic()

    def build(self, world: int, batch: int) -> None:
        """A world is about to be built or reset for a batch."""
        if self._box is not None:
            self._box.note(world, batch, batch, -1)

    def step(self, world: int, batch: int, built: int, t: int) -> None:
        """A world is about to take step ``t`` of a batch; its episodes began with the batch ``built``."""
        self._steps += 1
        if self._box is not None:
            self._box.note(world, batch, built, t)
        if time.monotonic() - self._leased > LEASE_S:
            self.lease()

    def rest(self, *, answered: bool) -> None:
        """There is nothing to do; the ticket in hand was answered, or is of no account."""
        self._answered += answered
        if self._box is not None:
            self._box.rest(self._answered)

    def lease(self) -> None:
        """Tell the learner, if it can be reached; else later."""
        self._leased = time.monotonic()
        self._link.offer(Lease(self._steps))

    def actions(
        self, like: dict[str, NDArray[np.generic]], columns: dict[int, slice]
    ) -> dict[str, NDArray[np.generic]]:
        """Arrays like these, zero, that outlive this process where that can be had; see `BlackBox.actions`."""
        if self._box is None:
            return {name: np.zeros_like(array) for name, array in like.items()}
        return self._box.actions(like, columns)
