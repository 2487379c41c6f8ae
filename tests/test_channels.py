"""Links: bounded, ordered, checked, and gone when closed."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import zmq
from clusters import poll

from rustyrl.channels import COPIED_BYTES, RolloutReceiver, RolloutSender
from rustyrl.control import MAX_CONTROL_TURN, ControlClient, ControlServer
from rustyrl.errors import UsageError, WireError
from rustyrl.wire import Goodbye, Hello, Lease, TicketMessage, WeightsHeader


def connected(tmp_path: Path, listen: str | None = None) -> tuple[RolloutReceiver, RolloutSender, bytes]:
    receiver = RolloutReceiver(listen or f"ipc://{tmp_path}/link")
    sender = RolloutSender(receiver.address)
    sender.send(Hello(0, 1, 2, "here"))
    received = poll(lambda: list(receiver.receive(0.05)), "hello")[0]
    assert received.message == Hello(0, 1, 2, "here")
    return receiver, sender, received.peer


@pytest.mark.parametrize("listen", [None, "tcp://127.0.0.1:*"])
def test_weights_and_the_ticket_that_names_them_arrive_in_the_order_sent(tmp_path, listen):
    receiver, sender, peer = connected(tmp_path, listen)
    with receiver, sender:
        for version in range(20):
            assert receiver.send(peer, WeightsHeader(0, version), bytes(100_000))
            assert receiver.send(peer, TicketMessage(0, version, version, (0,)))
        for version in range(20):
            weights, ticket = sender.receive(5.0), sender.receive(5.0)
            assert weights is not None
            assert ticket is not None
            assert weights.message == WeightsHeader(0, version)
            assert len(weights.blob) == 100_000
            assert ticket.message == TicketMessage(0, version, version, (0,))


def test_a_large_blob_arrives_whole_and_its_tracker_says_when_memory_may_change(tmp_path):
    receiver, sender, _ = connected(tmp_path)
    with receiver, sender:
        block = np.arange(1 << 20, dtype=np.uint8)
        tracker = sender.send(WeightsHeader(0, 1), block.data)
        received = poll(lambda: list(receiver.receive(0.05)), "the blob")[0]
        assert np.array_equal(np.frombuffer(received.blob, np.uint8), block)
        tracker.wait(5)
        assert tracker.done


def test_a_small_blob_is_copied_on_its_way_out_so_that_its_memory_may_change_at_once(tmp_path):
    receiver, sender, _ = connected(tmp_path)
    with receiver, sender:
        block = np.full(COPIED_BYTES - 1, 7, np.uint8)
        sent = sender.send(WeightsHeader(0, 1), block.data)
        assert sent.done
        block[:] = 0
        received = poll(lambda: list(receiver.receive(0.05)), "the blob")[0]
        assert (np.frombuffer(received.blob, np.uint8) == 7).all()


def test_waiting_has_a_limit_everywhere(tmp_path):
    receiver, sender, _peer = connected(tmp_path)
    with receiver, sender:
        assert sender.receive(0.01) is None
        assert list(receiver.receive(0.01)) == []
        assert receiver.send(b"nobody", Goodbye()) is False
    with RolloutSender(f"ipc://{tmp_path}/nobody") as lonely, pytest.raises(TimeoutError, match="no learner"):
        lonely.send(Lease(), timeout_s=0.01)
    with ControlServer(f"ipc://{tmp_path}/control") as server, ControlClient(server.address) as client:
        with pytest.raises(TimeoutError, match="did not answer"):
            client.request({"kind": "status"}, 0.05)


def test_a_learner_that_reads_nothing_is_bounded(tmp_path):
    receiver, sender, peer = connected(tmp_path)
    with receiver, sender:
        sent = 0
        while receiver.send(peer, Lease()):
            sent += 1
            assert sent < 10_000
        assert sent >= 256


def test_wrong_frame_counts_and_headers_are_told_apart_before_anything_is_built(tmp_path):
    import zmq

    receiver, sender, _ = connected(tmp_path)
    with receiver, sender, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(receiver.address)
        stranger.send_multipart([b"one"])
        stranger.send_multipart([b"three"] * 3)
        stranger.send_multipart([b"\xc1", b""])
        found = []
        poll(lambda: found.extend(receiver.receive(0.05)) or len(found) == 3, "three messages")
        reasons = [item.message.reason for item in found if isinstance(item.message, WireError)]
        assert reasons == ["frames", "frames", "malformed"]


def test_wake_ends_a_wait_and_closing_removes_the_ipc_path(tmp_path):
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link")
    path = Path(receiver.address.removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o600
    receiver.wake()
    assert list(receiver.receive(60.0)) == []  # returns at once, else the test times out
    receiver.close()
    assert not path.exists()


def test_control_messages_go_both_ways_and_junk_is_passed_over(tmp_path):
    import zmq

    with ControlServer(f"ipc://{tmp_path}/control") as server, ControlClient(server.address) as client:
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(server.address)
            stranger.send_multipart([b"not json"])
            stranger.send_multipart([b"{}", b"{}"])
            client.send({"kind": "hello"})
            found = []
            poll(lambda: found.extend(server.receive(0.05, [])) or found, "the hello")
        peer, message = found[0]
        assert message == {"kind": "hello"}
        server.send(peer, {"kind": "stop"})
        assert client.receive(5.0) == {"kind": "stop"}


def test_a_taken_port_is_a_usage_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="is in use"):
            RolloutReceiver(f"tcp://127.0.0.1:{port}")


def test_a_flood_on_the_control_socket_is_taken_in_by_parts(tmp_path):
    """The launcher has other things to look at between them."""
    import zmq

    with ControlServer(f"ipc://{tmp_path}/control") as server:
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(server.address)
            poll(lambda: stranger.poll(10, zmq.POLLOUT), "a connection")
            counts: list[int] = []
            left = 3000
            while sum(counts) < 3000:
                while left and stranger.poll(0, zmq.POLLOUT):
                    stranger.send(b'{"kind": "nonsense"}')
                    left -= 1
                counts.append(sum(1 for _ in server.receive(0.1, [])))
            assert max(counts) == MAX_CONTROL_TURN


class Told:
    """Events of a connection that are told too soon, or too late."""

    def __init__(self, *events: int) -> None:
        self._events = [*events]

    def poll(self, _timeout_ms: int) -> int:
        return len(self._events)

    def recv_multipart(self) -> list[bytes]:
        return [struct.pack("=hi", self._events.pop(0), 0), b"the address"]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("listen", [None, "tcp://127.0.0.1:*"])
def test_who_is_told_that_the_connection_broke_sends_nothing_more_over_it(tmp_path, listen):
    """ZeroMQ tells of a break a moment before it takes no more messages for who is gone."""
    receiver, sender, peer = connected(tmp_path, listen)
    with receiver, sender:
        assert sender.receive(0.01) is None
        assert receiver.send(peer, TicketMessage(0, 1, 0, (2,)))
        assert sender._dealer.poll(5000)
        sender._events.close()
        broken, sender._events = sender._dealer, Told(zmq.EVENT_DISCONNECTED)
        assert sender._mind_events()
        assert broken.closed
        received = sender.receive(5.0)
        assert received is not None
        assert received.message == TicketMessage(0, 1, 0, (2,))  # what came before is not lost
        assert sender.was_cut
        sender.send(Lease(3))
        assert poll(lambda: list(receiver.receive(0.05)), "the next message")[0].message == Lease(3)
        assert receiver.send(peer, Goodbye())  # to who is the same for the learner
        received = sender.receive(5.0)
        assert received is not None
        assert received.message == Goodbye()


def test_a_connection_that_came_back_before_its_break_was_noticed_is_kept(tmp_path):
    receiver, sender, _ = connected(tmp_path)
    with receiver, sender:
        assert sender.receive(0.01) is None
        sender._events.close()
        sender._events = Told(zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        kept = sender._dealer
        sender.send(Lease(4))
        assert sender._mind_events()
        assert sender._dealer is kept  # and with it what was sent over it since
        assert sender.was_cut
        assert poll(lambda: list(receiver.receive(0.05)), "the message")[0].message == Lease(4)


@pytest.mark.parametrize("address", ["nonsense", "tcp:127.0.0.1:1", "udp://127.0.0.1:1", "TCP://127.0.0.1:1"])
def test_an_address_that_is_none_is_refused_with_what_one_looks_like(address: str) -> None:
    with pytest.raises(UsageError, match=f"cannot join '{address}'.*expected ipc://PATH or tcp://HOST:PORT"):
        RolloutSender(address)
