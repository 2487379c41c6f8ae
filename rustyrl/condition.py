"""Conditions such as ``return_mean>=475``, as ``--stop-at`` takes them and worlds declare their goals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rustyrl.errors import UsageError

__all__ = ["Condition", "meets", "parse_condition"]

PATTERN = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=)\s*(\S+)\s*")
RELAXATION = 0.2


@dataclass(frozen=True, slots=True)
class Condition:
    """``metric`` at least or at most ``value``."""

    metric: str
    at_least: bool
    value: float

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.at_least else '<='}{self.value:.12g}"

    def holds(self, figures: Mapping[str, float | None]) -> bool:
        """Whether the figures meet it; a missing one does not."""
        figure = figures.get(self.metric)
        if figure is None or math.isnan(figure):
            return False
        return figure >= self.value if self.at_least else figure <= self.value

    def shortfall(self, figures: Mapping[str, float | None]) -> float:
        """By how much the figures miss it, 0 if they do not; relative to the value, infinite without a figure."""
        figure = figures.get(self.metric)
        if figure is None or math.isnan(figure):
            return math.inf
        missing = self.value - figure if self.at_least else figure - self.value
        return max(0.0, missing) / max(abs(self.value), 1e-9)

    def relaxed(self) -> Condition:
        """The same with a fifth of slack: training acts with noise, so a good policy looks worse in it.

        Figures to be kept low (crashes, errors) suffer most from that noise and are not asked for at all.
        """
        slack = RELAXATION * abs(self.value) if self.at_least else math.inf
        return Condition(self.metric, self.at_least, self.value - slack if self.at_least else slack)


def parse_condition(text: str) -> Condition:
    """Read ``METRIC>=VALUE`` or ``METRIC<=VALUE``."""
    match = PATTERN.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        value = float(match[3])
        if math.isnan(value):  # nothing would ever meet it
            raise ValueError
        return Condition(match[1], match[2] == ">=", value)
    except ValueError:
        raise UsageError(f"{text!r} is no condition; expected METRIC>=VALUE or METRIC<=VALUE") from None


def meets(conditions: Iterable[Condition], figures: Mapping[str, float | None]) -> bool:
    """Whether the figures meet every condition."""
    return all(condition.holds(figures) for condition in conditions)
