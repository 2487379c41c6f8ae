"""The link between learner and actors.

One for each actor, DEALER to ROUTER: rollouts go up, weights and tickets down. Every message is two frames, checked
first; queues are bounded by tickets, so a send that would block means that the peer is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from rustyrl.addresses import security_of
from rustyrl.curve import Gate
from rustyrl.errors import RunFailedError, UsageError, WireError
from rustyrl.keys import LAUNCHED
from rustyrl.sockets import Sockets, bind
from rustyrl.wire import MAX_BLOB_BYTES, MAX_HEADER_BYTES, WITH_BLOB, Goodbye, Message, decode_header, encode_message

if TYPE_CHECKING:
    from rustyrl.keys import ActorKey, KeyRing

__all__ = [
    "Received",
    "RolloutReceiver",
    "RolloutSender",
    "Sent",
]

WRITE_POLL_MS = 500  # how often a send that waits looks whether the learner said goodbye
CUT = "inproc://cut"  # within the learner's context
RECONNECT_MS = {"ipc": (10, 50), "tcp": (100, 500)}  # between two tries, at first and at most
CONNECT_MS = 1000  # for one try: a packet that is lost on the way to a network that comes back is sent again after 1 s
REFUSED_S = 60.0  # how long who was in before tries again: its key may be barred for what another with it did
AGAIN_S = 1.0  # between two such tries
IDENTITY_BYTES = 16
# A blob below this is copied on its way out: for each one that is not, pyzmq wakes a thread of its own, which takes the
# interpreter's lock. Of 64 KB, a rollout took its sender 50 to 70 us of CPU without the copy and 25 to 30 us with it.
COPIED_BYTES = 1 << 18
MAX_FRAMES = 4  # of a message that are kept: the peer, the header, the blob, and one that is too many


class Received(msgspec.Struct, frozen=True):
    """One message: who sent it, its checked header, its blob (alive as long as this is).

    key: the public half of the key that it came with, where links are encrypted
    size, header_size: bytes of all its frames, and of the header, or what stands in its place
    """

    peer: bytes
    message: Message | WireError
    blob: memoryview
    key: str = ""
    size: int = 0
    header_size: int = 0


class RolloutReceiver(Sockets):
    """The learner's end of every link. Used by one thread, except `wake`."""

    def __init__(
        self,
        listen: str,
        keys: KeyRing | None = None,
        *,
        insecure: bool = False,
        largest_bytes: int = MAX_BLOB_BYTES,
    ) -> None:
        """Listen.

        Args:
            listen: the address.
            keys: of those who may join, for an encrypted link.
            insecure: the user wants a link beyond this machine that is neither encrypted nor authenticated.
            largest_bytes: of a blob; the link of who sends more is ended before it is taken in.

        Raises:
            UsageError: the address cannot be had, or leaves this machine without keys.
        """
        super().__init__()
        self.gate: Gate | None = None
        self._cutters: dict[bytes, zmq.Socket[bytes]] = {}  # by the peer whose name they take
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, max(largest_bytes, 2 * MAX_HEADER_BYTES))
        try:
            if keys is not None:
                self.gate = Gate(self._context, keys.folder, keys.allowed)
                self.gate.protect(self._router, keys.learner().secret)
            elif security_of(listen, insecure=insecure) == "curve":
                raise UsageError(f"{listen} leaves this machine, and there are no keys for it")
            self.address = self._bound = bind(self._router, listen)
            self._router.bind(CUT)
        except BaseException:
            self.close()
            raise
        self.received_bytes = self.sent_bytes = 0
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wakened, zmq.POLLIN)

    def receive(self, timeout_s: float, limit: int = 64) -> Iterator[Received]:
        """Wait for messages until one comes, `wake` is called or the time is over; then yield what is there."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        while self._cutters:  # the poll has let them have their way
            self._cutters.popitem()[1].close()
        if self.gate is not None:
            self.gate.refresh()
        if self._wakened.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wakened.recv(4096)
        for _ in range(limit):
            try:
                frames = _receive_frames(self._router)
            except zmq.Again:
                return
            if frames[0].bytes in self._cutters:  # the rest of what it had sent
                continue
            received = _check_frames(frames, self.gate)
            del frames
            self.received_bytes += received.size
            yield received
            del received

    def cut(self, peer: bytes, key: str = "") -> None:
        """Read no more of what a peer sends, and let its key, if there is one, not in again for a while.

        The key of the run's own actors is not barred: its launcher ends who is cut off, and must be able to replace it.
        ROUTER_HANDOVER gives a name to the newest who claims it, and ends the link of who had it before.
        """
        if peer in self._cutters:
            return
        cutter = self._context.socket(zmq.DEALER)
        cutter.setsockopt(zmq.IDENTITY, peer)
        cutter.connect(CUT)
        self._cutters[peer] = cutter
        if self.gate is not None and key and self.gate.name(key) != LAUNCHED:
            self.gate.bar(key)

    def wake(self) -> None:
        """End a `receive` that waits in another thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"\0")

    def send(self, peer: bytes, message: Message, blob: bytes = b"") -> bool:
        """Send to one actor; False if it is not there or does not read any more."""
        header = encode_message(message)
        try:
            self._router.send_multipart([peer, header, blob], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:  # EHOSTUNREACH or EAGAIN: the peer is gone, or as good as gone
            return False
        self.sent_bytes += len(header) + len(blob)
        return True

    def close(self) -> None:
        """Close the sockets; an ipc path is removed."""
        self._router.close(linger=500)  # the goodbyes
        if self.gate is not None:
            self.gate.close()
        super().close()
        if hasattr(self, "_waker"):
            self._waker.close()
            self._wakened.close()


class Sent:
    """A message on its way, whose memory must not change yet."""

    def __init__(self, tracker: zmq.MessageTracker) -> None:
        self._tracker = tracker

    @property
    def done(self) -> bool:
        """Whether it has left."""
        return self._tracker.done

    def wait(self, timeout_s: float) -> None:
        """Wait until it has left; raises `TimeoutError`."""
        try:
            self._tracker.wait(timeout_s)
        except zmq.NotDone:
            raise TimeoutError(f"the learner did not take a message within {timeout_s:.0f} s") from None


GONE = Sent(zmq.MessageTracker())  # what was copied on its way out


class RolloutSender(Sockets):
    """An actor's end of the link, encrypted with a key if there is one."""

    def __init__(self, address: str, key: ActorKey | None = None) -> None:
        super().__init__()
        self._address, self._key = address, key
        self._identity = os.urandom(IDENTITY_BYTES - 1) + b"a"
        self._was_in = self._is_in = self._was_cut = False
        self._refused_at: float | None = None  # since when we are refused, if we are
        self._held: deque[Received] = deque()  # came while a send waited
        try:
            self._open()
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"cannot join {address!r}: {error}; expected ipc://PATH or tcp://HOST:PORT") from None

    def _open(self) -> None:
        """Connect; raises `zmq.ZMQError`."""
        self._dealer = self._socket(zmq.DEALER)
        self._is_in = False
        if self._key is not None:
            self._dealer.setsockopt(zmq.CURVE_SERVERKEY, self._key.learner.encode())
            self._dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._key.public.encode())
            self._dealer.setsockopt(zmq.CURVE_SECRETKEY, self._key.secret.encode())
        if "[" in self._address:
            self._dealer.setsockopt(zmq.IPV6, 1)
        refusals = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._events = self._dealer.get_monitor_socket(
            refusals | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._writable = zmq.Poller()
        self._writable.register(self._dealer, zmq.POLLOUT)
        for poller in (self._poller, self._writable):
            poller.register(self._events, zmq.POLLIN)
        self._dealer.setsockopt(zmq.IDENTITY, self._identity)
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)
        first_ms, most_ms = RECONNECT_MS["ipc" if self._address.startswith("ipc://") else "tcp"]
        self._dealer.setsockopt(zmq.RECONNECT_IVL, first_ms)
        self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, most_ms)
        self._dealer.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        self._dealer.connect(self._address)

    def send(self, message: Message, blob: memoryview | bytes = b"", timeout_s: float = 10.0) -> Sent:
        """Send without copying the blob; what comes back tells when its memory may change.

        Raises:
            TimeoutError: if no learner took it in time.
        """
        return self.send_frames(encode_message(message), blob, timeout_s)

    def send_frames(self, header: bytes, blob: memoryview | bytes, timeout_s: float = 10.0) -> Sent:
        """Send an encoded message; see `send`.

        Raises:
            TimeoutError: if no learner took it in time.
            ConnectionAbortedError: if the learner has said goodbye meanwhile.
            RunFailedError: if the learner does not let this actor in.
        """
        deadline = time.monotonic() + timeout_s
        while not self._begin(header):
            if self._dealer in dict(self._writable.poll(WRITE_POLL_MS)):
                continue
            self._hold_what_came()
            self._mind_events()
            if any(isinstance(received.message, Goodbye) for received in self._held):
                raise ConnectionAbortedError("the learner said goodbye")
            if time.monotonic() > deadline:
                other = ", or the key is another run's" if self._key is not None else ""
                raise TimeoutError(f"no learner took a message within {timeout_s:.0f} s: none is there{other}")
        if len(blob) < COPIED_BYTES:
            self._dealer.send(blob)
            return GONE
        tracker = self._dealer.send(blob, copy=False, track=True)
        assert tracker is not None  # noqa: S101 - track=True
        return Sent(tracker)

    def _hold_what_came(self) -> None:
        """Keep what has arrived until `receive` is called."""
        while (received := self._receive_now()) is not None:
            self._held.append(received)

    def _begin(self, header: bytes) -> bool:
        """Send the first of two frames, if the link takes a message now; it takes the other one with it."""
        try:
            self._dealer.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.Again:
            return False
        return True

    def offer(self, message: Message) -> bool:
        """Send a message without a blob, or not at all if no learner takes it now."""
        try:
            self._dealer.send_multipart([encode_message(message), b""], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    @property
    def was_cut(self) -> bool:
        """Whether the connection broke since this was asked last: what was on its way, in either direction, is lost."""
        found, self._was_cut = self._was_cut, False
        return found

    def receive(self, timeout_s: float) -> Received | None:
        """The next message, or None when the time is over or the connection broke.

        Raises:
            WireError: the learner sent something else than a message.
            RunFailedError: the learner does not let this actor in.
        """
        if self._held:
            return self._held.popleft()
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            if self._dealer in dict(self._poller.poll(int(left_s * 1000))):
                return self._receive_now()
            if self._mind_events() or time.monotonic() >= deadline:
                return self._held.popleft() if self._held else None

    def _mind_events(self) -> bool:
        """Note what became of the connection, and return whether it broke; raise if this actor is refused for good.

        ZeroMQ tells of a break before it stops taking messages for who is gone, so the next ones go over a new socket,
        unless it is already known to be connected again.
        """
        broke = down = False
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._was_in = self._is_in = True
                self._refused_at, down = None, False
            elif event == zmq.EVENT_DISCONNECTED:
                broke = down = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._may_try_again():
                time.sleep(AGAIN_S)  # ZeroMQ itself never knocks again after it was refused
                self._open_anew()
            else:
                self._refuse(event)
        self._was_cut |= broke
        if down and self._is_in:
            self._hold_what_came()
            self._open_anew()
        return broke

    def _may_try_again(self) -> bool:
        """Whether being refused need not be the end."""
        now = time.monotonic()
        if self._refused_at is None:
            self._refused_at = now
        return self._was_in and now - self._refused_at < REFUSED_S

    def _open_anew(self) -> None:
        """Connect with another socket; what the one before has not sent or received is gone."""
        self._dealer.disable_monitor()
        self._events.close()
        self._dealer.close(linger=0)
        self._open()

    def _refuse(self, event: int) -> NoReturn:
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise RunFailedError(
                "the learner does not let this key in: it was revoked, is another run's, or was cut off for a "
                "while for sending too much; `rustyrl keys list` there says which are let in"
            )
        if self._key is not None:
            raise RunFailedError(
                "what listens there does not take keys: is it a learner beyond loopback, and this run's?"
            )
        raise RunFailedError("what listens there wants a key: expected --key FILE, one of those in the run's keys/")

    def _receive_now(self) -> Received | None:
        try:
            frames = _receive_frames(self._dealer)
        except zmq.Again:
            return None
        received = _check_frames([zmq.Frame(b""), *frames])
        if isinstance(received.message, WireError):
            raise received.message
        return received


def _receive_frames(opened: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """One whole message, in place; raises `zmq.Again`. Frames know whether more follow: pyzmq asks the socket.

    Of one that has too many the first few and the last are kept.
    """
    frames = [opened.recv(zmq.NOBLOCK, copy=False)]
    while frames[-1].more:
        frames[min(len(frames), MAX_FRAMES) :] = [opened.recv(zmq.NOBLOCK, copy=False)]
    return frames


def _check_frames(frames: list[zmq.Frame], gate: Gate | None = None) -> Received:
    peer, key, sizes = frames[0].bytes, "", (sum(map(len, frames)), sum(map(len, frames[1:2])))
    try:
        if gate is not None:
            holder = gate.holder(frames[-1])
            if holder is None:
                raise WireError("key", "it came with a key that is not, or no more, let in")
            key = holder
        if len(frames) != 3:
            raise WireError("frames", f"{len(frames) - 1} frames or more, expected 2")
        message, blob = decode_header(frames[1].buffer), frames[2].buffer
        if len(blob) and not isinstance(message, WITH_BLOB):
            raise WireError(
                "malformed", f"{type(message).__name__} comes without a blob, this one has {len(blob)} bytes"
            )
    except WireError as error:
        return Received(peer, error, memoryview(b""), key, *sizes)
    return Received(peer, message, blob, key, *sizes)
