"""Imports that take long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector away from what is imported in the block, then and for good, and all that was there.

    Torch makes 180,000 objects that stay. To look through them again and again took 0.5 of 1.75 s of processor time
    between the start and the end of a process that does nothing but import the learner.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
