"""Curve: encrypted links between those who know each other's public keys (RFC 26 of ZeroMQ), and who is let in.

Without an authenticator, a Curve server lets any key in; ours is told never to (`zmq.ZAP_ENFORCE_DOMAIN`), and each
message is held against the keys that are allowed at that time, so that a revoked one is good for nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from rustyrl.errors import UsageError

__all__ = ["Gate", "Pair", "make_pair", "public_of"]

log = logging.getLogger(__name__)

DOMAIN = "rustyrl"
LOOK_S = 0.2  # how often it is looked whether keys came or went
READ_S = 5.0  # how often they are read in any case: a folder's time of change is no finer than its clock
BARRED_S = 10.0  # how long a key is barred that was cut off, doubled each time
BARRED_MAX_S = 600.0

Pair = tuple[str, str]  # public and secret half


def make_pair() -> Pair:
    """A new pair of keys, as Z85 text."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_of(secret: str) -> str:
    """The public half that belongs to a secret one; raises `ValueError`."""
    try:
        return zmq.curve_public(secret.encode()).decode()
    except zmq.ZMQError:  # letters that Z85 has, and a number that it has not
        raise ValueError("not half of a pair") from None


class Gate:
    """Lets allowed keys in, and knows whose a message is. `refresh`, `bar` and `holder` belong to one thread."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, allowed: Callable[[], dict[str, str]]
    ) -> None:
        """Begin to answer handshakes; this must be before the socket binds.

        Args:
            context: of the socket to protect.
            folder: changes when keys come or go.
            allowed: reads the names of the allowed keys, by their public halves; raises `UsageError` if it cannot.
        """
        from zmq.auth.thread import ThreadAuthenticator  # asyncio: of no use to who has no gate

        self._folder = folder
        self._read = allowed
        self._allowed = allowed()
        self._changed = self._looked = self._taken = -float("inf")
        self._unread = False
        self._barred: dict[str, tuple[float, float]] = {}  # public half: until when, and for how long
        self.refused = 0  # handshakes
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, self)

    def protect(self, server: zmq.Socket[bytes], secret: str) -> None:
        """Have a socket, before it binds, speak to nobody but those who are let in."""
        server.setsockopt(zmq.CURVE_SERVER, 1)
        server.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
        server.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        server.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def callback(self, _domain: str, public: bytes) -> bool:
        """Whether a key is let in; the authenticator's thread asks at each handshake."""
        text = public.decode()
        known = text in self._allowed and time.monotonic() >= self._barred.get(text, (0.0, 0.0))[0]
        self.refused += not known
        return known

    def refresh(self) -> None:
        """Look whether keys came or went, from time to time."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            changed = self._folder.stat().st_mtime
            if changed != self._changed or now - self._taken > READ_S:
                self._allowed, self._changed, self._taken = self._read(), changed, now
                self._unread = False
        except (OSError, UsageError) as error:  # who was let in stays, nobody else is
            if not self._unread:
                log.warning("the keys in %s stay what they were: %s", self._folder, error)
            self._unread = True

    def holder(self, frame: zmq.Frame) -> str | None:
        """The public half of the allowed key that a message came with; None if there is none."""
        try:
            public = str(frame.get("User-Id"))
        except zmq.ZMQError:
            return None
        return public if public in self._allowed else None

    def name(self, public: str) -> str | None:
        """What an allowed key is called; None if it is not allowed."""
        return self._allowed.get(public)

    def bar(self, public: str) -> float:
        """Let a key in no more for a while, each time longer; returns for how long (s)."""
        _, before_s = self._barred.get(public, (0.0, BARRED_S / 2))
        time_s = min(2 * before_s, BARRED_MAX_S)
        self._barred[public] = (time.monotonic() + time_s, time_s)
        return time_s

    def close(self) -> None:
        """Answer no more handshakes: from now on nobody is let in."""
        self._authenticator.stop()
