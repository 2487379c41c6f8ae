"""``rustyrl train --profile``: what torch and the learner's Python do in a few updates, for Perfetto.

The file is a chrome trace: https://ui.perfetto.dev or chrome://tracing open it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rustyrl.profiler import free_path

__all__ = ["UpdateTrace"]

FIRST, LAST = 5, 8  # updates of this process, from 1: by then every buffer has been used


class UpdateTrace:
    """Records the updates FIRST to LAST; before and after them it costs a comparison an update."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = 0
        self._profile: Any = None
        self.problem = ""  # why there is no trace

    def begin_update(self) -> None:
        """Another update begins: start recording if it is the first to be recorded, write if the last has passed."""
        self._begun += 1
        if self._begun == FIRST:
            self._attempt(self._start)
        elif self._begun == LAST + 1:
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._profile is not None:
            self._attempt(self._write)
            self._profile = None

    def _attempt(self, what: Any) -> None:
        """A trace that cannot be had is no reason not to train."""
        try:
            what()
        except (OSError, RuntimeError) as error:
            self._profile, self.problem = None, f"no trace of updates: {error}"

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile  # not needed by other runs

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, with_stack=True)
        self._profile.start()

    def _write(self) -> None:
        self._profile.stop()
        self._profile.export_chrome_trace(str(free_path(self._folder, "learner-updates", ".trace.json")))
