"""States of worlds that were asked for and have not come: whoever sends one late did not send it unasked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

__all__ = ["Owing"]

MOST_PEERS = 1024  # that are remembered, those asked last


class Owing:
    """What each peer may still answer, once for each time that it was asked. Belongs to the receive thread."""

    def __init__(self, before: Iterable[int] = ()) -> None:
        """Have asked nobody.

        Args:
            before: worlds that a learner before this one may have asked for, whoever has them.
        """
        self._before = set(before)
        self._asked: dict[bytes, Counter[int]] = {}

    def ask(self, peer: bytes, worlds: Iterable[int]) -> None:
        """A peer is to send these."""
        asked = self._asked.pop(peer, Counter())
        asked.update(worlds)
        self._asked[peer] = asked  # at the end: the first were asked least recently
        while len(self._asked) > MOST_PEERS:
            del self._asked[next(iter(self._asked))]

    def settle(self, peer: bytes, world: int) -> bool:
        """Count an answer in; False if nobody asked for it, or it was given already."""
        asked = self._asked.get(peer)
        if asked is None or not asked[world]:
            known = world in self._before
            self._before.discard(world)
            return known
        asked[world] -= 1
        if not asked[world]:
            del asked[world]
        if not asked:
            del self._asked[peer]
        return True

    def __len__(self) -> int:
        """How many peers are remembered."""
        return len(self._asked)
