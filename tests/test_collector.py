"""The receive thread against actors that misbehave: nothing hangs, and everything is accounted for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from clusters import poll
from msgspec.structs import replace

from rustyrl import configure
from rustyrl.channels import Received, RolloutReceiver, RolloutSender
from rustyrl.errors import ContractError
from rustyrl.rollout import RolloutOrigin, allocate_rollout
from rustyrl.weights import PolicySpec, encode_weights
from rustyrl.wire import (
    Fault,
    Goodbye,
    HandOver,
    Hello,
    Lease,
    Ready,
    Refusal,
    Rejoin,
    Snapshot,
    TicketMessage,
    WeightsHeader,
    Welcome,
    WorldState,
    encode_message,
    encode_rollout,
    encode_world_state,
)
from rustyrl_learner import collector as collector_module
from rustyrl_learner import roster
from rustyrl_learner.collector import Collector
from rustyrl_learner.gathering import Gathering, KeptWorld
from rustyrl_learner.network import ActorCritic, export_weights

LAYERS = {
    "run": {"env": "cartpole"},
    "env": {"slots": 2},
    "batch": {"worlds": 2, "unroll_length": 4, "max_policy_lag": 0},
    "cluster": {"lease_s": 0.5},
}
CONFIG, SPEC = configure(LAYERS)
POLICY = PolicySpec(SPEC.observation, SPEC.action, (4,), "tanh", normalize=False)
WEIGHTS = encode_weights(export_weights(ActorCritic(POLICY, shared=False, initial_log_std=0.0), None))


class Peer:
    """An actor whose every message the test writes."""

    def __init__(self, address: str, index: int, pid: int, host: str = "elsewhere") -> None:
        self.link = RolloutSender(address)
        self.index, self.pid, self.host = index, pid, host
        self.hello()
        self.welcome = self.next(Welcome)

    def hello(self) -> None:
        self.link.send(Hello(self.index, 100 + self.index, self.pid, self.host))

    def next(self, kind: Any) -> Any:
        """The next message, which is to be of a kind."""
        received = self._hear()
        assert received is not None, f"no {kind}"
        assert isinstance(received.message, kind), received.message
        return received.message

    def nothing(self) -> None:
        """There is no message but signs of life."""
        while (received := self.link.receive(0.0)) is not None:
            assert isinstance(received.message, Lease), received.message

    def nothing_while(self, thread: threading.Thread) -> None:
        """There is no message but signs of life until the thread has ended."""
        while thread.is_alive():
            received = self.link.receive(0.05)
            assert received is None or isinstance(received.message, Lease), received.message

    def _hear(self) -> Received | None:
        """The next message that is no sign of life."""
        while (received := self.link.receive(10.0)) is not None:
            if not isinstance(received.message, Lease):
                return received
        return None

    def ready(self) -> None:
        self.link.send(Ready(SPEC.fingerprint))

    def ticket(self) -> TicketMessage:
        """The next ticket, and the weights ahead of it if they come."""
        received = self._hear()
        assert received is not None
        if isinstance(received.message, WeightsHeader):
            return self.next(TicketMessage)
        assert isinstance(received.message, TicketMessage), received.message
        return received.message

    def frames(self, ticket: TicketMessage) -> tuple[bytes, bytearray]:
        """A valid answer."""
        origin = RolloutOrigin(SPEC.fingerprint, "main", ticket.ticket, 0, self.index, 100 + self.index)
        rollout = allocate_rollout(SPEC, 4, 2 * len(ticket.worlds), origin)
        for array in (rollout.observation["main"], rollout.action["main"], rollout.behavior_log_prob, rollout.reward):
            array[...] = 0
        rollout.terminated[...] = rollout.truncated[...] = False
        rollout.valid[...] = True
        header, blob = encode_rollout(rollout)
        return header, bytearray(blob)

    def hand_over(self, worlds: tuple[int, ...]) -> None:
        """Be asked for the state of these worlds, and have none."""
        assert self.next(HandOver).worlds == worlds
        for world in worlds:
            self.link.send(WorldState(world, 0, 0, ()))

    def answer(self, ticket: TicketMessage, *, broken: bool = False) -> None:
        header, blob = self.frames(ticket)
        if broken:  # the flags are bytes that are neither False nor True
            flags = np.frombuffer(blob, np.uint8)
            flags[len(flags) // 2 :] = 7
        self.link.send_frames(header, bytes(blob), 5.0).wait(5.0)


@pytest.fixture
def collector(tmp_path) -> Iterator[tuple[Collector, RolloutReceiver]]:
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    collector = Collector(receiver, SPEC, CONFIG, 0, 1, 0, WEIGHTS)
    collector.start()
    yield collector, receiver
    tickets = collector.close()["tickets"]
    assert tickets["issued"] == (
        tickets["trained"] + sum(tickets["rejected"].values()) + tickets["lost"] + tickets["outstanding"]
    )


def tickets(collector: Collector) -> dict[str, Any]:
    return collector.snapshot()["tickets"]


def test_an_answer_that_cannot_be_decoded_is_rejected_and_asked_for_again(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        peer.answer(peer.ticket(), broken=True)
        peer.answer(peer.ticket())  # the same worlds once more
        assert thread.next_batch(10.0) is not None
        poll(lambda: tickets(thread)["rejected"] == {"malformed": 1}, "the rejection in the books")


def test_an_actor_whose_answers_are_refused_three_times_is_sent_away(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        for _ in range(3):
            peer.answer(peer.ticket(), broken=True)
        assert "refused three times" in peer.next(Refusal).reason
        poll(lambda: not thread.snapshot()["actors"], "no actor")


def test_a_second_ready_changes_nothing(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        ticket = peer.ticket()
        peer.link.send(Ready(SPEC.fingerprint))
        peer.answer(ticket)
        assert thread.next_batch(10.0) is not None
        assert thread.snapshot()["refused_messages"] == {}
        assert len(thread.snapshot()["actors"]) == 1


def test_who_says_hello_again_has_lost_its_connection_and_with_it_its_tickets(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        old = peer.ticket()
        peer.hello()
        peer.hello()  # it was not answered at once
        assert [peer.next(Welcome).index, peer.next(Welcome).index] == [0, 0]
        peer.link.send(Ready(SPEC.fingerprint))
        new = peer.ticket()
        assert (new.batch, new.worlds) == (old.batch, old.worlds)
        peer.answer(new)
        assert thread.next_batch(10.0) is not None
        poll(lambda: tickets(thread)["lost"] == 1, "what was out to be lost")
        assert thread.snapshot()["refused_messages"] == {"second-hello": 2}
        assert len(thread.snapshot()["actors"]) == 1


def test_an_index_is_given_to_another_once_its_owner_is_known_to_be_dead(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 3, 1)
    with peer.link, RolloutSender(receiver.address) as other:
        other.send(Hello(3, 8, 8, "elsewhere"))
        poll(lambda: thread.snapshot()["refused_messages"] == {"index-taken": 1}, "the count")
        thread.report_death(100 + peer.index)
        poll(lambda: not thread.snapshot()["actors"], "it to be given up")
        other.send(Lease())  # who was not answered asks again
        received = other.receive(10.0)
        assert received is not None
        assert isinstance(received.message, Rejoin)
        other.send(Hello(3, 8, 8, "elsewhere"))
        received = other.receive(10.0)
        assert received is not None
        assert isinstance(received.message, Welcome)


def test_an_actor_that_waits_although_it_owes_an_answer_is_lost_and_told(collector):
    """Its ticket never reached it: its leases must not keep the batch waiting for ever."""
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        assert peer.ticket().worlds == (0, 1)

        def lost() -> bool:
            peer.link.send(Lease())
            return tickets(thread)["lost"] == 1

        poll(lost, "the ticket to be given up")
        peer.link.send(Lease())  # those before may have come before it was
        assert peer.next(Rejoin)
        peer.hello()
        while isinstance(peer.next(Rejoin | Welcome), Rejoin):  # an answer to each lease
            pass
    other = Peer(receiver.address, 1, 2)
    with other.link:
        other.ready()
        other.answer(other.ticket())
        buffer = thread.next_batch(10.0)
        assert buffer is not None
        assert buffer.number == 0


def test_an_idle_actor_that_says_so_is_kept(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        peer.answer(peer.ticket())
        assert thread.next_batch(10.0) is not None
        leases = 0

        def aged() -> bool:
            nonlocal leases
            peer.link.send(Lease())
            leases += 1
            return leases > 150  # of 10 ms and more each: three times the lease

        poll(aged, "time to pass")
        assert [actor["index"] for actor in thread.snapshot()["actors"]] == [0]


def test_a_leaver_answers_what_it_owes_is_sent_home_and_loses_nothing(collector):
    thread, receiver = collector
    peer, namesake = Peer(receiver.address, 0, 1), Peer(receiver.address, 1, 1)
    with peer.link, namesake.link:
        peer.ready()
        ticket = peer.ticket()
        namesake.ready()
        poll(lambda: [a["index"] for a in thread.snapshot()["actors"] if a["ready"]] == [0, 1], "both")
        thread.retire(100)
        thread.retire(99)  # which nobody is
        peer.answer(ticket)
        buffer = thread.next_batch(10.0)
        assert buffer is not None
        thread.publish(buffer, 1, WEIGHTS)
        peer.hand_over((0, 1))
        worlds = namesake.ticket().worlds
        tickets_after = 1 if worlds == (0, 1) else 2  # one for each world, if the other was still on its way
        if tickets_after == 2:
            worlds += namesake.ticket().worlds
        assert worlds == (0, 1)
        poll(lambda: [actor["index"] for actor in thread.snapshot()["actors"]] == [1], "one to be gone")
        books = {"issued": 1 + tickets_after, "trained": 1, "rejected": {}, "lost": 0, "outstanding": tickets_after}
        poll(lambda: tickets(thread) == books, "the books")


def test_a_leaver_whose_answer_is_refused_is_sent_home_and_another_asked(collector):
    thread, receiver = collector
    peer, other = Peer(receiver.address, 0, 1), Peer(receiver.address, 1, 2)
    with peer.link, other.link:
        peer.ready()
        ticket = peer.ticket()
        other.ready()
        poll(lambda: [a["index"] for a in thread.snapshot()["actors"] if a["ready"]] == [0, 1], "both")
        thread.retire(100)
        peer.answer(ticket, broken=True)
        peer.hand_over((0, 1))
        assert peer.next(Goodbye)
        first = other.ticket()
        other.answer(first)
        if first.worlds != (0, 1):
            other.answer(other.ticket())
        assert thread.next_batch(10.0) is not None
        out = 1 if first.worlds == (0, 1) else 2
        books = {"issued": 1 + out, "trained": 0, "rejected": {"malformed": 1}, "lost": 0, "outstanding": out}
        poll(lambda: tickets(thread) == books, "the books")


def test_a_fault_of_the_world_ends_the_run_with_its_text(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        peer.ticket()
        peer.link.send(Fault("world 0 of 'cartpole', slot 1: reward holds nan"))
        with pytest.raises(ContractError, match="world 0 of 'cartpole', slot 1: reward holds nan"):
            thread.next_batch(10.0)


def test_a_fault_of_who_has_not_joined_ends_nothing(collector):
    thread, receiver = collector
    with RolloutSender(receiver.address) as stranger:
        stranger.send(Fault("whatever it says"))
        poll(lambda: thread.snapshot()["refused_messages"] == {"unexpected-fault": 1}, "the count")
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.link.send(Fault("whatever it says"))
        peer.ready()
        peer.answer(peer.ticket())
        assert thread.next_batch(10.0) is not None


def test_a_stranger_is_told_to_say_hello(collector):
    thread, receiver = collector
    with RolloutSender(receiver.address) as stranger:
        stranger.send(Lease())
        received = stranger.receive(10.0)
        assert received is not None
        assert isinstance(received.message, Rejoin)
        poll(lambda: thread.snapshot()["refused_messages"] == {"unknown-peer": 1}, "the count")


def test_another_wire_version_is_refused_with_what_to_do(collector):
    _, receiver = collector
    with RolloutSender(receiver.address) as link:
        header = bytearray(encode_message(Hello(0, 1, 2, "here")))
        header[1] = 99  # [version, body]: a fixarray, then the version as a positive fixint
        link.send_frames(bytes(header), b"", 5.0)
        received = link.receive(10.0)
        assert received is not None
        assert isinstance(received.message, Refusal)
        assert "install that rustyrl here, too" in received.message.reason


def test_a_death_before_hello_does_not_keep_the_first_batch_waiting(tmp_path):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    thread = Collector(receiver, SPEC, CONFIG, 0, 2, 0, WEIGHTS)
    thread.start()
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        thread.report_death(12345)
        thread.report_death(12345)
        assert peer.ticket().worlds == (0, 1)
    thread.close()


class Clock:
    """Stands for the module ``time``: time goes on as always, and by what the test adds."""

    def __init__(self) -> None:
        self.added_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.added_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (collector_module, roster):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def patient(tmp_path, clock) -> Iterator[tuple[Collector, RolloutReceiver]]:
    """A lease of 30 s, that is over when the test says so."""
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, lease_s=30.0))
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    collector = Collector(receiver, SPEC, config, 0, 1, 0, WEIGHTS)
    collector.start()
    yield collector, receiver
    collector.close()


def turn(thread: Collector) -> None:
    """Wait until the receive thread has looked at everything once more."""
    for _ in range(2):  # the one under way may have been past it
        before = thread.snapshot()
        thread._receiver.wake()
        poll(lambda before=before: thread.snapshot() is not before, "a turn")


def pass_time(thread: Collector, clock: Clock, seconds: float) -> None:
    """Let time pass in steps so small that the thread does not take itself to have stood still."""
    while seconds > 0:
        clock.added_s += min(seconds, 0.7)
        seconds -= 0.7
        turn(thread)


def outlive_lease(thread: Collector, clock: Clock, index: int) -> None:
    """Let time pass until an actor is given up: a lease at most, and what this machine stood still."""

    def gone() -> bool:
        pass_time(thread, clock, 1.0)
        return index not in indices(thread)

    poll(gone, f"the end of the lease of {index}")


def indices(thread: Collector) -> list[int]:
    return [actor["index"] for actor in thread.snapshot()["actors"]]


@pytest.mark.parametrize("what", ["ready", "answer"])
def test_whatever_a_stranger_says_but_hello_it_is_told_to_say_that(collector, what):
    """It belongs to the learner before this one."""
    thread, receiver = collector
    with RolloutSender(receiver.address) as stranger:
        if what == "ready":
            stranger.send(Ready(SPEC.fingerprint))
        else:
            peer = Peer.__new__(Peer)
            peer.index = 0
            header, blob = peer.frames(TicketMessage(0, 3, 3, (0, 1)))
            stranger.send_frames(header, bytes(blob), 5.0)
        received = stranger.receive(10.0)
        assert received is not None
        assert isinstance(received.message, Rejoin)
        poll(lambda: thread.snapshot()["refused_messages"] == {"unknown-peer": 1}, "the count")


def test_a_slow_actor_whose_leases_count_steps_is_kept(patient, clock):
    thread, receiver = patient
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        ticket = peer.ticket()
        for steps in range(1, 4):
            pass_time(thread, clock, 20.0)
            peer.link.send(Lease(steps))
            turn(thread)
            poll(lambda: thread.snapshot()["actors"][0]["silent_s"] < 5, "the lease")
        assert indices(thread) == [0]
        assert thread.snapshot()["silent"] == []
        peer.answer(ticket)
        assert thread.next_batch(10.0) is not None


def test_a_stuck_actor_whose_leases_count_no_more_steps_is_given_up(patient, clock):
    thread, receiver = patient
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        peer.ticket()
        peer.link.send(Lease(7))
        turn(thread)
        for _ in range(2):
            pass_time(thread, clock, 12.0)
            peer.link.send(Lease(7))
        assert indices(thread) == [0]
        outlive_lease(thread, clock, 0)
        assert clock.added_s < 45
        assert thread.snapshot()["silent"] == [100]
        assert tickets(thread)["lost"] == 1
        peer.hello()  # it was only very slow
        poll(lambda: indices(thread) == [0], "its return")
        assert thread.snapshot()["silent"] == []


def test_who_joined_by_hand_gets_an_index_that_no_launcher_gives(collector):
    _, receiver = collector
    given, peers = [], []
    for index in (-1, 0, -1, 1001, -1):
        if index == 1001:
            assert given[-1] == 1001
            peers[0].link.close()  # the first
            peers[0] = Peer(receiver.address, 5, 9)
            continue
        peers.append(Peer(receiver.address, index, 1))
        given.append(peers[-1].welcome.index)
    assert given[:3] == [roster.FIRST_BY_HAND, 0, roster.FIRST_BY_HAND + 1]
    assert given[3] in (roster.FIRST_BY_HAND, roster.FIRST_BY_HAND + 2)  # the first may still be there
    assert roster.FIRST_BY_HAND == 1000
    for peer in peers:
        peer.link.close()


def test_what_a_process_said_before_it_ended_is_of_no_account(collector):
    thread, receiver = collector
    thread.report_death(100)
    turn(thread)
    with RolloutSender(receiver.address) as link:
        link.send(Hello(0, 100, 1, "elsewhere"))
        turn(thread)
        assert indices(thread) == []
        link.send(Hello(0, 101, 2, "elsewhere"))  # its successor's
        received = link.receive(10.0)
        assert received is not None
        assert isinstance(received.message, Welcome)


def test_actors_hear_that_the_learner_lives(patient, clock):
    thread, receiver = patient
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        turn(thread)
        assert peer.link.receive(0.0) is None
        for _ in range(2):
            pass_time(thread, clock, roster.PROBE_S)
            received = peer.link.receive(10.0)
            assert received is not None
            assert isinstance(received.message, Lease)
        leases = 1  # one may come while this machine is slow
        turn(thread)
        while peer.link.receive(0.0) is not None:
            leases += 1
        assert leases <= 2


def test_who_has_gone_without_a_word_is_missed_by_the_next_probe(patient, clock):
    """And not only when its lease is over."""
    thread, receiver = patient
    peer, other = Peer(receiver.address, 0, 1), Peer(receiver.address, 1, 2)
    with other.link:
        peer.ready()
        peer.ticket()
        other.ready()
        peer.link.close()

        def missed() -> bool:
            pass_time(thread, clock, roster.PROBE_S)
            return indices(thread) == [1]

        poll(missed, "the one that has gone")
        assert clock.added_s < 25.0
        assert thread.snapshot()["silent"] == []
        assert other.ticket().worlds == (0, 1)


def test_after_the_receive_thread_stood_still_nobody_is_given_up_for_it(patient, clock):
    """The machine slept, or the process was stopped: what actors said meanwhile is still to be read."""
    thread, receiver = patient
    peer, other = Peer(receiver.address, 0, 1), Peer(receiver.address, 1, 2)
    with peer.link, other.link:
        peer.ready()
        other.ready()
        poll(lambda: all(actor["ready"] for actor in thread.snapshot()["actors"]), "both")
        pass_time(thread, clock, 10.0)
        clock.added_s += 1000.0
        peer.link.send(Lease(1))
        turn(thread)
        turn(thread)
        silent = {actor["index"]: actor["silent_s"] for actor in thread.snapshot()["actors"]}
        assert 0 <= silent[0] < 5  # it was heard now, and not in times to come
        assert 7 < silent[1] < 15  # the standstill is no silence of its
        outlive_lease(thread, clock, 1)
        assert indices(thread) == [0]
        outlive_lease(thread, clock, 0)
        assert clock.added_s < 1000 + 10 + 45


def test_the_worlds_of_who_is_relieved_go_to_the_others_at_once(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        ticket = peer.ticket()
        other = Peer(receiver.address, 1, 2)
        with other.link:
            other.ready()
            poll(lambda: [a["ready"] for a in thread.snapshot()["actors"]] == [True, True], "both")
            shown = thread.snapshot()["actors"][0]
            assert (shown["holds"], shown["relieved"], shown["worlds"]) == (True, False, 2)
            assert thread.snapshot()["actors"][1]["holds"] is False
            assert thread.snapshot()["actors"][1]["owes_s"] == 0.0
            thread.relieve(99)  # which nobody is
            thread.relieve(100)
            again = other.ticket()
            assert again.ticket == ticket.ticket
            turn(thread)
            shown = thread.snapshot()["actors"][0]
            assert (shown["holds"], shown["relieved"], shown["worlds"], shown["owes_s"]) == (False, True, 0, 0.0)
            peer.answer(ticket)  # too late
            poll(lambda: thread.snapshot()["refused_messages"] == {"ticket": 1}, "the late answer")
            other.answer(again)
            buffer = thread.next_batch(10.0)
            assert buffer is not None
            thread.publish(buffer, 1, WEIGHTS)
            assert other.ticket().worlds == (0, 1)
            peer.nothing()
            books = {"issued": 3, "trained": 1, "rejected": {}, "lost": 1, "outstanding": 1}
            poll(lambda: tickets(thread) == books, "the books")


def test_what_an_actor_owes_is_shown_until_it_has_answered(patient, clock):
    thread, receiver = patient
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        ticket = peer.ticket()
        pass_time(thread, clock, 3.0)
        shown = thread.snapshot()["actors"][0]
        assert shown["holds"]
        assert 3.0 <= shown["owes_s"] < 20.0
        peer.answer(ticket)
        poll(lambda: thread.snapshot()["actors"][0]["rollouts"] == 1, "the answer")
        pass_time(thread, clock, 3.0)
        shown = thread.snapshot()["actors"][0]
        assert (shown["holds"], shown["owes_s"]) == (False, 0.0)


def test_the_only_actor_is_not_relieved(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        ticket = peer.ticket()
        thread.relieve(100)
        turn(thread)
        shown = thread.snapshot()["actors"][0]
        assert (shown["holds"], shown["relieved"], shown["worlds"]) == (True, False, 2)
        peer.answer(ticket)
        assert thread.next_batch(10.0) is not None


@pytest.mark.parametrize("goodbye", [True, False])
def test_actors_are_told_that_the_run_is_over_unless_another_learner_follows(tmp_path, goodbye):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    thread = Collector(receiver, SPEC, CONFIG, 0, 2, 0, WEIGHTS)
    thread.start()
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        closing = threading.Thread(target=thread.close, kwargs={"goodbye": goodbye})
        closing.start()
        if goodbye:
            assert peer.next(Goodbye)
            peer.link.send(Goodbye())
        else:
            peer.nothing_while(closing)  # what it has not read when the connection closes is lost to it
        closing.join(10.0)
        assert not closing.is_alive()


def test_when_the_receive_thread_breaks_actors_wait_for_another_learner(patient, monkeypatch):
    thread, receiver = patient
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        monkeypatch.setattr(thread, "_check_start", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            thread.next_batch(10.0)
        peer.nothing_while(thread._thread)


# Worlds for checkpoints, and from them


def kept(world: int, batch: int, size: int = 3) -> KeptWorld:
    return encode_world_state(world, batch, 1, {"world.x": np.full(size, 10.0 * world)})


def send_copies(peer: Peer, batch: int, *, but: int = -1) -> None:
    """Answer the request for copies; one world without a state, if so wished."""
    for world in peer.next(Snapshot).worlds:
        state, blob = kept(world, batch)
        peer.link.send(*((WorldState(world, 0, 0, ()), b"") if world == but else (state, blob)))


@contextmanager
def one_batch(thread: Collector, receiver: RolloutReceiver, actors: int = 1) -> Iterator[list[Peer]]:
    """So many actors, whose first batch came in and is not answered yet."""
    with ExitStack() as stack:
        peers = [Peer(receiver.address, index, index + 1) for index in range(actors)]
        for peer in peers:
            stack.enter_context(peer.link)
        for peer in peers:
            peer.ready()
        for peer in peers:
            peer.answer(peer.ticket())
        assert thread.next_batch(10.0) is not None
        yield peers


def test_all_worlds_are_copied_by_their_owners(collector):
    thread, receiver = collector
    with one_batch(thread, receiver) as (peer,):
        gathering = thread.gather(1)
        send_copies(peer, 1)
        assert gathering.done.wait(10.0)
        assert gathering.end() == {0: kept(0, 1), 1: kept(1, 1)}


def test_a_world_without_a_state_is_not_waited_for(collector):
    thread, receiver = collector
    with one_batch(thread, receiver) as (peer,):
        gathering = thread.gather(1)
        send_copies(peer, 1, but=0)
        assert gathering.done.wait(10.0)
        assert gathering.end().keys() == {1}


def test_the_worlds_of_an_actor_that_dies_are_not_waited_for(tmp_path):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    thread = Collector(receiver, SPEC, CONFIG, 0, 2, 0, WEIGHTS)
    thread.start()
    with one_batch(thread, receiver, actors=2) as (first, second):
        gathering = thread.gather(1)
        send_copies(first, 1)
        assert second.next(Snapshot).worlds == (1,)
        assert not gathering.done.wait(0.2)
        thread.report_death(101)
        assert gathering.done.wait(10.0)
        assert gathering.end().keys() == {0}
    thread.close()


def test_a_copy_of_another_batch_or_from_another_actor_is_not_taken() -> None:
    gathering = Gathering(5)
    gathering.ask(b"a", (0, 1))
    for peer, world, batch in ((b"a", 0, 4), (b"b", 0, 5), (b"a", 2, 5)):
        state, blob = kept(world, batch)
        assert not gathering.take(peer, state, memoryview(blob))
    state, blob = kept(0, 5)
    assert gathering.take(b"a", state, memoryview(blob))
    gathering.lose(b"a")
    gathering.done.set()
    assert gathering.end() == {0: kept(0, 5)}
    state, blob = kept(1, 5)
    assert not gathering.take(b"a", state, memoryview(blob))  # it is over


def test_when_the_receive_thread_breaks_nobody_waits_for_copies(patient, monkeypatch):
    thread, receiver = patient
    with one_batch(thread, receiver) as (peer,):
        gathering = thread.gather(1)
        peer.next(Snapshot)
        monkeypatch.setattr(thread, "_check_start", lambda _: 1 / 0)
        assert gathering.done.wait(10.0)
        assert gathering.end() is None
        with pytest.raises(ZeroDivisionError):
            thread.next_batch(10.0)


def test_worlds_of_a_checkpoint_come_ahead_of_the_first_ticket_that_names_them(tmp_path):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    worlds = {1: kept(1, 7), 5: kept(5, 7)}  # the run has two worlds now
    thread = Collector(receiver, SPEC, CONFIG, 0, 1, 7, WEIGHTS, worlds=worlds)
    thread.start()
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        assert peer.next(WorldState) == kept(1, 7)[0]
        ticket = peer.ticket()
        assert (ticket.batch, ticket.worlds) == (7, (0, 1))
        poll(lambda: thread.snapshot()["worlds_restarted"] == 1, "world 0 to be counted")
        peer.answer(ticket)
        buffer = thread.next_batch(10.0)
        thread.publish(buffer, 8, WEIGHTS)
        assert peer.ticket().batch == 8  # and no world again
    thread.close()


def test_more_worlds_than_a_queue_has_room_for_all_come_and_then_the_ticket(tmp_path):
    """Each is a message, and their actor builds them one by one."""
    count = 1500
    config = replace(CONFIG, batch=replace(CONFIG.batch, worlds=count, unroll_length=1))
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    worlds = {world: kept(world, 7, 1000) for world in range(count)}
    thread = Collector(receiver, SPEC, config, 0, 1, 7, WEIGHTS, worlds=worlds)
    thread.start()
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        poll(lambda: thread.snapshot()["tickets"]["outstanding"] == 1, "the ticket")
        assert thread._outbox.peers  # it reads nothing yet, and is not given up for that
        turn(thread)
        for world in range(count):
            assert peer.next(WorldState).world == world
        assert peer.ticket().worlds == tuple(range(count))
        poll(lambda: not thread._outbox.peers, "an empty outbox")
        assert indices(thread) == [0]
    thread.close()
