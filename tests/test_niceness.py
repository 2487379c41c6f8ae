"""Processes that let others go first."""

from __future__ import annotations

import os

import pytest

from rustyrl.processes import start_child


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="needs Unix")
def test_a_process_steps_back_within_our_session(tmp_path):
    """Linux may share out cores by session before it looks at niceness; Ctrl-C is for a process group."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    child = start_child("actor 0", ["rustyrl_actors", "await"], tmp_path / "log", actor=True, niceness=7)
    try:
        assert os.getpriority(os.PRIO_PROCESS, child.process.pid) == min(19, before + 7)
        assert os.getsid(child.process.pid) == os.getsid(0)
        assert os.getpgid(child.process.pid) == child.process.pid
    finally:
        child.process.kill()
        child.process.wait(10)
        child.close()
