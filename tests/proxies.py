"""A network that is slow, and never equally slow, in front of a learner."""

from __future__ import annotations

import random
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["delaying_proxy"]


@contextmanager
def delaying_proxy(target: tuple[str, int], most_s: float = 0.02) -> Iterator[int]:
    """Pass tcp connections on to the target, holding every chunk up for up to ``most_s``; gives its own port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stopping = threading.Event()
    threads: list[threading.Thread] = []
    clock = random.Random()

    def pump(client: socket.socket) -> None:
        with (
            suppress(OSError),
            client,
            socket.create_connection(target) as server,
            selectors.DefaultSelector() as ready,
        ):
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not stopping.is_set():
                for key, _ in ready.select(0.1):
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        return
                    stopping.wait(clock.random() * most_s)
                    key.data.sendall(data)

    def accept() -> None:
        while not stopping.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=pump, args=(client,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        acceptor.join(10)
        for thread in threads:
            thread.join(10)
        listener.close()
