"""Two machines on one: network namespaces of Linux, joined by a wire that can be cut, clogged and made to lose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["HERE", "THERE", "Boundary", "boundary"]

HERE, THERE = "10.213.77.1", "10.213.77.2"
TOOLS = ("ip", "iptables", "tc")


class Boundary:
    """Two network namespaces: ``here`` is the learner's machine, ``there`` another."""

    def __init__(self) -> None:
        self._here, self._there = (f"rustyrl-{side}-{os.getpid()}" for side in ("here", "there"))
        self._wire = f"rl{os.getpid()}"

    @property
    def here(self) -> list[str]:
        """What a command begins with that is to run on the learner's machine."""
        return ["ip", "netns", "exec", self._here]

    @property
    def there(self) -> list[str]:
        """The same for the other machine."""
        return ["ip", "netns", "exec", self._there]

    def build(self) -> None:
        """Make both and the wire."""
        _do("ip", "netns", "add", self._here)
        _do("ip", "netns", "add", self._there)
        ends = f"{self._wire}h", f"{self._wire}t"
        _do("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, name, address in zip(ends, (self._here, self._there), (HERE, THERE), strict=True):
            _do("ip", "link", "set", end, "netns", name)
            inside = ["ip", "netns", "exec", name, "ip"]
            _do(*inside, "address", "add", f"{address}/30", "dev", end)
            _do(*inside, "link", "set", end, "up")
            _do(*inside, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove both, and the wire with them."""
        for name in (self._here, self._there):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Meanwhile nothing passes, in neither direction, and nobody is told."""
        with self._rule("INPUT", "-s", THERE, "-j", "DROP"), self._rule("OUTPUT", "-d", THERE, "-j", "DROP"):
            yield

    @contextmanager
    def losing(self, share: float) -> Iterator[None]:
        """Meanwhile every packet is lost by this chance, in both directions."""
        chance = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
        with self._rule("INPUT", "-s", THERE, *chance), self._rule("OUTPUT", "-d", THERE, *chance):
            yield

    @contextmanager
    def resetting(self) -> Iterator[None]:
        """Meanwhile every connection is reset that carries anything."""
        with self._rule("INPUT", "-s", THERE, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"):
            yield

    @contextmanager
    def narrow(self, rate: str) -> Iterator[None]:
        """Meanwhile no more passes than this, such as ``10mbit``."""
        ends = (self.here, f"{self._wire}h"), (self.there, f"{self._wire}t")
        for prefix, end in ends:
            bucket = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
            _do(*prefix, "tc", "qdisc", "add", "dev", end, *bucket)
        try:
            yield
        finally:
            for prefix, end in ends:
                _do(*prefix, "tc", "qdisc", "del", "dev", end, "root")

    @contextmanager
    def _rule(self, chain: str, *rule: str) -> Iterator[None]:
        _do(*self.here, "iptables", "-I", chain, *rule)
        try:
            yield
        finally:
            _do(*self.here, "iptables", "-D", chain, *rule)


@contextmanager
def boundary() -> Iterator[Boundary]:
    """A fresh one; skips, with the reason, where it cannot be had."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces are made by root on Linux")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    made = Boundary()
    try:
        made.build()
        with made.cut(), made.losing(0.5):
            pass
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"this kernel does not do it: {error.stderr.decode().strip()}")
    try:
        yield made
    finally:
        made.remove()


def _do(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)
