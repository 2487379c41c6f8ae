"""The work that every participant of ``peers.py`` does, the clock that it is timed with, and the line that it prints.

Imports nothing but the standard library: an adapter runs in its peer's own interpreter.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["CLIP", "ENTROPY", "ENV", "EPOCHS", "GAE_LAMBDA", "GAMMA", "HIDDEN", "MAX_GRADIENT_NORM", "RATE", "Clock"]
__all__ += ["VALUE", "Work", "print_marks"]

ENV = "CartPole-v1"
HIDDEN = (64, 64)  # tanh layers of the actor, and as many of the critic
EPOCHS = 4
RATE = 1e-3  # of Adam, constant
CLIP = 0.2
GAMMA = 0.99
GAE_LAMBDA = 0.95
ENTROPY = 0.0
VALUE = 0.5  # weight of the value loss
MAX_GRADIENT_NORM = 0.5


@dataclass(frozen=True)
class Work:
    """What may differ between windows."""

    total_steps: int
    slots: int = 128  # environments
    unroll_length: int = 128
    seed: int = 1

    @property
    def batch(self) -> int:
        """Env steps of an update."""
        return self.slots * self.unroll_length

    @property
    def minibatch(self) -> int:
        """Env steps of an optimiser step: a quarter of the batch."""
        return self.batch // 4

    def arguments(self) -> list[str]:
        """What ``parse`` makes this of."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in vars(self).items()]

    @staticmethod
    def parse() -> Work:
        """The work that this process was started for."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--total-steps", type=int, required=True)
        parser.add_argument("--slots", type=int, required=True)
        parser.add_argument("--unroll-length", type=int, required=True)
        parser.add_argument("--seed", type=int, required=True)
        return Work(**vars(parser.parse_args()))


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
