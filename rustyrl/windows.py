"""Measuring something several times: the median over windows, and how far they spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["make_part", "measure_rate"]


def make_part(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """A measured figure: ``name, value`` (the median), ``unit``, ``spread`` (half the distance of the quartiles)."""
    middle = statistics.median(values)
    if len(values) < 4:
        spread = (max(values) - min(values)) / 2
    else:
        low, _, high = statistics.quantiles(values, n=4)
        spread = (high - low) / 2
    return {"name": name, "value": float(f"{middle:.6g}"), "unit": unit, "spread": float(f"{spread:.3g}")}


def measure_rate(do: Callable[[], int], seconds: float, windows: int) -> list[float]:
    """How much ``do`` gets done in a second, for each window; a warm-up of a quarter of a window comes first.

    Args:
        do: does a piece of work and says how much it was.
        seconds: of a window, at least.
        windows: how many.
    """
    _window(do, seconds / 4)
    return [_window(do, seconds) for _ in range(windows)]


def _window(do: Callable[[], int], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not done:
        done += do()
    return done / spent
