"""One esper world context of our own, whatever else in this process uses esper."""

from __future__ import annotations

import itertools
import random
from typing import Any

import esper
import numpy as np

__all__ = ["Context"]

_names = (f"rustyrl-{number}" for number in itertools.count())


class Context:
    """A named esper world that is entered before anything of it is touched.

    With ``global_random`` the global generators of Python's `random` and of numpy belong to it while it is entered:
    a game that draws from them has a state of its own there, as if it were alone in the process.
    """

    _drawing: Context | None = None  # whose state stands in the global generators

    def __init__(self, *, global_random: bool = False) -> None:
        self._name = next(_names)
        self._global_random = global_random
        self._python: tuple[Any, ...] | None = None
        self._numpy = np.random.MT19937(0)
        self._normal: float | None = None  # numpy's global generator draws normals in pairs and keeps the second

    def enter(self) -> None:
        """Make it the current esper world."""
        if esper.current_world != self._name:
            esper.switch_world(self._name)
        if self._global_random and Context._drawing is not self:
            self._take_over()

    def seed(self, generator: np.random.Generator) -> None:
        """Enter it and seed its part of the global generators, if it has one."""
        self.enter()
        if self._global_random:
            random.seed(int(generator.integers(2**62)))
            self._numpy = np.random.MT19937(int(generator.integers(2**62)))
            np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
            self._normal = None

    def empty(self) -> None:
        """Enter it with nothing in it: no entities, processors or event handlers."""
        self._delete()
        self.enter()

    def close(self) -> None:
        """Delete it with all that it holds."""
        if Context._drawing is self:
            Context._drawing = None
        self._delete()

    def _take_over(self) -> None:
        """Put aside the global generators' state of who was entered last, and put back one's own."""
        if Context._drawing is not None:
            Context._drawing._python = random.getstate()
            state: Any = np.random.get_state(legacy=False)
            Context._drawing._normal = state["gauss"] if state["has_gauss"] else None
        if self._python is not None:
            random.setstate(self._python)
        np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
        if self._normal is not None:
            own: Any = np.random.get_state(legacy=False)
            np.random.set_state({**own, "has_gauss": 1, "gauss": self._normal})
        Context._drawing = self

    def _delete(self) -> None:
        if esper.current_world == self._name:
            esper.switch_world("default")
        if self._name in esper.list_worlds():
            esper.delete_world(self._name)
