"""A Prometheus endpoint of the launcher: the status of the run as metrics, for whoever scrapes them on this machine.

The launcher hands a new status over about once a second; a scrape reads the newest and never waits for the launcher.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from rustyrl.errors import UsageError
from rustyrl.metrics import FIGURES, PREFIX

__all__ = ["Exporter", "families", "parse_address"]

log = logging.getLogger(__name__)

EVERY_S = 1.0  # a status is fresh for so long
POLL_S = 0.1  # how often the server looks whether it is to end
Status = dict[str, Any]


def families(status: Status) -> Iterator[Metric]:
    """The metrics of a status; what is not known is left out."""
    common = {"run": status["run"].replace("\\", "/").rpartition("/")[2], "env": status["env"]}
    for figure in FIGURES:
        known = {tuple(labels.items()): value for labels, value in figure.samples(status) if value is not None}
        if not known:
            continue
        kind = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
        names = [*common, *(name for name, _ in next(iter(known)))]
        family = kind(PREFIX + figure.name, figure.meaning, labels=names)
        for labels, value in known.items():
            family.add_metric([*common.values(), *(text for _, text in labels)], float(value))
        yield family


class Exporter(Collector):
    """Listens while it is entered."""

    def __init__(self, address: str) -> None:
        """Listen.

        Raises:
            UsageError: the address is of another machine, or in use.
        """
        host, port = parse_address(address)
        self._status: Status | None = None
        self._offered_at = -EVERY_S
        registry = CollectorRegistry()
        registry.register(self)
        server: type[_Server] = _Server if ":" not in host else _Server6
        try:
            self._server = make_server(host, port, make_wsgi_app(registry), server, _Handler)
        except OSError as error:
            raise UsageError(f"cluster.prometheus: cannot listen on {address}: {error.strerror or error}") from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="exporter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)

    def offer(self, look: Callable[[], Status]) -> None:
        """Take the status, if the last one is no longer fresh; called by the launcher's own thread."""
        if time.monotonic() - self._offered_at >= EVERY_S:
            self._offered_at = time.monotonic()
            self._status = look()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus asks for, in a thread of its own."""
        status = self._status
        return iter(()) if status is None else families(status)


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; raises `UsageError`."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isdigit() and int(port) < 65536):
        raise UsageError(f"cluster.prometheus takes HOST:PORT such as 127.0.0.1:9095, got {address!r}")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            f"cluster.prometheus: {address!r} can be reached from other machines, and nobody who reads it is asked "
            "who they are; expected a loopback address such as 127.0.0.1:9095"
        )
    return host, int(port)


class _Handler(WSGIRequestHandler):
    timeout = 5.0  # seconds for a request to come

    def log_message(self, *_: Any) -> None:
        """Say nothing: the launcher's terminal is not ours."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """A scraper that hangs or goes away in between is its own affair."""
        log.debug("a scrape from %s failed", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6
