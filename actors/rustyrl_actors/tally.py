"""How long the running episode of each slot is, and what it has earned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import EpisodeRows
from rustyrl_actors.states import place_into

__all__ = ["EpisodeTally"]


class EpisodeTally:
    """Adds up the rewards and env steps of E slots until their episodes end."""

    def __init__(self, slots: int) -> None:
        self._length = np.zeros(slots, np.int32)
        self._return = np.zeros(slots, np.float64)

    def clear(self) -> None:
        """Begin anew in every slot."""
        self._length[:] = 0
        self._return[:] = 0.0

    def add(self, reward: NDArray[np.float32], steps: NDArray[np.bool_] | int = 1) -> None:
        """Count one env step: ``reward`` `[E]`, ``steps`` 0 where a slot took none."""
        self._length += steps
        self._return += reward

    def save(self) -> dict[str, NDArray[np.generic]]:
        """The running episodes as named arrays."""
        return {"own.length": self._length.copy(), "own.return": self._return.copy()}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Go on from what `save` gave; raises `ValueError` if it is another's."""
        place_into(self._length, state, "own.length")
        place_into(self._return, state, "own.return")

    def take(self, slots: NDArray[np.intp], metrics: dict[str, NDArray[np.float32]]) -> EpisodeRows:
        """The episodes that ended in these slots, with their metrics; these slots begin anew."""
        episodes = EpisodeRows(
            slot=slots.astype(np.int32),
            episode_return=self._return[slots].astype(np.float32),
            length=self._length[slots].copy(),
            metrics=metrics,
        )
        self._length[slots] = 0
        self._return[slots] = 0.0
        return episodes
