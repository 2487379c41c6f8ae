"""Processes that let others go first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rustyrl.processes import start_child


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="needs Unix")
def test_a_process_steps_back_and_with_it_the_session_that_it_is(tmp_path):
    """Linux may share out cores by session first; niceness alone changed nothing there."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    child = start_child("actor 0", ["rustyrl_actors", "await"], tmp_path / "log", actor=True, niceness=7)
    try:
        assert os.getpriority(os.PRIO_PROCESS, child.process.pid) == min(19, before + 7)
        group = Path(f"/proc/{child.process.pid}/autogroup")
        if group.exists():
            assert group.read_text().split()[1:] == ["nice", str(min(19, before + 7))]
            assert group.read_text() != Path("/proc/self/autogroup").read_text()
    finally:
        child.process.kill()
        child.process.wait(10)
        child.close()
