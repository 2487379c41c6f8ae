"""Running mean and variance of rows, in float64 on the learner's device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """Mean and population variance of all rows folded in so far, or of about the newest ``window`` of them.

    mean, variance: `[width]` float64; count: how many rows they stand for
    """

    def __init__(self, width: int, device: torch.device, window: float = float("inf")) -> None:
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.variance = torch.ones(width, dtype=torch.float64, device=device)
        self.count = 0.0
        self._window = window

    def fold(self, rows: Tensor) -> None:
        """Add rows `[N, width]` (Chan, Golub and LeVeque 1983, the pairwise update)."""
        count = float(rows.shape[0])
        if not count:
            return
        # Shifted by the running mean, float32 loses nothing that matters; the sums are float64. The first rows have
        # no running mean: far from the origin their own is rounded by more than a small spread, which is put right.
        shifted = rows - self.mean.to(rows.dtype)
        shift = shifted.mean(0, dtype=torch.float64)
        rounded = shift.to(rows.dtype)
        spread = (shifted - rounded).square_().mean(0, dtype=torch.float64)
        spread = (spread - (shift - rounded).square()).clamp_(min=0.0)
        mean = self.mean.to(rows.dtype).double() + shift
        before = min(self.count, max(self._window - count, 0.0))  # what goes beyond the window is forgotten
        delta = mean - self.mean
        total = before + count
        self.variance = (self.variance * before + spread * count + delta.square() * (before * count / total)) / total
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Everything that a checkpoint holds of them, as ``NAME.mean, NAME.variance, NAME.count``."""
        count = torch.tensor([self.count], dtype=torch.float64)
        return {f"{name}.mean": self.mean, f"{name}.variance": self.variance, f"{name}.count": count}

    def set_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        self.mean = tensors[f"{name}.mean"].to(self.mean)
        self.variance = tensors[f"{name}.variance"].to(self.variance)
        self.count = float(tensors[f"{name}.count"])
