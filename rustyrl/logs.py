"""The logs of child processes, kept small: a world that prints a line each step would fill the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

__all__ = ["LogKeeper"]

LARGEST_BYTES = 16 << 20
EVERY_S = 5.0


class LogKeeper:
    """Looks at the logs of a folder from time to time; of a large one, the newest part and the one before it stay.

    The processes go on writing into the same files, which they hold open for appending.
    """

    def __init__(self, folder: Path, largest_bytes: int = LARGEST_BYTES) -> None:
        self._folder = folder
        self._largest_bytes = largest_bytes
        self._looked_at = time.monotonic()

    def turn(self) -> None:
        """Look, if it is time to."""
        if time.monotonic() - self._looked_at >= EVERY_S:
            self._looked_at = time.monotonic()
            self.look()

    def look(self) -> None:
        """Move what is too large to ``NAME.log.1``, in place of what was moved there before."""
        for log in self._folder.glob("*.log"):
            with contextlib.suppress(OSError):  # a full disk: truncating comes first then, and what was there is gone
                if log.stat().st_size > self._largest_bytes:
                    try:
                        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
                    finally:
                        os.truncate(log, 0)
