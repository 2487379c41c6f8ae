"""A child process does not outlive the process that started it, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

__all__ = ["allow_tracing", "die_with_parent"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_PTRACER = 0x59616D61  # the same; "Yama"
POLL_S = 1.0


def die_with_parent(parent: int) -> None:
    """Arrange that this process is killed when its parent, process id ``parent``, ends.

    On Linux the kernel does it; elsewhere a thread looks once a second. 0 is a process started by hand.
    """
    if not parent:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was told
            os._exit(1)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()


def allow_tracing(parent: int) -> None:
    """Let ``parent`` and what it starts look into this process, where only a process's own parent may (Yama)."""
    if sys.platform == "linux" and parent:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PTRACER, ctypes.c_ulong(parent), 0, 0, 0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
