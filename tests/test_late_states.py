"""States of worlds that come late, twice, or broken: an honest actor is not cut off, and no checkpoint suffers."""

from __future__ import annotations

import time

import msgspec
import numpy as np
from clusters import poll
from test_collector import CONFIG, SPEC, WEIGHTS, Peer, kept, one_batch, send_copies, turn

from rustyrl.channels import RolloutReceiver, RolloutSender
from rustyrl.wire import HandOver, Lease, Refusal, Snapshot, encode_world_state
from rustyrl_learner.collector import Collector
from rustyrl_learner.owing import MOST_PEERS, Owing


def begin(tmp_path, *, expect: int = 1, incarnation: int = 0) -> tuple[Collector, RolloutReceiver]:
    config = msgspec.structs.replace(CONFIG, cluster=msgspec.structs.replace(CONFIG.cluster, lease_s=3.0))
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link", largest_bytes=1 << 21)
    collector = Collector(receiver, SPEC, config, incarnation, expect, 0, WEIGHTS)
    collector.start()
    return collector, receiver


def refused(collector: Collector) -> dict[str, int]:
    return collector.snapshot()["refused_messages"]


def tolerate_nothing(collector: Collector) -> None:
    """From now on a single message that nobody asked for is a flood."""
    turn(collector)
    collector._allowance.most = 0.0


def test_an_answer_is_free_once_for_each_time_that_it_was_asked_for():
    owing = Owing()
    assert not owing.settle(b"a", 0)
    owing.ask(b"a", (0, 1))
    owing.ask(b"a", (1,))
    assert not owing.settle(b"b", 0)
    assert [owing.settle(b"a", world) for world in (0, 0, 1, 1, 1)] == [True, False, True, True, False]
    assert len(owing) == 0


def test_what_a_learner_before_asked_for_is_free_once_whoever_sends_it():
    owing = Owing(range(2))
    assert [owing.settle(peer, world) for peer, world in ((b"a", 0), (b"b", 0), (b"b", 1), (b"b", 7))] == [
        True, False, True, False
    ]  # fmt: skip


def test_peers_that_never_answer_are_forgotten():
    owing = Owing()
    for number in range(MOST_PEERS + 10):
        owing.ask(number.to_bytes(4, "big"), (0,))
    assert len(owing) == MOST_PEERS
    assert not owing.settle((0).to_bytes(4, "big"), 0)
    assert owing.settle((MOST_PEERS).to_bytes(4, "big"), 0)


def test_copies_that_come_after_they_were_given_up_are_no_flood_but_more_of_them_are(tmp_path):
    thread, receiver = begin(tmp_path)
    with one_batch(thread, receiver) as (peer,):
        assert thread.gather(1).end() is None  # at once
        turn(thread)
        again = thread.gather(1)
        tolerate_nothing(thread)
        send_copies(peer, 1)
        assert again.done.wait(10.0)
        send_copies(peer, 1)
        turn(thread)
        assert "flood" not in refused(thread)
        state, blob = kept(0, 1)
        peer.link.send(state, blob)
        poll(lambda: refused(thread).get("flood") == 1, "the flood")
    thread.close()


def test_a_world_that_is_handed_over_too_late_is_no_flood(tmp_path):
    thread, receiver = begin(tmp_path)
    first, second = Peer(receiver.address, 0, 1), Peer(receiver.address, 1, 2)
    with first.link, second.link:
        first.ready()
        first.answer(first.ticket())
        second.ready()
        buffer = thread.next_batch(10.0)
        poll(lambda: all(actor["ready"] for actor in thread.snapshot()["actors"]), "both")
        thread.publish(buffer, 1, WEIGHTS)
        (world,) = next_hand_over(first).worlds
        deadline = time.monotonic() + 20
        while not thread.snapshot()["worlds_restarted"]:
            for peer in (first, second):
                peer.link.send(Lease(1))
            time.sleep(0.1)
            assert time.monotonic() < deadline
        tolerate_nothing(thread)
        state, blob = kept(world, 1)
        before = receiver.received_bytes
        first.link.send(state, blob)
        poll(lambda: receiver.received_bytes > before, "the state")
        turn(thread)
        assert "flood" not in refused(thread)
        first.link.send(state, blob)
        poll(lambda: refused(thread).get("flood") == 1, "the flood")
    thread.close()


def next_hand_over(peer: Peer) -> HandOver:
    """What it is asked for beside its next ticket, in whatever order that comes."""
    while not isinstance(message := peer._hear().message, HandOver):
        pass
    return message


def test_what_was_asked_for_before_the_learner_died_is_no_flood_for_the_next(tmp_path):
    thread, receiver = begin(tmp_path, incarnation=1)
    tolerate_nothing(thread)
    with RolloutSender(receiver.address) as link:
        for world in (0, 1):
            link.send(*kept(world, 1))
        poll(lambda: refused(thread).get("unknown-peer") == 2, "the states")
        assert "flood" not in refused(thread)
        link.send(*kept(0, 1))
        poll(lambda: refused(thread).get("flood") == 1, "the flood")
    thread.close()


def test_who_sends_a_broken_state_is_sent_away_and_the_worlds_of_others_are_kept(tmp_path):
    thread, receiver = begin(tmp_path, expect=2)
    with one_batch(thread, receiver, actors=2) as (evil, honest):
        gathering = thread.gather(1)
        (world,) = evil.next(Snapshot).worlds
        state, blob = kept(world, 1)
        evil.link.send(state, blob + b"x")
        send_copies(honest, 1)
        assert gathering.done.wait(10.0)
        assert gathering.end() == {1 - world: kept(1 - world, 1)}
        assert "the blob has 25" in evil.next(Refusal).reason
        assert refused(thread) == {"malformed": 1}
        assert [actor["index"] for actor in thread.snapshot()["actors"]] == [1]
    thread.close()


def test_a_truth_value_that_is_none_is_a_broken_state(tmp_path):
    thread, receiver = begin(tmp_path)
    with one_batch(thread, receiver) as (evil,):
        thread.gather(1)
        evil.next(Snapshot)
        state, _ = encode_world_state(0, 1, 0, {"flag": np.array([True])})
        evil.link.send(state, b"\7")
        assert "neither False nor True" in evil.next(Refusal).reason
    thread.close()
