"""Messages that wait until their actor reads: a world that is given out is one message, and a queue holds so many."""

from __future__ import annotations

from collections import deque

from rustyrl.channels import RolloutReceiver
from rustyrl.wire import Message, WorldState

__all__ = ["Outbox"]


class Outbox:
    """Keeps the order of what is sent to each actor. Belongs to the receive thread."""

    def __init__(self, receiver: RolloutReceiver) -> None:
        self._receiver = receiver
        self._waiting: dict[bytes, deque[tuple[Message, bytes]]] = {}

    @property
    def peers(self) -> frozenset[bytes]:
        """For whom something waits."""
        return frozenset(self._waiting)

    def send(self, peer: bytes, message: Message, blob: bytes = b"") -> bool:
        """Send behind what waits; False if nothing waits and the actor cannot be reached.

        The state of a world is taken in all the same: it alone comes in numbers that no queue has room for.
        """
        if peer not in self._waiting:
            if self._receiver.send(peer, message, blob):
                return True
            if not isinstance(message, WorldState):
                return False
        self._waiting.setdefault(peer, deque()).append((message, blob))
        return True

    def flush(self) -> set[bytes]:
        """Send on what waits; whose queue took something."""
        moved = set()
        for peer, messages in list(self._waiting.items()):
            while messages and self._receiver.send(peer, *messages[0]):
                messages.popleft()
                moved.add(peer)
            if not messages:
                del self._waiting[peer]
        return moved

    def forget(self, peer: bytes) -> None:
        """Drop what waits for an actor that is gone."""
        self._waiting.pop(peer, None)
