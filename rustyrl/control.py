"""The control socket: the launcher's, which answers the learner and the command line of this machine in JSON."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import zmq

from rustyrl.sockets import Sockets, bind

__all__ = ["ControlClient", "ControlServer", "decode_control"]

MAX_CONTROL_BYTES = 1 << 24  # a report names every actor, in some hundred bytes each
MAX_CONTROL_TURN = 256  # messages taken in before other things are looked at


class ControlServer(Sockets):
    """The launcher's socket: JSON requests from the learner and the command line, both on this machine."""

    def __init__(self, listen: str) -> None:
        super().__init__()
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
        try:
            self.address = self._bound = bind(self._router, listen)
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_s: float, descriptors: list[int]) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Wait until a message comes or one of the file descriptors is ready; yield the messages."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        for descriptor in descriptors:
            poller.register(descriptor, zmq.POLLIN)
        poller.poll(max(0, int(timeout_s * 1000)))
        for _ in range(MAX_CONTROL_TURN):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            peer, content = frames[0], decode_control(frames[1]) if len(frames) == 2 else None
            if content is not None:
                yield peer, content

    def send(self, peer: bytes, content: dict[str, Any]) -> None:
        """Answer or order; a peer that is gone is none of our business."""
        with contextlib.suppress(zmq.ZMQError):
            self._router.send_multipart([peer, msgspec.json.encode(content)], zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket; its path is removed."""
        self._router.close(linger=500)
        super().close()


class ControlClient(Sockets):
    """A peer of the launcher: the learner, or a verb of the command line."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._dealer = self._socket(zmq.DEALER)
        self._dealer.connect(address)

    def send(self, content: dict[str, Any]) -> None:
        """Send; raises `TimeoutError` if the launcher does not read."""
        try:
            self._dealer.send(msgspec.json.encode(content), zmq.NOBLOCK)
        except zmq.Again:
            raise TimeoutError("the launcher does not read its control socket") from None

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None when the time is over."""
        if not self._dealer.poll(max(0, int(timeout_s * 1000))):
            return None
        return msgspec.json.decode(self._dealer.recv(), type=dict[str, Any])

    def request(self, content: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send and wait for the answer; raises `TimeoutError`."""
        self.send(content)
        deadline = time.monotonic() + timeout_s
        answer = self.receive(deadline - time.monotonic())
        if answer is None:
            raise TimeoutError(f"the launcher did not answer within {timeout_s:.0f} s")
        return answer

    def close(self) -> None:
        """Close the socket after what was sent has left, within a limit."""
        self._dealer.close(linger=1000)
        super().close()


def decode_control(content: bytes) -> dict[str, Any] | None:
    """What a message on the control socket says; None if it is no JSON object."""
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (ValueError, RecursionError):  # of which msgspec's errors are
        return None
