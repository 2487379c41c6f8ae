"""The work that every participant of ``peers.py`` does, the clock that it is timed with, and the line that it prints.

Imports nothing but the standard library: an adapter runs in its peer's own interpreter.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = [
    "CLIP",
    "ENTROPY",
    "GAE_LAMBDA",
    "GAMMA",
    "MAX_GRADIENT_NORM",
    "RATE",
    "VALUE",
    "Clock",
    "Work",
    "print_marks",
]

RATE = 1e-3  # of Adam, constant
CLIP = 0.2
GAMMA = 0.99
GAE_LAMBDA = 0.95
ENTROPY = 0.0
VALUE = 0.5  # weight of the value loss
MAX_GRADIENT_NORM = 0.5


@dataclass(frozen=True)
class Work:
    """What may differ from run to run; the constants above may not.

    env: its Gymnasium ID
    slots: environments
    hidden: widths of tanh layers of the actor, and of as many of the critic
    minibatches: optimiser steps of an epoch
    """

    total_steps: int
    env: str = "CartPole-v1"
    slots: int = 128
    unroll_length: int = 128
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 4
    minibatches: int = 4
    seed: int = 1

    @property
    def batch(self) -> int:
        """Env steps of an update."""
        return self.slots * self.unroll_length

    @property
    def minibatch(self) -> int:
        """Env steps of an optimiser step."""
        return self.batch // self.minibatches

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """The options that say what the work is."""
        parser.add_argument("--total-steps", type=int, default=196_608, help="env steps that a window learns for")
        parser.add_argument("--env", default=Work.env, help="a Gymnasium ID that everyone can make")
        parser.add_argument("--slots", type=int, default=Work.slots, help="environments, in all")
        parser.add_argument("--unroll-length", type=int, default=Work.unroll_length)
        parser.add_argument("--hidden", type=int, nargs="+", default=Work.hidden, help="widths of the layers")
        parser.add_argument("--epochs", type=int, default=Work.epochs)
        parser.add_argument("--minibatches", type=int, default=Work.minibatches, help="of an epoch")

    @staticmethod
    def of(values: dict[str, Any], **others: Any) -> Work:
        """The work that options, or what an adapter was started with, ask for."""
        known = {one.name: values[one.name] for one in fields(Work) if one.name in values} | others
        return Work(**known | {"hidden": tuple(known["hidden"])})

    @property
    def argument(self) -> str:
        """The command line of an adapter."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse() -> Work:
        """The work that this process was started for."""
        return Work.of(json.loads(sys.argv[1]))


@dataclass
class Clock:
    """When each update ended, and how many env steps were trained by then."""

    started: float = field(default_factory=time.perf_counter)
    marks: list[tuple[int, float]] = field(default_factory=list)

    def mark(self, steps: int) -> None:
        """An update has ended; one that trained nothing new does not count."""
        if steps > (self.marks[-1][0] if self.marks else 0):
            self.marks.append((int(steps), round(time.perf_counter() - self.started, 4)))


def print_marks(clock: Clock, return_mean: float | None, *packages: str) -> None:
    """The one line on standard output that ``peers.py`` reads.

    Args:
        clock: Its marks are what the throughput is made of.
        return_mean: Of the newest training episodes, as the peer itself reports it.
        packages: Whose versions belong to the result.
    """
    result: dict[str, Any] = {"marks": clock.marks, "return_mean": return_mean}
    versions = {"python": platform.python_version()}
    for name in (*packages, "torch", "numpy", "gymnasium"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    print(json.dumps({**result, "versions": versions}), flush=True)
