"""Garbage, lies and replays at thousands a second beside real actors: all of it counted, none of it believed."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
from clusters import ENDLESS, await_more, await_status, contributing, end, poll, speed, verb

from rustyrl.channels import RolloutSender
from rustyrl.errors import RunFailedError
from rustyrl.keys import FIRST, read_actor_key
from rustyrl.rollout import Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import read_spec
from rustyrl.wire import (
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

UNROLL = 16  # as clusters.SMALL has it
RATE = 10_000  # messages a second, as near as the machine comes


def link_of(cluster) -> str:
    return json.loads((cluster.run / "cluster.json").read_text())["link"]


def forged(cluster, origin: RolloutOrigin) -> Rollout:
    """A rollout whose every array is what this run expects."""
    spec = read_spec((cluster.run / "spec.json").read_bytes())
    rollout = allocate_rollout(spec, UNROLL, spec.slots * len(origin.ticket.worlds), origin, poison=False)
    for array in [*rollout.observation.values(), *rollout.action.values(), rollout.reward, rollout.behavior_log_prob]:
        array[...] = 0
    rollout.terminated[...] = rollout.truncated[...] = False
    rollout.valid[...] = True
    return rollout


def hostile_messages(cluster) -> dict[str, list[bytes]]:
    """By the reason that each is counted under."""
    fingerprint = read_spec((cluster.run / "spec.json").read_bytes()).fingerprint
    origin = RolloutOrigin(fingerprint, "main", Ticket(5, 5, (0, 1)), 0, 0, 1)
    header, blob = encode_rollout(forged(cluster, origin))
    return {
        "malformed": [os.urandom(200), b""],
        "frames": [b"one", b"two", b"three"],
        "oversize": [bytes((1 << 20) + 1), b""],
        "wire-version": [b"\x92\x63\x81\xa4type\xa5lease", b""],
        "unknown-peer": [header, bytes(blob)],  # a replay, from who never said hello
        "unexpected-welcome": [encode_message(Welcome(0, 0, "x", {}, 0, 1, False, False)), b""],
        "unexpected-ticketmessage": [encode_message(TicketMessage(0, 0, 0, (0,))), b""],
        "unexpected-weightsheader": [encode_message(WeightsHeader(9, 9)), os.urandom(4000)],
    }


class Flood(threading.Thread):
    """Sends each kind of message in turn until it is to be ``quiet``; whenever it is cut off, it comes again."""

    def __init__(self, address: str, messages: dict[str, list[bytes]]) -> None:
        super().__init__()
        self._address = address
        self._messages = messages
        self.sent = dict.fromkeys(messages, 0)
        self.seconds = 0.0
        self.tries = 0
        self.quiet = threading.Event()

    def run(self) -> None:
        started = time.monotonic()
        with zmq.Context() as context:
            while not self.quiet.is_set():
                self.tries += 1
                with context.socket(zmq.DEALER) as socket:
                    socket.setsockopt(zmq.LINGER, 0)
                    socket.connect(self._address)
                    self._send_until_cut(socket, started)
        self.seconds = time.monotonic() - started

    def _send_until_cut(self, socket: zmq.Socket, started: float) -> None:
        turn = 0
        while not self.quiet.is_set():
            turn += 1
            for reason, frames in self._messages.items():
                if reason == "oversize" and turn % 50 > 1:
                    continue  # or it would be the memory that is measured
                if not socket.poll(500, zmq.POLLOUT):
                    return
                socket.send_multipart(frames)
                self.sent[reason] += 1
            while socket.poll(0):
                socket.recv_multipart()
            ahead = sum(self.sent.values()) / RATE - (time.monotonic() - started)
            self.quiet.wait(max(0.0, ahead))


@contextmanager
def flood(address: str, messages: dict[str, list[bytes]]) -> Iterator[Flood]:
    thread = Flood(address, messages)
    thread.start()
    try:
        yield thread
    finally:
        thread.quiet.set()
        thread.join(60)


@pytest.mark.faults  # tests/test_verbs.py has a handful of them in the default run
@pytest.mark.timeout(300)
def test_a_flood_of_hostile_messages_is_cut_off_each_time_and_harms_nothing(start):
    cluster = start(*ENDLESS, "--actors", "2")
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    messages = hostile_messages(cluster)
    before = speed(cluster)
    with flood(link_of(cluster), messages) as hostile:
        poll(lambda: all(hostile.sent.values()), "some of each")
        during = speed(cluster)
        await_status(cluster, lambda status: status["wire"]["refused_messages"].get("flood", 0) >= 3, "three cuts")
        hostile.quiet.set()
        poll(lambda: hostile.seconds, "silence")
        print(f"{sum(hostile.sent.values()) / hostile.seconds:,.0f} messages/s in {hostile.tries} tries")
        print(f"steps/s {before:,.0f} before, {during:,.0f} meanwhile: {during / before:.0%}")
    refused = verb(cluster, "status")["wire"]["refused_messages"]
    assert refused.keys() == {*messages, "flood"}
    assert all(refused[reason] <= count for reason, count in hostile.sent.items())
    await_more(cluster, 3)
    status = verb(cluster, "status")
    assert contributing(status) == {0: 2, 1: 2}
    assert status["actor_restarts"] == status["learner"]["restarts"] == status["tickets"]["lost"] == 0
    assert status["tickets"]["rejected"].keys() <= {"warm-up"}
    end(cluster)


def test_garbage_on_the_control_socket_is_answered_or_passed_over(start):
    cluster = start(*ENDLESS, "--actors", "1")
    cluster.await_version(1)
    address = json.loads((cluster.run / "cluster.json").read_text())["control"]
    before = verb(cluster, "status")["learner"]
    report = {"kind": "report", "actors": [], "silent": [], "tickets": {}, "version": 10**9, "incarnation": 0}
    lies = [
        *({"kind": kind} for kind in ("hello", "listening", "report", "candidate", "say", "checkpointed", "failed")),
        {"kind": "failed", "message": "a lie", "exit_code": 2},
        {"kind": "done", "reason": "total_steps"},
        {"kind": "listening", "address": "ipc:///nowhere"},
        {"kind": "candidate", "version": "x", "policy": 7},
        {"kind": "hello", "pid": before["pid"] + 1, "incarnation": 0},
        report,
        {"kind": ["status"]},
        {"kind": "scale", "actors": {"a": 1}},
        {"kind": "scale", "auto": [1]},
        {"kind": "relieve", "index": {}},
        {"kind": None},
        {},
    ]
    deep = b'{"kind": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    junk = [deep, b"", b"\xff", b"[]", b"{", b'{"kind": "status"', b'{"kind": "st\xff"}', os.urandom(100), b"1" * 5000]
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(address)
        for content in junk:
            stranger.send(content)
        stranger.send_multipart([b"{}"] * 4)
        for lie in lies:
            stranger.send(json.dumps(lie).encode())
        answers = []
        for _ in lies:
            assert stranger.poll(30_000), answers
            answers.append(json.loads(stranger.recv()))
    assert all("error" in answer for answer in answers), answers
    await_more(cluster, 3)
    status = verb(cluster, "status")
    assert status["state"] == "running"
    assert status["learner"]["pid"] == before["pid"]
    assert status["actors_wanted"] == 1
    assert verb(cluster, "pause")["state"] == "paused"  # the learner, and nobody else, is told
    version = verb(cluster, "checkpoint")["version"]
    assert verb(cluster, "checkpoint")["version"] == version
    end(cluster)


@pytest.mark.faults
def test_a_flood_on_the_control_socket_keeps_nobody_from_being_served(start):
    cluster = start(*ENDLESS, "--actors", "2")
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    address = json.loads((cluster.run / "cluster.json").read_text())["control"]
    with flood(address, {"nonsense": [b'{"kind": "nonsense"}'], "junk": [b"{"]}) as hostile:
        pid = verb(cluster, "status")["actors"][0]["pid"]
        os.kill(pid, 9)
        await_status(cluster, lambda s: s["actor_restarts"] == 1 and contributing(s) == {0: 2, 1: 2}, "another actor")
        assert verb(cluster, "scale", "1")["actors"] == 1
        await_status(cluster, lambda status: contributing(status) in ({0: 4}, {1: 4}), "one")
    print(f"{sum(hostile.sent.values()) / hostile.seconds:,.0f} messages/s")
    end(cluster)


class Impostor:
    """Joins as an actor does, and answers its tickets as no actor does."""

    def __init__(self, cluster) -> None:
        self.link = RolloutSender(link_of(cluster))
        self.cluster = cluster
        self.link.send(Hello(-1, 77, 1, "elsewhere"))
        assert isinstance(self.next(), Welcome)
        self.fingerprint = read_spec((cluster.run / "spec.json").read_bytes()).fingerprint

    def next(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            received = self.link.receive(1.0)
            if received is None:
                self.link.offer(Lease())
            elif not isinstance(received.message, Lease):
                return received.message
        raise AssertionError("the learner says nothing")

    def ticket(self) -> Ticket | Refusal:
        while True:
            match self.next():
                case TicketMessage() as message:
                    return message.ticket
                case Refusal() as refusal:
                    return refusal
                case WeightsHeader():
                    pass
                case other:
                    raise AssertionError(other)

    def answer(self, ticket: Ticket, **changes) -> tuple[bytes, memoryview]:
        origin = {"fingerprint": self.fingerprint, "policy_name": "main", "ticket": ticket, "learner_incarnation": 0}
        origin |= {"actor_index": 1000, "actor_incarnation": 77}
        return encode_rollout(forged(self.cluster, RolloutOrigin(**{**origin, **changes})))


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [0, 100_000])
def test_an_actor_that_floods_is_cut_off_and_the_others_keep_their_share(start, size):
    """One that has joined, has worlds and holds a key; what it does when it is cut off is to knock again."""
    cluster = start(*ENDLESS, "--actors", "2", "--listen", "tcp://0.0.0.0:0")
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    before = speed(cluster)
    key = read_actor_key(cluster.run / "keys" / f"{FIRST}.key")
    over, sent, tries = threading.Event(), [], []

    def attack() -> None:
        while not over.is_set():
            tries.append(time.monotonic())
            with RolloutSender(link_of(cluster), key) as link, contextlib.suppress(RunFailedError, TimeoutError):
                link.send(Hello(-1, 77, 1, "elsewhere"), timeout_s=5.0)
                while not over.is_set():
                    link.send(WeightsHeader(0, 0) if size else Lease(1), bytes(size), timeout_s=0.5)
                    sent.append(1)
            over.wait(0.05)

    flooder = threading.Thread(target=attack)
    flooder.start()
    try:
        await_status(cluster, lambda status: status["wire"]["refused_messages"].get("flood"), "a cut")
        during = speed(cluster)
    finally:
        over.set()
        flooder.join(60)
    print(f"{len(sent):,} messages in {len(tries)} tries; steps/s {before:,.0f} before, {during:,.0f} meanwhile: "
          f"{during / before:.0%}")  # fmt: skip
    status = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    assert status["wire"]["refused_messages"]["flood"] <= 3
    assert status["wire"]["refused_handshakes"] > 0
    assert status["actor_restarts"] == status["learner"]["restarts"] == 0
    end(cluster)


@pytest.mark.faults
def test_an_impostor_whose_rollouts_are_refused_is_sent_away_and_its_tickets_are_in_the_books(start):
    cluster = start(*ENDLESS, "--actors", "1", "--set", "cluster.lease_s=60")
    cluster.await_version(1)
    stranger = RolloutSender(link_of(cluster))
    with stranger:
        stranger.send(Hello(-1, 78, 1, "elsewhere"))
        assert isinstance(stranger.receive(30).message, Welcome)
        stranger.send(Ready("0" * 16))
        refusal = stranger.receive(30).message
        assert isinstance(refusal, Refusal)
        assert "fingerprint" in refusal.reason
    impostor = Impostor(cluster)
    with impostor.link:
        impostor.link.send(Ready(impostor.fingerprint))
        used: list[tuple[bytes, memoryview]] = []
        lies = [
            lambda header, blob: (header, blob[: len(blob) // 2]),
            None,
            lambda header, blob: (header, bytes(len(blob) + 64)),
        ]
        while isinstance(ticket := impostor.ticket(), Ticket):  # those of two batches and worlds may come by turns
            header, blob = impostor.answer(ticket)
            lie = lies[len(used) % len(lies)]
            if lie is None:
                header, blob = impostor.answer(ticket, fingerprint="0" * 16)
            else:
                header, blob = lie(header, blob)
            used.append((header, blob))
            impostor.link.send_frames(header, blob).wait(10)
        assert "refused three times" in ticket.reason
        for header, blob in used:
            impostor.link.send_frames(header, bytes(blob)).wait(10)
        assert isinstance(impostor.next(), Rejoin)
        status = await_status(
            cluster, lambda status: status["wire"]["refused_messages"].get("unknown-peer", 0) >= len(used), "replays"
        )
    rejected = {reason: count for reason, count in status["tickets"]["rejected"].items() if reason != "warm-up"}
    assert rejected.keys() == {"truncated", "fingerprint", "malformed"}
    late = status["wire"]["refused_messages"]["unknown-peer"] - len(used)  # lies that it told when it was out already
    assert 3 <= sum(rejected.values()) == len(used) - late <= 3 * 4  # for each of two worlds in each of two batches
    await_status(cluster, lambda status: contributing(status) == {0: 4}, "the real one to have every world")
    await_more(cluster, 3)
    summary, _ = end(cluster)
    assert summary["actor_restarts"] == summary["learner_restarts"] == 0
