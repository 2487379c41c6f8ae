"""One esper world context of our own, whatever else in this process uses esper."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import esper
import numpy as np
from numpy.typing import NDArray

__all__ = ["Context"]

PREFIX = "rustyrl-"
_names = (f"{PREFIX}{number}" for number in itertools.count())


class Context:
    """A named esper world that is entered before anything of it is touched.

    With ``global_random`` the global generators of Python's `random` and of numpy belong to it while it is entered:
    a game that draws from them has a state of its own there, as if it were alone in the process.
    """

    _drawing: Context | None = None  # whose state stands in the global generators
    _host: tuple[Any, Any, float | None] | None = (
        None  # the state of the rest of the process, while one of ours stands there
    )
    _host_world = "default"  # its esper world

    def __init__(self, *, global_random: bool = False) -> None:
        self._name = next(_names)
        self._global_random = global_random
        self._python: tuple[Any, ...] | None = None
        self._numpy = np.random.MT19937(0)
        self._normal: float | None = None  # numpy's global generator draws normals in pairs and keeps the second

    def enter(self) -> None:
        """Make it the current esper world."""
        if esper.current_world != self._name:
            if not esper.current_world.startswith(PREFIX):
                Context._host_world = esper.current_world
            esper.switch_world(self._name)
        if self._global_random and Context._drawing is not self:
            self._take_over()

    def seed(self, generator: np.random.Generator) -> None:
        """Enter it and seed its part of the global generators, if it has one."""
        self.enter()
        if self._global_random:
            random.seed(int(generator.integers(2**62)))
            self._numpy = np.random.MT19937(int(generator.integers(2**62)))
            self._normal = None
            _set_numpy(self._numpy, None)

    def empty(self) -> None:
        """Enter it with nothing in it: no entities, processors or event handlers."""
        self._delete()
        self.enter()

    def save(self) -> dict[str, NDArray[np.generic]]:
        """Its part of the global generators, as named arrays."""
        if not self._global_random:
            return {}
        self.enter()
        self._put_aside()
        _, words, normal = self._python or random.getstate()
        own: Any = self._numpy.state
        return {
            "own.python": np.array(words, np.uint32),
            "own.numpy": np.array([*own["state"]["key"], own["state"]["pos"]], np.uint32),
            "own.normals": np.array([_or_nan(normal), _or_nan(self._normal)]),
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Go on from what `save` gave; raises `ValueError` or `KeyError` if it is not that."""
        if not self._global_random:
            return
        self.enter()
        normals = [None if np.isnan(value) else float(value) for value in np.asarray(state["own.normals"], float)]
        words = tuple(int(word) for word in state["own.python"])
        random.setstate((3, words, normals[0]))
        content: Any = np.random.MT19937(0).state
        content["state"] = {"key": state["own.numpy"][:-1], "pos": int(state["own.numpy"][-1])}
        self._numpy.state = content
        self._normal = normals[1]
        _set_numpy(self._numpy, self._normal)

    def close(self) -> None:
        """Delete it with all that it holds."""
        if Context._drawing is self:
            Context.hand_back()
        self._delete()

    @staticmethod
    def hand_back() -> None:
        """Leave our worlds: the esper world and the global generators are again those of the rest of the process.

        Actors need not: nothing else runs in their processes.
        """
        if Context._drawing is not None:
            Context._drawing._put_aside()
            Context._drawing = None
        if Context._host is not None:
            python, generator, normal = Context._host
            random.setstate(python)
            _set_numpy(generator, normal)
            Context._host = None
        if esper.current_world.startswith(PREFIX):
            esper.switch_world(Context._host_world)

    def _put_aside(self) -> None:
        """Remember the global generators' state as one's own."""
        self._python = random.getstate()
        self._normal = _cached_normal()

    def _take_over(self) -> None:
        """Put aside the global generators' state of who was entered last, and put back one's own."""
        if Context._drawing is not None:
            Context._drawing._put_aside()
        else:
            generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
            Context._host = (random.getstate(), generator, _cached_normal())
        if self._python is not None:
            random.setstate(self._python)
        _set_numpy(self._numpy, self._normal)
        Context._drawing = self

    def _delete(self) -> None:
        if esper.current_world == self._name:
            esper.switch_world(Context._host_world)
        if self._name in esper.list_worlds():
            esper.delete_world(self._name)


def _cached_normal() -> float | None:
    """The second of a pair of normals that numpy's global generator has drawn and not yet given out."""
    state: Any = np.random.get_state(legacy=False)
    return state["gauss"] if state["has_gauss"] else None


def _or_nan(normal: float | None) -> float:
    return math.nan if normal is None else normal


def _set_numpy(generator: Any, normal: float | None) -> None:
    np.random.set_bit_generator(generator)  # type: ignore[attr-defined]
    if normal is not None:
        own: Any = np.random.get_state(legacy=False)
        np.random.set_state({**own, "has_gauss": 1, "gauss": normal})
