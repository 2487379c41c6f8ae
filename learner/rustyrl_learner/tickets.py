"""Who owns which worlds, which tickets are out, and the books that account for every one of them.

Pure bookkeeping: no socket, no clock, no thread. The collector tells it what happened and asks what to send.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rustyrl.rollout import Ticket

__all__ = ["Books", "Member", "TicketBook", "assign_worlds"]

MAX_REISSUES = 2


@dataclass(slots=True)
class Member:
    """An actor that is ready for tickets, with what it is to answer.

    leaving: it finishes that and gets no more
    relieved: it gets no more while others are there
    """

    peer: bytes
    index: int
    leaving: bool = False
    relieved: bool = False
    worlds: list[int] = field(default_factory=list)
    outstanding: list[Ticket] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Books:
    """The account of all tickets of one learner incarnation: issued = trained + rejected + lost + outstanding."""

    issued: int
    trained: int
    rejected: dict[str, int]
    lost: int
    outstanding: int

    @property
    def balanced(self) -> bool:
        """Whether every ticket is accounted for."""
        return self.issued == self.trained + sum(self.rejected.values()) + self.lost + self.outstanding


@dataclass(slots=True)
class _OpenBatch:
    policy_version: int
    missing: set[int]  # worlds that no ticket is out for
    placed: int = 0  # worlds whose rollout is in
    answers: int = 0  # tickets that brought them
    attempts: Counter[int] = field(default_factory=Counter)  # world to tickets rejected


class TicketBook:
    """Issues tickets for batches first, first + 1, ... under the one lag rule.

    Batch k is collected under version max(first, k - L) and opened once that exists, so at most L + 1 are open.
    """

    def __init__(self, worlds: int, max_policy_lag: int, first_batch: int = 0) -> None:
        self._worlds = worlds
        self._lag = max_policy_lag
        self._first = self._next = first_batch
        self._open: dict[int, _OpenBatch] = {}
        self._members: dict[bytes, Member] = {}
        self._issued = self._trained = self._lost = self._waiting = 0
        self._rejected: Counter[str] = Counter()
        self._unbalanced = True
        self._moving: dict[int, bytes] = {}  # worlds whose state is on its way, and who gives it
        self._to_ask: list[tuple[bytes, int]] = []  # whom to ask for which of them
        self.worlds_moved = 0
        self.worlds_restarted = 0  # of those, the ones that began new episodes

    @property
    def members(self) -> list[Member]:
        """Everyone who is ready, by index."""
        return sorted(self._members.values(), key=lambda member: member.index)

    def books(self) -> Books:
        """The account as it stands; it always balances."""
        out = sum(len(member.outstanding) for member in self._members.values()) + self._waiting
        return Books(self._issued, self._trained, dict(self._rejected), self._lost, out)

    def join(self, peer: bytes, index: int) -> None:
        """Count an actor in; it gets worlds at the next batch edge."""
        if peer in self._members:
            raise ValueError(f"peer {peer!r} is a member already")
        self._members[peer] = Member(peer, index)
        self._unbalanced = True

    def retire(self, peer: bytes) -> None:
        """Have an actor finish its tickets and get no more; its worlds move with the next batch that is opened.

        The last one that is left keeps its worlds until it leaves.
        """
        member = self._members.get(peer)
        if member is not None:
            member.leaving = True
            self._unbalanced = True

    def relieve(self, peer: bytes) -> bool:
        """Give what an actor is to answer, and its worlds, to the others at once; its late answers are of no account.

        It stays as one who gets worlds when nobody else is left. False if there is nobody to give them to.
        """
        member = self._members.get(peer)
        others = [other for other in self._staying() if other is not member]
        if member is None or not others:
            return False
        member.relieved = True
        for other in others:
            other.relieved = False  # one that stood in is one like any other
        self._lose(member)
        self._await_no_more(peer)
        self._balance()
        return True

    def retired(self) -> list[bytes]:
        """The leavers that have answered everything and handed their worlds over, to be sent home and counted out."""
        held = set(self._moving.values())
        if self._staying():  # else there is nobody to give worlds to
            held |= {member.peer for member in self._members.values() if member.worlds}
        return [m.peer for m in self._members.values() if m.leaving and not m.outstanding and m.peer not in held]

    def handovers(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """Who is to be asked for the state of which worlds; each is told once."""
        asked, self._to_ask = self._to_ask, []
        return [(peer, tuple(sorted(w for p, w in asked if p == peer))) for peer in dict(asked)]

    def gives(self, peer: bytes, world: int) -> bool:
        """Whether the state of this world is awaited from this actor."""
        return self._moving.get(world) == peer

    def owner(self, world: int) -> bytes | None:
        """Who has a world now."""
        return next((member.peer for member in self._members.values() if world in member.worlds), None)

    def arrive(self, world: int, *, whole: bool) -> None:
        """The state of a moving world has gone to its owner, or (not ``whole``) will not come: it begins anew."""
        if self._moving.pop(world, None) is not None and not whole:
            self.worlds_restarted += 1

    def leave(self, peer: bytes) -> None:
        """Count an actor out: its tickets are lost and its worlds move at once."""
        member = self._members.pop(peer, None)
        if member is None:
            return
        self._lose(member)
        self._await_no_more(peer)
        if self._members and member.worlds:
            self._balance()

    def due(self, newest_version: int) -> list[tuple[bytes, Ticket]]:
        """The tickets to send now that this version exists, oldest batch first."""
        if not self._staying():
            return []
        if not any(member.worlds for member in self._staying()):
            self._balance()  # at the start, and after everyone had left: open batches must not wait for an edge
        elif any(batch.missing.intersection(m.worlds) for batch in self._open.values() for m in self._leavers()):
            self._balance()  # what was refused is for others to do again
        while self._next - self._lag <= max(newest_version, self._first):
            if self._unbalanced:
                self._balance()
            version = max(self._first, self._next - self._lag)
            self._open[self._next] = _OpenBatch(version, set(range(self._worlds)))
            self._next += 1
        orders: list[tuple[bytes, Ticket]] = []
        for number, batch in sorted(self._open.items()):
            for member in self._staying() if batch.missing else []:
                if worlds := tuple(sorted(batch.missing.intersection(member.worlds) - self._moving.keys())):
                    ticket = Ticket(number, batch.policy_version, worlds)
                    batch.missing.difference_update(worlds)
                    member.outstanding.append(ticket)
                    self._issued += 1
                    orders.append((member.peer, ticket))
        return orders

    def owes(self, peer: bytes, ticket: Ticket) -> bool:
        """Whether this actor is to answer exactly this ticket."""
        member = self._members.get(peer)
        return member is not None and ticket in member.outstanding

    def owing(self, peer: bytes) -> bool:
        """Whether this actor has a ticket to answer."""
        member = self._members.get(peer)
        return member is not None and bool(member.outstanding)

    def accept(self, peer: bytes, ticket: Ticket) -> bool:
        """Count an answer in; True when it completes its batch."""
        self._members[peer].outstanding.remove(ticket)
        self._waiting += 1
        batch = self._open[ticket.batch]
        batch.placed += len(ticket.worlds)
        batch.answers += 1
        return batch.placed == self._worlds

    def reject(self, peer: bytes, ticket: Ticket, reason: str) -> bool:
        """Count an answer as refused and its worlds as missing; False once they were tried often enough."""
        self._members[peer].outstanding.remove(ticket)
        self._rejected[reason] += 1
        batch = self._open[ticket.batch]
        batch.missing.update(ticket.worlds)
        batch.attempts.update(ticket.worlds)
        return max(batch.attempts[world] for world in ticket.worlds) <= MAX_REISSUES

    def finish(self, number: int, rejected: str | None = None) -> None:
        """Count the answers of a complete batch as trained, or as rejected for a reason."""
        answers = self._open.pop(number).answers
        self._waiting -= answers
        if rejected is None:
            self._trained += answers
        else:
            self._rejected[rejected] += answers

    def _lose(self, member: Member) -> None:
        for ticket in member.outstanding:
            self._lost += 1
            self._open[ticket.batch].missing.update(ticket.worlds)
        member.outstanding.clear()

    def _staying(self) -> list[Member]:
        """Who gets tickets."""
        staying = [member for member in self.members if not member.leaving]
        return [member for member in staying if not member.relieved] or staying

    def _leavers(self) -> list[Member]:
        return [member for member in self._members.values() if member.leaving]

    def _balance(self) -> None:
        members = self._staying()
        if not members:
            return
        before = {world: member for member in self.members for world in member.worlds}
        for other in self.members:
            if all(other is not member for member in members):
                other.worlds = []
        begun = self._next > self._first  # the first assignment moves nothing
        assignment = assign_worlds(self._worlds, {member.index: member.worlds for member in members})
        for member in members:
            member.worlds = assignment[member.index]
            for world in member.worlds if begun else ():
                if before.get(world) is not member:
                    self._move(world, before.get(world))
        self._unbalanced = False

    def _move(self, world: int, giver: Member | None) -> None:
        """A world has another owner, who goes on with the state that the one before gives, if there is one."""
        self.worlds_moved += 1
        if world in self._moving:  # it moves on before it came
            return
        if giver is None or giver.relieved:
            self.worlds_restarted += 1
            return
        self._moving[world] = giver.peer
        self._to_ask.append((giver.peer, world))

    def _await_no_more(self, giver: bytes) -> None:
        """Whatever this actor was to hand over begins anew."""
        for world in [world for world, peer in self._moving.items() if peer == giver]:
            self.arrive(world, whole=False)
        self._to_ask = [(peer, world) for peer, world in self._to_ask if peer != giver]


def assign_worlds(worlds: int, owned: dict[int, list[int]]) -> dict[int, list[int]]:
    """Share worlds evenly among actor indices, moving as few as possible.

    Every actor's share differs by at most one; the larger shares stay with who owns that many, then go to lower
    indices. What an actor keeps and gets is in ascending order, so the result follows from the sorted indices and
    what they owned.
    """
    indices = sorted(owned)
    base, extra = divmod(worlds, len(indices))
    larger = set(sorted(indices, key=lambda index: (len(owned[index]) <= base, index))[:extra])
    share = {index: base + (index in larger) for index in indices}
    kept = {index: sorted(owned[index])[: share[index]] for index in indices}
    taken = {world for worlds_kept in kept.values() for world in worlds_kept}
    free = [world for world in range(worlds) if world not in taken]
    for index in indices:
        count = share[index] - len(kept[index])
        kept[index] = sorted(kept[index] + free[:count])
        free = free[count:]
    return kept
