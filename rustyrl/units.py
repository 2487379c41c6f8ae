"""Numbers as people read them: short, with a unit, and a dash where there is none."""

from __future__ import annotations

__all__ = ["clock", "count", "decimal", "percent", "short", "size", "span"]

NONE = "-"
STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "K"))
SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
LONGEST_COUNT = 10_000_000  # written out with separators below this


def count(value: float | None) -> str:
    """A whole number, with separators of thousands as long as that is readable."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) < LONGEST_COUNT else short(value)


def short(value: float | None) -> str:
    """Three digits and a letter: 987, 30.2 K, 1.23 M."""
    if value is None:
        return NONE
    for step, letter in STEPS:
        if abs(value) >= step * 0.9995:
            return f"{_digits(value / step)} {letter}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes: 512 B, 334 MiB, 1.21 GiB."""
    if value is None:
        return NONE
    for step, unit in SIZES:
        if value >= step * 0.9995:
            return f"{_digits(value / step)} {unit}"
    return f"{value:.0f} B"


def decimal(value: float | None) -> str:
    """Three digits of any number: 0.0073, 2.76e-5, 489."""
    if value is None:
        return NONE
    return f"{value:.3g}".replace("e-0", "e-") if abs(value) < 999.5 else count(value)


def percent(share: float | None) -> str:
    """A share of one as 1 %."""
    return NONE if share is None else f"{share:.0%}".replace("%", " %")


def span(seconds: float | None) -> str:
    """How long something takes or has lasted: 95 ms, 1.2 s, 14 s, 3 min, 2 h."""
    if seconds is None:
        return NONE
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def clock(seconds: float) -> str:
    """The time since a start: 0:14, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
