"""The receive thread against actors that misbehave: nothing hangs, and everything is accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from clusters import poll

from rustyrl import configure
from rustyrl.channels import Received, RolloutReceiver, RolloutSender
from rustyrl.errors import ContractError
from rustyrl.rollout import RolloutOrigin, allocate_rollout
from rustyrl.weights import PolicySpec, encode_weights
from rustyrl.wire import (
    Fault,
    Goodbye,
    Hello,
    Lease,
    Ready,
    Refusal,
    Rejoin,
    TicketMessage,
    WeightsHeader,
    Welcome,
    encode_message,
    encode_rollout,
)
from rustyrl_learner.collector import Collector
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

    def next(self, kind: type) -> Any:
        """The next message, which is to be of a kind."""
        received = self._hear()
        assert received is not None, f"no {kind.__name__}"
        assert isinstance(received.message, kind), received.message
        return received.message

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

    def answer(self, ticket: TicketMessage, *, broken: bool = False) -> None:
        header, blob = self.frames(ticket)
        if broken:  # the flags are bytes that are neither False nor True
            flags = np.frombuffer(blob, np.uint8)
            flags[len(flags) // 2 :] = 7
        self.link.send_frames(header, bytes(blob), 5.0).wait(5.0)


@pytest.fixture
def collector(tmp_path) -> Iterator[tuple[Collector, RolloutReceiver]]:
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    collector = Collector(receiver, SPEC, CONFIG, 0, 1, 0, WEIGHTS, pin=False)
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


def test_a_second_hello_or_ready_changes_nothing(collector):
    thread, receiver = collector
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        ticket = peer.ticket()
        peer.link.send(Hello(-1, 7, 7, "elsewhere"))
        peer.ready()
        peer.answer(ticket)
        assert thread.next_batch(10.0) is not None
        poll(lambda: thread.snapshot()["refused_messages"] == {"second-hello": 1}, "the count")
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
        peer.link.send(Lease())  # the one before may have come just in time
        assert peer.next(Rejoin)
        peer.hello()
        heard = [peer.link.receive(10.0)]
        while heard[-1] is not None and isinstance(heard[-1].message, Rejoin):
            heard.append(peer.link.receive(10.0))
        assert heard[-1] is not None
        assert isinstance(heard[-1].message, Welcome)
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
        assert peer.next(Goodbye)
        buffer = thread.next_batch(10.0)
        assert buffer is not None
        thread.publish(buffer, 1, WEIGHTS)
        assert namesake.ticket().worlds == (0, 1)
        poll(lambda: [actor["index"] for actor in thread.snapshot()["actors"]] == [1], "one to be gone")
        books = {"issued": 2, "trained": 1, "rejected": {}, "lost": 0, "outstanding": 1}
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
        assert peer.next(Goodbye)
        other.answer(other.ticket())
        assert thread.next_batch(10.0) is not None
        books = {"issued": 2, "trained": 0, "rejected": {"malformed": 1}, "lost": 0, "outstanding": 1}
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
        assert "install the same rustyrl" in received.message.reason


def test_a_death_before_hello_does_not_keep_the_first_batch_waiting(tmp_path):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    thread = Collector(receiver, SPEC, CONFIG, 0, 2, 0, WEIGHTS, pin=False)
    thread.start()
    peer = Peer(receiver.address, 0, 1)
    with peer.link:
        peer.ready()
        thread.report_death(12345)
        thread.report_death(12345)
        assert peer.ticket().worlds == (0, 1)
    thread.close()
