"""Curves and bars out of characters, for terminals."""

from __future__ import annotations

from collections.abc import Sequence

from rustyrl.units import decimal, short

__all__ = ["bar", "curve"]

BRAILLE = 0x2800  # the empty pattern; its dots are bits
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # left and right column, from the top
EIGHTHS = " ▏▎▍▌▋▊▉"
LABEL_WIDTH = 7


def bar(share: float, width: int) -> str:
    """A bar of ``width`` characters that is full at a share of one; never empty if the share is not."""
    eighths = min(8 * width, round(8 * width * max(0.0, share)))
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[rest] if rest else "")).ljust(width)


def curve(points: Sequence[Sequence[float]], width: int, height: int) -> list[str]:
    """Lines of a plot of ``(x, y)`` points in the order of x, with the ends of both axes labelled.

    Each character has 2 x 4 dots. The last line is the x axis.
    """
    columns, rows = max(2, width - LABEL_WIDTH - 1), max(1, height - 1)
    values = _resample(points, 2 * columns)
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):  # flat: in the middle
        low, high = low - 1, high + 1
        labels = {rows // 2: decimal(values[-1])}
    else:
        labels = {0: decimal(high), rows - 1: decimal(low)}
    top = 4 * rows - 1
    heights = [round((value - low) / (high - low) * top) for value in values]
    cells = [[BRAILLE] * columns for _ in range(rows)]
    before = heights[0]
    for x, now in enumerate(heights):
        step = 0 if now == before else 1 if now > before else -1
        for y in range(before + step, now + step, step) if step else (now,):  # a line, not a cloud of dots
            row, dot = divmod(top - y, 4)
            cells[row][x // 2] |= DOTS[x % 2][dot]
        before = now
    lines = [
        f"{labels.get(row, ''):>{LABEL_WIDTH}}{'┤' if row in labels else '│'}{''.join(map(chr, cells[row]))}"
        for row in range(rows)
    ]
    first, last = short(points[0][0]), f"{short(points[-1][0])} steps"
    return [*lines, f"{'':>{LABEL_WIDTH}}└{first}{last:>{columns - len(first)}}"]


def _resample(points: Sequence[Sequence[float]], count: int) -> list[float]:
    """So many values at equal distances, linear between the points."""
    first, last = points[0][0], points[-1][0]
    values, k = [], 0
    for i in range(count):
        x = first + (last - first) * i / max(1, count - 1)
        while k + 2 < len(points) and points[k + 1][0] < x:
            k += 1
        (x0, y0), (x1, y1) = points[k][:2], points[min(k + 1, len(points) - 1)][:2]
        part = min(1.0, max(0.0, (x - x0) / (x1 - x0))) if x1 > x0 else 1.0
        values.append(y0 + (y1 - y0) * part)
    return values
