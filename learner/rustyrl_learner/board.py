"""Numbers for TensorBoard: one event for all of an update, which takes a fifteenth of an event for each number."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

__all__ = ["Board"]

FILE_VERSION = "brain.Event:2"  # of the format; from it on TensorBoard heeds the start of a session


class Board:
    """A TensorBoard event file in a folder; a thread of its own writes it."""

    def __init__(self, folder: Path, purged: int | None = None) -> None:
        """Open a new file.

        Args:
            folder: of the run.
            purged: the step from which on TensorBoard forgets what older files say; None keeps everything.
        """
        self._writer = EventFileWriter(str(folder))
        if purged is not None:
            self._write(Event(step=purged, file_version=FILE_VERSION))
            self._write(Event(step=purged, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Have one number for each name written; raises `OSError` if an earlier one could not be."""
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)
