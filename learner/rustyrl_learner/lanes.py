"""Two things computed at the same time, and memory that is used over and over."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["Lanes", "Scratch"]


class Scratch:
    """Memory for what is forgotten soon, by name: who asks for a name again gets the same memory.

    On a CPU with `[4096, 64]` float32, products into fresh memory took twice as long as into memory just used. On other
    devices it is always fresh: torch keeps it there, and what is captured in a graph must not lose it to larger rooms.
    """

    def __init__(self) -> None:
        self._rooms: dict[Hashable, Tensor] = {}

    def __call__(self, name: Hashable, rows: int, columns: int, like: Tensor) -> Tensor:
        """Room for `[rows, columns]`; what stands in it is anything."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns)
        room = self._rooms.get(name)
        if room is None or room.shape[0] < rows or room.shape[1] != columns or room.dtype != like.dtype:
            room = self._rooms[name] = like.new_empty(rows, columns)
        return room if room.shape[0] == rows else room[:rows]


class Lanes:
    """Does two things one after the other, or at the same time, each with scratch memory.

    A policy and a critic that share nothing can be computed so. Torch's own threads share out every single operation
    instead: of small networks they make little of a second core, and both stand still while one core is busy elsewhere.
    """

    def __init__(self, threads: int = 1) -> None:
        # Torch's setting holds for the thread that makes it; another one would take every core for each operation.
        ours = (torch.set_num_threads, (torch.get_num_threads(),))
        self._pool = ThreadPoolExecutor(1, "lane", *ours) if threads > 1 else None
        self._first = Scratch()
        self._second = Scratch()

    def both(self, first: Callable[[Scratch], object], second: Callable[[Scratch], object], *, together: bool) -> None:
        """Do both, at the same time if that is asked for and there are threads for it.

        An exception of either is raised once both are done.
        """
        if self._pool is None or not together:
            first(self._first)
            second(self._first)
            return
        beside = self._pool.submit(second, self._second)
        try:
            first(self._first)
        finally:
            beside.result()

    def one(self, do: Callable[[Scratch], object]) -> None:
        """Do what cannot be split."""
        do(self._first)
