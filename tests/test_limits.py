"""What one peer may send: no more than an honest one has to, and what it may send unasked comes back with time."""

from __future__ import annotations

import contextlib
import os
import time

import msgspec
import numpy as np
import pytest
import zmq
from clusters import poll
from hypothesis import given
from hypothesis import strategies as st
from test_collector import CONFIG, SPEC, WEIGHTS, Peer

from rustyrl.channels import RolloutReceiver, RolloutSender
from rustyrl.config import build_config
from rustyrl.errors import printable
from rustyrl.limits import LARGE_COST, SPARE, UNASKED_S, Allowance, largest_message
from rustyrl.rollout import EpisodeRows, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.wire import MAX_STATE_BYTES, Lease, Ready, Refusal, WeightsHeader, encode_message, encode_rollout
from rustyrl_learner.collector import Collector


def worst_rollout(config):
    """Every world, and every step of each ends an episode."""
    steps, slots = config.batch.unroll_length, SPEC.slots * config.batch.worlds
    origin = RolloutOrigin(SPEC.fingerprint, "main", Ticket(0, 0, tuple(range(config.batch.worlds))), 0, 0, 0)
    rollout = allocate_rollout(SPEC, steps, slots, origin)
    ends = steps * slots
    rollout.final_index = np.zeros((ends, 2), np.int32)
    rollout.final_observation = {a.name: np.zeros((ends, *a.shape), a.dtype) for a in SPEC.observation}
    whole, number = np.zeros(ends, np.int32), np.zeros(ends, np.float32)
    rollout.episodes = EpisodeRows(whole, number, whole, dict.fromkeys(SPEC.episode_metrics, number))
    return encode_rollout(rollout)[1]


def test_the_largest_message_of_a_run_has_room_for_its_worst_rollout(monkeypatch):
    assert largest_message(SPEC, CONFIG) == MAX_STATE_BYTES  # small runs: a world's state may be larger
    monkeypatch.setattr("rustyrl.limits.MAX_STATE_BYTES", 0)
    for worlds, steps in ((1, 1), (4, 16), (64, 128)):
        config = build_config({"batch": {"worlds": worlds, "unroll_length": steps}})
        worst, limit = len(worst_rollout(config)), largest_message(SPEC, config)
        assert worst <= limit < worst + 1000


def test_an_honest_actor_is_within_its_allowance_for_ever():
    allowance, now = Allowance(4, 1, 1000), 0.0
    for _ in range(100_000):
        now += 1.0
        assert allowance.spend(b"actor", 100, 50, now)


def test_a_flood_is_over_the_allowance_and_large_messages_the_sooner():
    for size in (0, 500, 1000):
        allowance, sent = Allowance(4, 1, 1000), 0
        while allowance.spend(b"peer", size, 0, 0.0):
            sent += 1
            assert sent <= allowance.most
        assert sent == int(allowance.most / (1 + LARGE_COST * size / 1000))
        assert allowance.spend(b"another", size, 0, 0.0)
    assert allowance.most >= SPARE


def test_headers_that_take_long_to_read_are_over_it_the_soonest():
    allowance, sent = Allowance(4, 1, 1 << 26), 0
    while allowance.spend(b"peer", 1 << 20, 1 << 20, 0.0):
        sent += 1
        assert sent < 3
    assert sent


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3), st.integers(0, 2000)), max_size=200))
def test_no_peer_gets_more_than_its_allowance_whatever_others_send(messages):
    allowance, now = Allowance(1, 0, 1000), 0.0
    spent: dict[int, float] = {}
    for peer, pause, size in messages:
        now += pause
        if allowance.spend(bytes([peer]), size, 0, now):
            spent[peer] = spent.get(peer, 0.0) + 1 + LARGE_COST * size / 1000
            assert spent[peer] <= allowance.most + now * UNASKED_S + 1e-6
    assert len(allowance) <= 6


def test_peers_that_come_and_go_are_forgotten():
    allowance = Allowance(4, 1, 1000)
    for number in range(10_000):
        allowance.spend(number.to_bytes(4, "big"), 0, 0, number * 0.01)
    assert len(allowance) < 100


def test_what_steers_a_terminal_is_not_shown():
    assert printable("ok\n\x1b[2Jgone\x07\u202e \u00e9") == "ok\n?[2Jgone?? \u00e9"


@pytest.fixture
def collector(tmp_path):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link", largest_bytes=1 << 21)
    collector = Collector(receiver, SPEC, CONFIG, 0, 1, 0, WEIGHTS)
    collector.start()
    yield collector, receiver
    collector.close()


def refused(collector: Collector) -> dict[str, int]:
    return collector.snapshot()["refused_messages"]


@pytest.mark.parametrize("kind", ["leases", "junk", "weights", "rollouts"])
def test_an_actor_that_floods_is_cut_off_and_the_others_go_on(collector, kind):
    thread, receiver = collector
    flooder, honest = Peer(receiver.address, 0, 1), Peer(receiver.address, 1, 2)
    with flooder.link, honest.link:
        flooder.ready()
        ticket = msgspec.structs.replace(flooder.ticket(), batch=999)  # which it does not owe
        honest.ready()
        answer = flooder.frames(ticket)
        header, blob = {
            "leases": (encode_message(Lease(1)), b""),
            "junk": (os.urandom(100), b""),
            "weights": (encode_message(WeightsHeader(0, 0)), bytes(4000)),
            "rollouts": (answer[0], bytes(answer[1])),
        }[kind]
        deadline = time.monotonic() + 30
        while "flood" not in refused(thread):
            with contextlib.suppress(TimeoutError):
                flooder.link.send_frames(header, blob, timeout_s=0.01)
            assert time.monotonic() < deadline, refused(thread)
        assert refused(thread)["flood"] == 1  # though there was more of it on its way
        assert honest.ticket().worlds == (0, 1)  # what the flooder had is another's now
        said = []
        while (received := flooder.link.receive(0.2)) is not None:
            said.append(received.message)
        assert any(isinstance(message, Refusal) and "flood" in message.reason for message in said)
        before = receiver.received_bytes
        for _ in range(200):
            flooder.link.offer(Lease(1))
        honest.link.receive(0.3)
        assert receiver.received_bytes - before < 1000  # nobody reads that any more


def test_a_peer_that_sends_more_than_a_message_may_have_is_hung_up_on(collector):
    thread, receiver = collector
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stranger.connect(receiver.address)
        stranger.send_multipart([b"x", bytes((1 << 21) + 1)])
        assert monitor.poll(20_000)
        stranger.disable_monitor()
        monitor.close()
    assert refused(thread) == {}


def test_a_blob_where_none_belongs_is_refused(collector):
    thread, receiver = collector
    with RolloutSender(receiver.address) as link:
        link.send(Ready("x"), b"blob")
        poll(lambda: refused(thread) == {"malformed": 1}, "the refusal")
