"""What a run leaves behind to be read: ``metrics.jsonl`` and TensorBoard files, one row an update, stable names."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rustyrl.figures import episode_figures
from rustyrl.rollout import EpisodeRows
from rustyrl.run_folder import write_atomic
from rustyrl.spec import EnvironmentSpec
from rustyrl_learner.board import Board

__all__ = ["EpisodeWindow", "MetricsLog"]

REOPEN_S = 10.0  # how long TensorBoard is left alone after its disk was full
WINDOW = 200  # episodes that the training figures are over


class EpisodeWindow:
    """The newest training episodes, summed up as the world's declared metrics."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec
        self._episodes: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._figures: dict[str, float] = {}  # summed up once a batch: they are read several times

    def add(self, episodes: EpisodeRows) -> None:
        """Take in the episodes of one batch."""
        for row in range(len(episodes.slot)):
            episode = {name: float(values[row]) for name, values in episodes.metrics.items()}
            episode["return"] = float(episodes.episode_return[row])
            episode["length"] = float(episodes.length[row])
            self._episodes.append(episode)
        if len(episodes.slot):
            self._sum_up()

    def figures(self) -> dict[str, float]:
        """``return_mean, return_std, length_mean`` and the declared metrics; empty before the first episode."""
        return self._figures

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """The episodes as arrays `[episodes]` by name: what `set_columns` goes on from."""
        return {name: np.array([e[name] for e in self._episodes]) for name in (self._episodes or [{}])[0]}

    def set_columns(self, columns: dict[str, NDArray[np.float64]]) -> None:
        """Put back what `columns` gave."""
        self._episodes.clear()
        rows = zip(*(array.tolist() for array in columns.values()), strict=True)
        self._episodes.extend(dict(zip(columns, row, strict=True)) for row in rows)
        if self._episodes:
            self._sum_up()

    def _sum_up(self) -> None:
        columns = self.columns()
        self._figures = episode_figures(self._spec, columns.pop("return"), columns.pop("length"), columns)


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and to a TensorBoard event file.

    On resume, rows after the checkpoint are cut off first, so that no update stands there twice.
    """

    def __init__(self, run: Path, after_version: int) -> None:
        self._path = run / "metrics.jsonl"
        purged_from = self._cut_after(after_version)
        self._file = self._path.open("ab", buffering=0)
        self._open_board: Callable[[int | None], Board] = lambda purged: Board(run, purged)
        self._board: Board | None = self._open_board(purged_from)
        self._reopen_at = 0.0
        self.lost = 0  # rows that could not be written

    def write(self, row: dict[str, Any]) -> None:
        """Write one row; nested mappings become ``outer/inner`` names in TensorBoard.

        A full disk loses rows, each whole, and goes on with those that fit again.

        Raises:
            OSError: if this row could not be written to one of the two.
        """
        try:
            self._append(msgspec.json.encode(row) + b"\n")
        finally:
            self._show(row)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _append(self, line: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            self.lost += 1
            self._file.truncate(start)
            raise

    def _show(self, row: dict[str, Any]) -> None:
        """Hand the numbers of a row to TensorBoard, whose writer does not work again once it has failed."""
        if self._board is None and time.monotonic() < self._reopen_at:
            return
        step = row["steps"]
        try:
            self._board = self._board or self._open_board(None)
            numbers: dict[str, float] = {}
            for name, value in row.items():
                values = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
                for key, number in values.items():
                    if isinstance(number, int | float) and math.isfinite(number):
                        numbers[key] = number
            self._board.add(step, numbers)
        except OSError:
            board, self._board = self._board, None
            self._reopen_at = time.monotonic() + REOPEN_S
            with contextlib.suppress(Exception):
                if board is not None:
                    board.close()
            raise

    def _cut_after(self, version: int) -> int | None:
        """Cut off rows above a version; the step from which TensorBoard is to forget its own, None without any rows."""
        if not self._path.exists():
            return None
        kept: list[bytes] = []
        steps = -1  # so that with no row left all of them go, those of a warm-up at step 0 too
        for line in self._path.read_bytes().splitlines():
            try:
                row = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:
                break  # a line that was being written when the run ended
            if row.get("policy_version", 0) > version:
                break
            kept.append(line)
            steps = row.get("steps", 0)
        write_atomic(self._path, b"".join(line + b"\n" for line in kept))
        return steps + 1
