"""Tickets, worlds and books: whatever actors do, every ticket is accounted for and every world is trained once."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rustyrl.rollout import Ticket
from rustyrl_learner.tickets import MAX_REISSUES, Books, TicketBook, assign_worlds


class TicketWalk(RuleBasedStateMachine):
    """Actors come, answer, are refused, retire and vanish in any order, beside a model that counts by hand."""

    @initialize(worlds=st.integers(1, 6), lag=st.integers(0, 3), first=st.sampled_from([0, 0, 5]))
    def begin(self, worlds: int, lag: int, first: int) -> None:
        self.worlds, self.lag, self.first = worlds, lag, first
        self.book = TicketBook(worlds, lag, first)
        self.newest = first
        self.indices: dict[bytes, int] = {}
        self.leaving: set[bytes] = set()
        self.relieved: set[bytes] = set()
        self.out: list[tuple[bytes, Ticket]] = []
        self.placed: dict[int, list[Ticket]] = {}
        self.tried: Counter[tuple[int, int]] = Counter()
        self.issued = self.lost = self.trained = 0
        self.rejected: Counter[str] = Counter()
        self.seen = first - 1  # the newest batch that a ticket named
        self.peers = 0
        self.asked: dict[int, bytes] = {}  # worlds whose state was to be handed over, and by whom

    def moving(self) -> dict[int, bytes]:
        """Worlds whose state is on its way, and who gives it."""
        for peer, worlds in self.book.handovers():
            assert peer in self.indices
            self.asked |= dict.fromkeys(worlds, peer)
        return {world: peer for world, peer in self.asked.items() if self.book.gives(peer, world)}

    @precondition(lambda self: self.moving())
    @rule(data=st.data(), whole=st.booleans())
    def arrive(self, data: st.DataObject, whole: bool) -> None:
        world = data.draw(st.sampled_from(sorted(self.moving())))
        before = self.book.worlds_restarted
        self.book.arrive(world, whole=whole)
        assert world not in self.moving()
        assert self.book.worlds_restarted == before + (not whole)

    @rule(index=st.integers(0, 5))
    def join(self, index: int) -> None:
        if index in self.indices.values():
            return
        self.peers += 1
        peer = b"peer-%d" % self.peers
        self.indices[peer] = index
        self.book.join(peer, index)

    @precondition(lambda self: self.indices)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.lose(data.draw(st.sampled_from(sorted(self.indices))))

    def lose(self, peer: bytes) -> None:
        self.book.leave(peer)
        del self.indices[peer]
        self.leaving.discard(peer)
        self.relieved.discard(peer)
        self.lose_tickets(peer)

    def lose_tickets(self, peer: bytes) -> None:
        self.lost += sum(1 for owner, _ in self.out if owner == peer)
        self.out = [(owner, ticket) for owner, ticket in self.out if owner != peer]

    @precondition(lambda self: self.indices)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(sorted(self.indices)))
        self.book.retire(peer)
        self.leaving.add(peer)

    @rule()
    def retire_a_stranger(self) -> None:
        self.book.retire(b"nobody")

    def getters(self) -> set[bytes]:
        """Who is given tickets: those that stay, and those that were relieved only if nobody else does."""
        staying = self.indices.keys() - self.leaving
        return (staying - self.relieved) or staying

    @precondition(lambda self: self.indices)
    @rule(data=st.data())
    def relieve(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(sorted(self.indices)))
        others = self.getters() - {peer}
        assert self.book.relieve(peer) == bool(others)
        if others:
            self.relieved = self.relieved - others | {peer}
            self.lose_tickets(peer)
            (member,) = [member for member in self.book.members if member.peer == peer]
            assert (member.worlds, member.outstanding) == ([], [])

    @rule()
    def relieve_a_stranger(self) -> None:
        assert not self.book.relieve(b"nobody")

    @rule()
    def send_home(self) -> None:
        """What the collector does before it asks what is due: no ticket is lost by it."""
        lost = self.lost
        for peer in self.book.retired():
            self.lose(peer)
        assert self.lost == lost

    @rule()
    def due(self) -> None:
        opened = self.seen
        orders = self.book.due(self.newest)
        order = [(ticket.batch, self.indices[peer]) for peer, ticket in orders]
        assert order == sorted(order)
        for peer, ticket in orders:
            assert ticket.policy_version == max(self.first, ticket.batch - self.lag) <= self.newest
            assert self.newest <= ticket.batch <= self.newest + self.lag
            assert ticket.worlds == tuple(sorted(set(ticket.worlds)))
            assert self.book.owes(peer, ticket)
            assert peer in self.getters()
            self.seen = max(self.seen, ticket.batch)
        self.out += orders
        self.issued += len(orders)
        if not self.indices.keys() - self.leaving:
            assert not orders
            return
        moving = self.moving().keys()
        kept = {world for member in self.book.members if member.leaving for world in member.worlds}
        assert not (kept and self.seen > opened)  # a batch that is opened takes the worlds of leavers with it
        # Nothing waits for a later call: all that may be out is out, but for what a leaver that is about to go owns
        # and what is on its way from one actor to another.
        assert self.seen == self.newest + self.lag or len(moving) == self.worlds
        for batch in range(self.newest, self.newest + self.lag + 1):
            assert set(self.worlds_of(batch)) | kept | moving == set(range(self.worlds))

    def worlds_of(self, batch: int) -> list[int]:
        """The worlds of a batch that are out or placed, each as often as it is."""
        tickets = [ticket for _, ticket in self.out if ticket.batch == batch] + self.placed.get(batch, [])
        return [world for ticket in tickets for world in ticket.worlds]

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self.answer(data.draw(st.sampled_from(self.out)))

    def answer(self, order: tuple[bytes, Ticket]) -> None:
        self.out.remove(order)
        peer, ticket = order
        self.placed.setdefault(ticket.batch, []).append(ticket)
        assert self.book.accept(peer, ticket) == self.is_complete(ticket.batch)
        assert not self.book.owes(peer, ticket)

    def is_complete(self, batch: int) -> bool:
        """Whether every world of the batch has come, and none of them twice."""
        placed = sorted(world for ticket in self.placed.get(batch, []) for world in ticket.worlds)
        assert placed == sorted(set(placed))
        return placed == list(range(self.worlds))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), reason=st.sampled_from(["shape", "final"]))
    def reject(self, data: st.DataObject, reason: str) -> None:
        peer, ticket = data.draw(st.sampled_from(self.out))
        self.out.remove((peer, ticket))
        self.rejected[reason] += 1
        self.tried.update((ticket.batch, world) for world in ticket.worlds)
        again = max(self.tried[ticket.batch, world] for world in ticket.worlds) <= 2
        assert self.book.reject(peer, ticket, reason) == again
        if not again:  # the collector sends such an actor away
            self.lose(peer)

    @precondition(lambda self: self.is_complete(self.newest))
    @rule(warm_up=st.booleans())
    def finish(self, warm_up: bool) -> None:
        answers = len(self.placed.pop(self.newest))
        self.book.finish(self.newest, "warm-up" if warm_up else None)
        if warm_up:
            self.rejected["warm-up"] += answers
        else:
            self.trained += answers
        self.newest += 1

    @invariant()
    def the_books_balance_and_are_right(self) -> None:
        waiting = sum(len(tickets) for tickets in self.placed.values())
        books = self.book.books()
        assert books == Books(self.issued, self.trained, dict(self.rejected), self.lost, len(self.out) + waiting)
        assert books.balanced

    @invariant()
    def at_most_lag_plus_one_batches_are_open(self) -> None:
        numbers = {ticket.batch for _, ticket in self.out} | set(self.placed)
        assert len(numbers) <= self.lag + 1
        assert all(self.newest <= number <= self.newest + self.lag for number in numbers)

    @invariant()
    def no_world_of_a_batch_is_out_twice(self) -> None:
        for batch in range(self.newest, self.newest + self.lag + 1):
            worlds = self.worlds_of(batch)
            assert len(worlds) == len(set(worlds))

    @invariant()
    def members_stand_by_index_and_share_the_worlds(self) -> None:
        members = self.book.members
        assert [(member.peer, member.index) for member in members] == sorted(
            self.indices.items(), key=lambda item: item[1]
        )
        owned = [world for member in members for world in member.worlds]
        assert len(owned) == len(set(owned))
        assert {member.peer for member in members if member.leaving} == self.leaving
        assert {member.peer for member in members if member.relieved} == self.relieved
        assert all(self.book.owing(member.peer) == bool(member.outstanding) for member in members)
        assert not self.book.owing(b"nobody")

    @invariant()
    def leavers_go_once_they_owe_nothing(self) -> None:
        owing = {peer for peer, _ in self.out} | set(self.moving().values())
        if self.indices.keys() - self.leaving:
            owing |= {member.peer for member in self.book.members if member.worlds}  # to be handed over
        assert set(self.book.retired()) == self.leaving - owing

    @invariant()
    def what_moves_is_counted(self) -> None:
        assert self.book.worlds_restarted + len(self.moving()) <= self.book.worlds_moved

    def teardown(self) -> None:
        """However it stands, with one actor that stays and answers the run goes on; leavers finish, or they vanish."""
        if not self.indices.keys() - self.leaving:
            self.join(6)
        for turn in range(self.lag + 2):
            while not self.is_complete(self.newest):
                self.send_home()
                self.due()
                for world in self.moving():
                    self.book.arrive(world, whole=True)
                self.due()
                waited_for = [order for order in self.out if order[1].batch == self.newest]
                owed = waited_for or [order for order in self.out if order[0] in self.leaving]
                assert owed, "nothing is out, and nothing will ever be"
                if turn == 0 and self.newest % 2 and owed[0][0] in self.leaving:
                    self.lose(owed[0][0])
                else:
                    self.answer(owed[0])
            self.finish(False)
            self.the_books_balance_and_are_right()
        for world in self.moving():
            self.book.arrive(world, whole=True)
        self.send_home()
        self.due()
        assert not self.leaving


TicketWalk.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_any_walk_keeps_the_books = TicketWalk.TestCase


def book_with(*indices: int, worlds: int = 4, lag: int = 1, first: int = 0) -> TicketBook:
    book = TicketBook(worlds, lag, first)
    for index in indices:
        book.join(b"%d" % index, index)
    return book


def owned(book: TicketBook) -> dict[int, list[int]]:
    return {member.index: member.worlds for member in book.members}


def hand_over(book: TicketBook) -> dict[bytes, tuple[int, ...]]:
    """Let every state arrive that was asked for; who gave which."""
    asked = dict(book.handovers())
    for peer, worlds in asked.items():
        for world in worlds:
            assert book.gives(peer, world)
            book.arrive(world, whole=True)
    return asked


def answer_all(book: TicketBook, orders: list[tuple[bytes, Ticket]]) -> list[int]:
    """The batches that these answers complete."""
    return [ticket.batch for peer, ticket in orders if book.accept(peer, ticket)]


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 7])
def test_batch_k_is_collected_under_version_k_minus_lag(lag: int, first: int) -> None:
    book = book_with(0, 1, lag=lag, first=first)
    versions: dict[int, int] = {}
    for newest in range(first, first + 6):
        orders = book.due(newest)
        assert {ticket.batch for _, ticket in orders} == (
            set(range(first, first + lag + 1)) if newest == first else {newest + lag}
        )
        versions |= {ticket.batch: ticket.policy_version for _, ticket in orders}
        answer_all(book, orders)
        book.finish(newest)
    assert versions == {k: max(first, k - lag) for k in range(first, first + 6 + lag)}


def test_the_version_of_a_batch_does_not_depend_on_when_it_is_issued() -> None:
    book = book_with(0, lag=1)
    answer_all(book, book.due(0))
    book.finish(0)
    book.finish(1)  # before anybody asked again
    assert [(ticket.batch, ticket.policy_version) for _, ticket in book.due(2)] == [(2, 1), (3, 2)]


def test_nothing_is_due_without_actors_and_nothing_twice() -> None:
    book = book_with()
    assert book.due(0) == []
    book.join(b"0", 0)
    assert len(book.due(0)) == 2
    assert book.due(0) == []


def test_an_actor_that_joins_gets_worlds_at_the_next_batch_edge() -> None:
    book = book_with(0, lag=0)
    first = book.due(0)
    book.join(b"1", 1)
    assert book.due(0) == []  # the open batch stays with its owner
    answer_all(book, first)
    book.finish(0)
    assert book.due(1) == [(b"0", Ticket(1, 1, (0, 1)))]  # the others wait for their state
    assert book.owner(2) == b"1"
    assert hand_over(book) == {b"0": (2, 3)}
    assert book.due(1) == [(b"1", Ticket(1, 1, (2, 3)))]
    assert (book.worlds_moved, book.worlds_restarted) == (2, 0)


def test_the_ticket_of_a_dead_actor_is_lost_and_its_worlds_go_out_at_once() -> None:
    book = book_with(0, 1, worlds=4, lag=1)
    orders = book.due(0)
    (done,) = [order for order in orders if order[0] == b"1" and order[1].batch == 0]
    book.accept(*done)
    book.leave(b"1")
    assert book.books() == Books(issued=4, trained=0, rejected={}, lost=1, outstanding=3)
    assert book.due(0) == [(b"0", Ticket(batch=1, policy_version=0, worlds=(2, 3)))]
    assert book.worlds_moved == 2
    rest = [order for order in orders if order[0] == b"0"]
    assert answer_all(book, [*rest, (b"0", Ticket(1, 0, (2, 3)))]) == [0, 1]


def test_a_stranger_that_leaves_or_retires_changes_nothing() -> None:
    book = book_with(0)
    book.due(0)
    before = book.books()
    book.leave(b"nobody")
    book.retire(b"nobody")
    assert book.retired() == []
    assert book.books() == before
    assert owned(book) == {0: [0, 1, 2, 3]}


def test_a_leaver_finishes_its_tickets_and_its_worlds_move_with_the_next_batch_that_is_opened() -> None:
    book = book_with(0, 1, 2, worlds=6, lag=1)
    orders = book.due(0)
    book.retire(b"1")
    assert book.due(0) == []
    assert owned(book) == {0: [0, 1], 1: [2, 3], 2: [4, 5]}  # what is open stays with who has it
    assert answer_all(book, [order for order in orders if order[1].batch == 0]) == [0]
    book.finish(0)
    assert book.retired() == []
    assert book.due(1) == [(b"0", Ticket(2, 1, (0, 1))), (b"2", Ticket(2, 1, (4, 5)))]
    assert hand_over(book) == {b"1": (2, 3)}
    assert book.due(1) == [(b"0", Ticket(2, 1, (2,))), (b"2", Ticket(2, 1, (3,)))]
    assert book.worlds_moved == 2  # its own; the others keep theirs
    assert owned(book)[1] == []
    assert answer_all(book, [order for order in orders if order[1].batch == 1]) == [1]
    assert book.retired() == [b"1"]
    book.leave(b"1")
    assert book.due(1) == []
    assert book.worlds_moved == 2
    assert book.books() == Books(issued=10, trained=3, rejected={}, lost=0, outstanding=7)


def test_a_leaver_that_owes_nothing_goes_at_once() -> None:
    book = book_with(0, 1, lag=0)
    book.retire(b"1")  # before the first ticket
    assert book.retired() == [b"1"]
    assert book.due(0) == [(b"0", Ticket(0, 0, (0, 1, 2, 3)))]
    book.leave(b"1")
    assert book.due(0) == []
    assert book.worlds_moved == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_refused_rollout_of_a_leaver_goes_to_who_stays(lag: int) -> None:
    book = book_with(0, 1, lag=lag)
    orders = book.due(0)
    book.retire(b"1")
    mine = [order for order in orders if order[0] == b"1"]
    assert book.reject(*mine[0], "shape")
    assert book.due(0) == []  # it has the worlds as they stand after that batch, and they are asked for
    for order in mine[1:]:
        book.accept(*order)
    assert book.retired() == []
    assert hand_over(book) == {b"1": (2, 3)}
    assert book.retired() == [b"1"]
    book.leave(b"1")
    assert book.due(0) == [(b"0", Ticket(0, 0, (2, 3)))]
    issued = 2 * (lag + 1) + 1
    assert book.books() == Books(issued, trained=0, rejected={"shape": 1}, lost=0, outstanding=issued - 1)


@pytest.mark.parametrize("answered", [True, False], ids=["it has gone", "it still owes"])
def test_who_comes_after_the_only_actor_retired_gets_every_world(answered: bool) -> None:
    book = book_with(0, lag=1)
    orders = book.due(0)
    book.retire(b"0")
    book.accept(*orders[0])
    book.finish(0)
    assert book.due(1) == []  # there is nobody who could have it
    if answered:
        book.accept(*orders[1])
        assert book.retired() == [b"0"]
        book.leave(b"0")
    book.join(b"1", 1)
    orders = [*orders, *book.due(1)]
    assert hand_over(book) == ({} if answered else {b"0": (0, 1, 2, 3)})
    assert [*orders[2:], *book.due(1)] == [(b"1", Ticket(2, 1, (0, 1, 2, 3)))]
    if not answered:
        book.accept(*orders[1])
        assert book.retired() == [b"0"]
        book.leave(b"0")
        assert owned(book) == {1: [0, 1, 2, 3]}
    assert book.books() == Books(issued=3, trained=1, rejected={}, lost=0, outstanding=2)


def test_a_giver_that_dies_or_does_not_answer_is_not_waited_for() -> None:
    book = book_with(0, 1, worlds=4, lag=0)
    answer_all(book, book.due(0))
    book.finish(0)
    book.retire(b"1")
    assert book.due(1) == [(b"0", Ticket(1, 1, (0, 1)))]
    assert book.retired() == []  # it owes no ticket, but two worlds
    book.arrive(2, whole=False)
    assert book.due(1) == [(b"0", Ticket(1, 1, (2,)))]
    book.leave(b"1")
    assert book.due(1) == [(b"0", Ticket(1, 1, (3,)))]
    assert (book.worlds_moved, book.worlds_restarted) == (2, 2)
    book.arrive(3, whole=True)  # late, and of no account
    assert book.worlds_restarted == 2


def test_a_world_that_moves_on_before_its_state_came_gets_it_where_it_is() -> None:
    book = book_with(0, worlds=2, lag=0)
    answer_all(book, book.due(0))
    book.finish(0)
    book.join(b"1", 1)
    assert book.due(1) == [(b"0", Ticket(1, 1, (0,)))]
    book.leave(b"1")  # it was to have world 1, whose state is still to come
    assert book.due(1) == []
    assert book.owner(1) == b"0"
    assert hand_over(book) == {b"0": (1,)}
    assert book.due(1) == [(b"0", Ticket(1, 1, (1,)))]
    assert book.worlds_restarted == 0


def test_everyone_may_retire_and_what_was_refused_waits_for_the_next_to_come() -> None:
    book = book_with(0, 1, lag=0)
    first, second = book.due(0)
    book.retire(b"0")
    book.retire(b"1")
    assert book.reject(*first, "shape")
    assert book.retired() == [b"0"]
    book.leave(b"0")
    assert book.due(0) == []
    book.join(b"2", 2)
    assert book.due(0) == [(b"2", Ticket(0, 0, (0, 1)))]
    book.accept(*second)
    book.leave(b"1")
    assert book.accept(b"2", Ticket(0, 0, (0, 1)))
    assert book.books() == Books(issued=3, trained=0, rejected={"shape": 1}, lost=0, outstanding=2)


def test_a_leaver_that_vanishes_loses_what_it_owed() -> None:
    book = book_with(0, 1, lag=0)
    book.due(0)
    book.retire(b"1")
    book.leave(b"1")
    assert book.due(0) == [(b"0", Ticket(0, 0, (2, 3)))]
    assert book.books() == Books(issued=3, trained=0, rejected={}, lost=1, outstanding=2)


def test_an_actor_that_comes_after_all_have_gone_gets_the_open_batches() -> None:
    book = book_with(0, 1, lag=1)
    orders = book.due(0)
    book.accept(*orders[0])
    book.leave(b"0")
    book.leave(b"1")
    assert book.due(0) == []
    book.join(b"again", 0)
    assert book.due(0) == [(b"again", Ticket(0, 0, (2, 3))), (b"again", Ticket(1, 0, (0, 1, 2, 3)))]
    assert book.books() == Books(issued=6, trained=0, rejected={}, lost=3, outstanding=3)
    assert book.worlds_moved >= 4  # none has its owner of before


def test_a_refused_ticket_is_issued_twice_again_and_no_more() -> None:
    book = book_with(0, 1, lag=0)
    order = book.due(0)[0]
    for _ in range(MAX_REISSUES):
        assert book.reject(*order, "shape")
        assert book.due(0) == [order]
    assert MAX_REISSUES == 2
    assert not book.reject(*order, "shape")
    assert book.books() == Books(issued=4, trained=0, rejected={"shape": 3}, lost=0, outstanding=1)
    book.leave(b"0")
    assert book.due(0) == [(b"1", Ticket(0, 0, (0, 1)))]


def test_an_answer_is_owed_exactly_as_it_was_asked_for() -> None:
    book = book_with(0, 1)
    (peer, ticket), *_ = book.due(0)
    assert book.owes(peer, ticket)
    assert not book.owes(b"1", ticket)
    assert not book.owes(b"nobody", ticket)
    assert not book.owes(peer, Ticket(ticket.batch, ticket.policy_version + 1, ticket.worlds))
    assert not book.owes(peer, Ticket(ticket.batch, ticket.policy_version, ticket.worlds[:1]))
    book.accept(peer, ticket)
    assert not book.owes(peer, ticket)


def test_a_warm_up_batch_is_rejected_in_the_books() -> None:
    book = book_with(0, 1, lag=0)
    answer_all(book, book.due(0))
    book.finish(0, "warm-up")
    assert book.books() == Books(issued=2, trained=0, rejected={"warm-up": 2}, lost=0, outstanding=0)


def test_books_that_do_not_add_up_say_so() -> None:
    assert Books(issued=5, trained=1, rejected={"shape": 1, "final": 1}, lost=1, outstanding=1).balanced
    assert not Books(issued=5, trained=1, rejected={"shape": 1}, lost=1, outstanding=1).balanced


def test_more_actors_than_worlds_idle() -> None:
    book = book_with(0, 1, 2, 3, worlds=2)
    assert owned(book) == {0: [], 1: [], 2: [], 3: []}
    orders = book.due(0)
    assert owned(book) == {0: [0], 1: [1], 2: [], 3: []}
    assert {peer for peer, _ in orders} == {b"0", b"1"}
    book.leave(b"0")  # and stand in at once
    assert owned(book) == {1: [1], 2: [0], 3: []}
    assert {(peer, ticket.worlds) for peer, ticket in book.due(0)} == {(b"2", (0,))}


def test_the_first_assignment_moves_nothing() -> None:
    book = book_with(0, 1, 2)
    book.due(0)
    assert owned(book) == {0: [0, 1], 1: [2], 2: [3]}
    assert book.worlds_moved == 0


def owners_of(assignment: dict[int, list[int]]) -> dict[int, int]:
    return {world: index for index, worlds in assignment.items() for world in worlds}


def every_ownership(worlds: int, indices: tuple[int, ...]) -> list[dict[int, list[int]]]:
    """Every way in which worlds can have an owner or, because it has gone, none."""
    ways = []
    for owners in itertools.product([*indices, None], repeat=worlds):
        ways.append({index: [w for w, owner in enumerate(owners) if owner == index] for index in indices})
    return ways


@pytest.mark.parametrize("worlds", range(1, 6))
@pytest.mark.parametrize("indices", [(0,), (0, 3), (1, 2, 5)])
def test_worlds_are_shared_evenly_and_as_few_as_possible_move(worlds: int, indices: tuple[int, ...]) -> None:
    def is_even(sizes: list[int]) -> bool:
        return max(sizes) - min(sizes) <= 1

    even = [
        owners
        for owners in itertools.product(indices, repeat=worlds)
        if is_even([owners.count(index) for index in indices])
    ]
    for before in every_ownership(worlds, indices):
        after = assign_worlds(worlds, before)
        assert sorted(after) == list(indices)
        assert sorted(owners_of(after)) == list(range(worlds))
        assert sum(len(of_one) for of_one in after.values()) == worlds
        assert is_even([len(of_one) for of_one in after.values()])
        assert all(of_one == sorted(of_one) for of_one in after.values())
        owner = owners_of(before)
        fewest = min(sum(owners[w] != owner.get(w) for w in range(worlds)) for owners in even)
        assert sum(index != owner.get(w) for w, index in owners_of(after).items()) == fewest, before


def test_assignment_follows_from_indices_and_ownership_alone() -> None:
    for before in every_ownership(4, (0, 2, 7)):
        shuffled = {index: before[index][::-1] for index in (7, 0, 2)}
        assert assign_worlds(4, shuffled) == assign_worlds(4, before)
        assert assign_worlds(4, assign_worlds(4, before)) == assign_worlds(4, before)  # even ones stay


def test_without_a_history_lower_indices_have_the_lower_worlds_and_larger_shares() -> None:
    assert assign_worlds(7, {4: [], 0: [], 2: []}) == {0: [0, 1, 2], 2: [3, 4], 4: [5, 6]}
    assert assign_worlds(1, {4: [], 0: []}) == {0: [0], 4: []}


def test_assignment_leaves_its_argument_as_it_is() -> None:
    before = {0: [3, 1, 0, 2], 1: []}
    assign_worlds(4, before)
    assert before == {0: [3, 1, 0, 2], 1: []}


def test_who_is_relieved_answers_no_more_and_its_worlds_go_out_at_once() -> None:
    book = book_with(0, 1, worlds=4, lag=1)
    orders = book.due(0)
    assert book.relieve(b"1")
    assert [book.owes(peer, ticket) for peer, ticket in orders] == [peer == b"0" for peer, _ in orders]
    assert owned(book) == {0: [0, 1, 2, 3], 1: []}
    assert book.due(0) == [(b"0", Ticket(0, 0, (2, 3))), (b"0", Ticket(1, 0, (2, 3)))]
    assert book.books() == Books(issued=6, trained=0, rejected={}, lost=2, outstanding=4)
    assert book.worlds_moved == 2
    assert book.retired() == []  # it stays
    assert book.relieve(b"1")  # once more is nothing
    assert book.books() == Books(issued=6, trained=0, rejected={}, lost=2, outstanding=4)


def test_the_last_one_is_not_relieved() -> None:
    book = book_with(0, 1)
    book.due(0)
    book.retire(b"1")
    before = book.books()
    assert not book.relieve(b"0")
    assert not book.relieve(b"nobody")
    assert book.books() == before
    assert owned(book)[0] == [0, 1]


def test_who_was_relieved_stands_in_when_nobody_else_is_left() -> None:
    book = book_with(0, 1, lag=0)
    book.due(0)
    book.relieve(b"1")
    book.due(0)
    book.leave(b"0")
    assert book.due(0) == [(b"1", Ticket(0, 0, (0, 1, 2, 3)))]


def test_of_two_that_were_relieved_one_can_be_relieved_again() -> None:
    """They stand in for who has gone; then the other is left with it all, and is one like any other."""
    book = book_with(0, 1, 2, lag=0)
    book.due(0)
    book.relieve(b"1")
    book.relieve(b"2")
    book.leave(b"0")
    assert owned(book) == {1: [0, 1], 2: [2, 3]}
    book.due(0)
    assert book.relieve(b"1")
    assert owned(book) == {1: [], 2: [0, 1, 2, 3]}
    assert {peer for peer, _ in book.due(0)} == {b"2"}
    assert [member.relieved for member in book.members] == [True, False]


def test_who_comes_while_those_relieved_stand_in_gets_what_is_missing() -> None:
    book = book_with(0, 1, lag=0)
    book.due(0)
    book.relieve(b"1")
    book.due(0)
    book.leave(b"0")  # its worlds are the other's now
    book.join(b"2", 2)  # before anybody asked what is due
    assert book.due(0) == [(b"2", Ticket(0, 0, (0, 1, 2, 3)))]
