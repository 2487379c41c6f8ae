"""Open files and connections of this process: as many as the system allows, and a warning before there are no more."""

from __future__ import annotations

import contextlib
import time

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["DescriptorWatch"]

WANTED = 65_536  # more than any cluster has connections
SCARCE = 0.8  # of the limit
LOOK_S = 1.0
AGAIN_S = 60.0


class DescriptorWatch:
    """Raises the limit of this process, and says from time to time how near it is."""

    def __init__(self) -> None:
        """Raise the soft limit as far as the hard one lets it."""
        self._looked = self._said = -float("inf")
        self._process = psutil.Process()
        if resource is None:
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # not on every system that says so
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def look(self) -> str:
        """What to say about it, if anything."""
        now = time.monotonic()
        if resource is None or now - self._looked < LOOK_S:
            return ""
        self._looked = now
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            used = self._process.num_fds()
        except (OSError, psutil.Error):  # looking takes one, too
            used = limit
        if limit == resource.RLIM_INFINITY or used < SCARCE * limit or now - self._said < AGAIN_S:
            return ""
        self._said = now
        return (
            f"{used} of {limit} descriptors of the learner are in use, most by connections: when all are, nobody "
            "can join and no checkpoint be written; shut strangers out with a firewall, or raise ulimit -n"
        )
