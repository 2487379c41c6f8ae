"""What all sockets of ours have in common: a context that is closed with them, limits, how they bind.

Every wait has a limit, and queues are bounded. ZeroMQ's own heartbeats stay off: they would cut the link of a process
that is only stopped for a while, and what was on its way would be lost.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from rustyrl.errors import UsageError
from rustyrl.wire import MAX_BLOB_BYTES

__all__ = ["HANDSHAKE_MS", "Sockets", "bind", "has_ipc"]

HANDSHAKE_MS = 2000
# A tcp connection whose packets were not answered for so long is given up, on both sides: the kernel waits longer and
# longer between two tries, and would notice a network that is back up to a minute late.
UNANSWERED_MS = 4000
# Messages that one peer may have waiting: tickets bound them to a handful, this bounds a hostile peer.
HIGH_WATER_MARK = 256


class Sockets:
    """Owns one context and what was opened on it."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)
        self._bound: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every socket; what could not be sent within their linger is gone."""
        self._context.destroy()
        if self._bound is not None and self._bound.startswith("ipc://"):
            Path(self._bound.removeprefix("ipc://")).unlink(missing_ok=True)  # ZeroMQ leaves it
            self._bound = None

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        opened = self._context.socket(kind)
        opened.setsockopt(zmq.MAXMSGSIZE, MAX_BLOB_BYTES)
        opened.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        opened.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        opened.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        opened.setsockopt(zmq.TCP_MAXRT, UNANSWERED_MS)
        return opened


def has_ipc() -> bool:
    """Whether processes of this machine can talk over Unix sockets."""
    return bool(zmq.has("ipc")) and sys.platform != "win32"


def bind(bound: zmq.Socket[bytes], listen: str) -> str:
    """Bind a socket, one on ipc for nobody but this user; its address.

    Raises:
        UsageError: it cannot listen there, and why.
    """
    if "[" in listen:
        bound.setsockopt(zmq.IPV6, 1)
    try:
        bound.bind(listen)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise UsageError(f"{listen} is in use; choose another port, or port 0 for a free one") from None
        raise UsageError(f"cannot listen on {listen}: {error}") from None
    address = bound.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)  # noqa: S101 - what this option always is
    text = address.rstrip(b"\0").decode()
    if text.startswith("ipc://"):
        os.chmod(text.removeprefix("ipc://"), stat.S_IRUSR | stat.S_IWUSR)  # noqa: PTH101 - a socket, not a file
    return text
