"""Copies of all worlds as they stand between two batches, for a checkpoint."""

from __future__ import annotations

import threading

from rustyrl.wire import WorldState, view_world_state

__all__ = ["Gathering", "KeptWorld"]

KeptWorld = tuple[WorldState, bytes]  # a world's state as a message and its blob


class Gathering:
    """What the training thread asks for and the receive thread fills in.

    batch: the worlds are to stand before this one
    done: set when nothing more will come
    broken: whether that is because the receive thread has ended
    stateless: whether a world came without a state, as those do that cannot save
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.done = threading.Event()
        self.broken = False
        self.stateless = False
        self._found: dict[int, KeptWorld] = {}
        self._awaited: dict[int, bytes] = {}  # worlds that are to come, and from whom

    @property
    def givers(self) -> set[bytes]:
        """Who has not sent everything yet."""
        return set(self._awaited.values())

    def ask(self, peer: bytes, worlds: tuple[int, ...]) -> None:
        """These worlds are to come from this actor."""
        self._awaited |= dict.fromkeys(worlds, peer)

    def take(self, peer: bytes, state: WorldState, blob: memoryview) -> bool:
        """Take in a world; False if it is none that is awaited. One without a state is not waited for any more.

        Raises:
            WireError: its state is not what its message says.
        """
        if self._awaited.get(state.world) != peer or (state.arrays and state.next_batch != self.batch):
            return False
        view_world_state(state, blob)
        self._awaited.pop(state.world, None)  # the other thread may have ended it just now
        self.stateless = self.stateless or not state.arrays
        if state.arrays:
            self._found[state.world] = (state, bytes(blob))
        return True

    def lose(self, peer: bytes) -> None:
        """An actor is gone, and its worlds with it."""
        self._awaited = {world: giver for world, giver in self._awaited.items() if giver != peer}

    def end(self) -> dict[int, KeptWorld] | None:
        """By world, what has come; None if more would have. No more is taken in.

        Worlds whose owner is gone are not in it, and begin anew in the run that goes on, too. Those that were only too
        late go on there: without them the others are no state that the run was ever in.
        """
        whole = self.done.is_set() and not self.broken
        self._awaited = {}
        return dict(self._found) if whole else None
