"""What an actor is doing, written into memory that outlives it, so that its death or its standstill can be explained.

The launcher makes the memory and the actor inherits it by file descriptor: no name, no file, nothing to clean up.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import sys
import tempfile
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["BlackBox", "Deed"]

Arrays = dict[str, NDArray[np.generic]]

ROOM = 1 << 20  # bytes; untouched pages cost nothing
NOW = struct.Struct("=qqqqq")  # tickets answered, then the fields of a deed
LAYOUT_AT = 64  # u32 length and JSON: what the actions are
ACTIONS_AT = 4096
ALIGNMENT = 64
IDLE, BUILDING = -1, -1
Count = Annotated[int, msgspec.Meta(ge=0)]
Layout = tuple[dict[str, tuple[str, list[Count], Count]], dict[int, tuple[Count, Count]]]  # parts, worlds' slots


@dataclass(frozen=True, slots=True)
class Deed:
    """What an actor does now.

    world: which one is in hand, -1 while it waits for tickets
    batch: the ticket's
    built: the batch that the world's episodes began with: it was seeded by (run seed, world, built)
    step: env step of the rollout, -1 while the world is built or reset
    """

    world: int
    batch: int
    built: int
    step: int

    @property
    def idle(self) -> bool:
        """Whether no world is in hand."""
        return self.world == IDLE


class BlackBox:
    """One actor's memory: the actor writes it, the launcher reads it, at any time."""

    def __init__(self, descriptor: int) -> None:
        """Map what `create` made; ``descriptor`` stays open until `close`."""
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, ROOM)
        self._answered: int = NOW.unpack_from(self._memory, 0)[0]

    @classmethod
    def create(cls) -> BlackBox | None:
        """Memory for a child process; None where descriptors cannot be inherited or there is no memory for it."""
        if sys.platform == "win32":
            return None
        try:
            descriptor = os.memfd_create("rustyrl") if hasattr(os, "memfd_create") else _nameless_file()
        except OSError:
            return None
        try:
            os.ftruncate(descriptor, ROOM)
            box = cls(descriptor)
        except OSError:
            os.close(descriptor)
            return None
        box.rest()
        return box

    # The actor's side

    def note(self, world: int, batch: int, built: int, step: int) -> None:
        """Say what is begun now; costs a quarter of a microsecond."""
        NOW.pack_into(self._memory, 0, self._answered, world, batch, built, step)

    def rest(self, answered: int = 0) -> None:
        """Say that nothing is to be done, after so many tickets."""
        self._answered = answered
        self.note(IDLE, 0, 0, BUILDING)

    def actions(
        self, like: dict[str, NDArray[np.generic]], columns: dict[int, slice]
    ) -> dict[str, NDArray[np.generic]]:
        """Arrays like these in this memory, so that the last actions stay known without being copied.

        Args:
            like: part to `[W, ...]`.
            columns: the W slots' worlds.

        Returns:
            The arrays, zero; ordinary ones if they do not fit.
        """
        struct.pack_into("=I", self._memory, LAYOUT_AT, 0)  # none, until it is whole and the arrays are as it says
        layout, at = {}, ACTIONS_AT
        for name, array in like.items():
            layout[name] = (array.dtype.str, array.shape, at)
            at += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        slots = {world: (columns.start, columns.stop) for world, columns in columns.items()}
        content = msgspec.json.encode((layout, slots))
        if at > ROOM or len(content) > ACTIONS_AT - LAYOUT_AT - 4:
            return {name: np.zeros_like(array) for name, array in like.items()}
        arrays = {name: self._array(dtype, shape, offset) for name, (dtype, shape, offset) in layout.items()}
        for array in arrays.values():
            array[...] = 0
        self._memory[LAYOUT_AT + 4 : LAYOUT_AT + 4 + len(content)] = content
        struct.pack_into("=I", self._memory, LAYOUT_AT, len(content))
        return arrays

    # The launcher's side

    @property
    def answered(self) -> int:
        """Tickets that the actor has answered."""
        answered: int = NOW.unpack_from(self._memory, 0)[0]
        return answered

    def deed(self) -> Deed:
        """What the actor is doing."""
        return Deed(*NOW.unpack_from(self._memory, 0)[1:])

    def last_action(self) -> dict[str, Any] | None:
        """Part to the actions `[E, ...]` that the world in hand was given last; None if they were not kept."""
        (length,) = struct.unpack_from("=I", self._memory, LAYOUT_AT)
        world = self.deed().world
        try:
            layout, slots = msgspec.json.decode(self._memory[LAYOUT_AT + 4 : LAYOUT_AT + 4 + length], type=Layout)
            start, stop = slots[world]
            return {name: self._array(*entry)[start:stop].copy() for name, entry in layout.items()}
        except (msgspec.DecodeError, LookupError, ValueError, TypeError, OverflowError):  # none, or overwritten
            return None

    def close(self) -> None:
        """Give the memory back."""
        with contextlib.suppress(BufferError):  # an array of it is still in use: it goes when that goes
            self._memory.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _array(self, dtype: str, shape: list[int] | tuple[int, ...], offset: int) -> NDArray[Any]:
        # Not np.ndarray(buffer=...): that would not keep the memory from being closed under it.
        array: NDArray[Any] = np.frombuffer(self._memory, np.dtype(dtype), math.prod(shape), offset)
        return array.reshape(shape)


def _nameless_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
