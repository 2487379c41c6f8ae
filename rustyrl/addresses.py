"""Where a learner listens and actors join: what an address may be, who can reach it, and how others name it."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Literal

from rustyrl.errors import UsageError

__all__ = ["Security", "join_address", "listen_address", "local_address", "named_address", "security_of"]

Security = Literal["ipc", "loopback", "curve", "insecure"]

EXPECTED = "expected ipc://PATH or tcp://HOST:PORT, port 0 for any free one"
TCP = re.compile(r"tcp://(?:\[(?P<six>[^\]]*)\]|(?P<host>[^:/?#\[\]]*)):(?P<port>\*|[0-9]{1,5})", re.ASCII)
ELSEWHERE = ("192.0.2.1", 9)  # of a network kept for documentation (RFC 5737); nothing is sent there


@dataclass(frozen=True, slots=True)
class _Place:
    """The host and the port of a tcp address; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port or '*'}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        ip = _ip(self.host)
        return self.host == "localhost" if ip is None else ip.is_loopback


def listen_address(text: str) -> str:
    """Check what follows ``--listen`` and return it as ZeroMQ binds it; raises `UsageError`."""
    if _is_ipc(text):
        return text
    place = _parse(text)
    if place.host == "localhost":
        place = _Place("127.0.0.1", place.port)
    elif _ip(place.host) is None and place.host not in {name for _, name in _interfaces()}:
        place = _Place(_resolve(place.host), place.port)
    return str(place)


def security_of(address: str, *, insecure: bool) -> Security:
    """What protects a link at a checked address; tcp beyond loopback is encrypted unless that is declined."""
    if _is_ipc(address):
        return "ipc"
    if _parse(address).loopback:
        return "loopback"
    return "insecure" if insecure else "curve"


def join_address(text: str, *, keyed: bool, insecure: bool) -> str:
    """Check what follows ``--join`` and return it as ZeroMQ connects to it.

    Args:
        text: the address.
        keyed: there is a key, so the link will be encrypted.
        insecure: the user wants it without, wherever it leads.

    Raises:
        UsageError: it is no address, has no host or port to connect to, or leaves this machine without a key.
    """
    if keyed and insecure:
        raise UsageError("--key encrypts the link and --insecure declines that; give one of them")
    if _is_ipc(text):
        if keyed:
            raise UsageError(f"{text!r} stays on this machine and takes no --key")
        return text
    place = _parse(text)
    if not place.port:
        raise UsageError(f"{text!r} has no port to join; the learner prints the address that it listens on")
    ip = _ip(place.host)
    if ip is not None and ip.is_unspecified:
        raise UsageError(f"{text!r} is no machine; name the learner's: tcp://HOST:{place.port}")
    if not (keyed or insecure or place.loopback):
        raise UsageError(
            f"{text!r} leaves this machine: expected --key FILE, one of those that the learner keeps in RUN/keys/ "
            "(rustyrl keys new NAME makes one); --insecure joins a learner that was started with --insecure, too"
        )
    if ip is None:
        place = _Place("127.0.0.1" if place.host == "localhost" else _resolve(place.host), place.port)
    return str(place)


def local_address(bound: str) -> str:
    """How an actor of this machine joins what is bound there."""
    place = _of_every_interface(bound)
    if place is None:
        return bound
    return str(_Place("::1" if ":" in place.host else "127.0.0.1", place.port))


def named_address(bound: str) -> str:
    """How another machine is told to join what is bound there: for all interfaces, by that of its default route."""
    place = _of_every_interface(bound)
    if place is None:
        return bound
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(ELSEWHERE)  # chooses a route and sends nothing
        return str(_Place(asked.getsockname()[0], place.port))
    return str(_Place(socket.gethostname(), place.port))


def _of_every_interface(bound: str) -> _Place | None:
    """What is bound there, if that is every interface of this machine."""
    if _is_ipc(bound):
        return None
    place = _parse(bound)
    ip = _ip(place.host)
    return place if ip is not None and ip.is_unspecified else None


def _is_ipc(address: str) -> bool:
    return address.startswith("ipc://") and len(address) > len("ipc://")


def _parse(text: str) -> _Place:
    if text.startswith("tcp://*"):
        raise UsageError(f"{text!r} would listen to every network; say so if you mean it: tcp://0.0.0.0:PORT")
    match = TCP.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no address; {EXPECTED} (IPv6: tcp://[::1]:PORT)")
    host = match["six"] if match["host"] is None else match["host"]
    ip = _ip(host)
    if not host or (match["six"] is not None and (ip is None or ip.version != 6)):
        raise UsageError(f"{text!r} names no host; {EXPECTED}")
    port = 0 if match["port"] == "*" else int(match["port"])
    if port > 65535:
        raise UsageError(f"{text!r}: there is no port {port}; {EXPECTED}")
    return _Place(host, port)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _interfaces() -> list[tuple[int, str]]:
    return socket.if_nameindex() if hasattr(socket, "if_nameindex") else []


def _resolve(host: str) -> str:
    """The address of a machine by its name, IPv4 if it has one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"there is no machine {host!r}: {error}") from None
    addresses = sorted((family == socket.AF_INET6, str(where[0])) for family, *_, where in found)
    return addresses[0][1]
