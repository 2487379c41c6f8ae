"""Running mean and variance of observations, the same on both sides of the wire."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl.weights import VARIANCE_FLOOR

__all__ = ["ObservationNormalizer"]


class ObservationNormalizer:
    """Statistics of all observations folded in so far; frozen while an update runs.

    mean, variance: `[width]` float64 on the learner's device; count: how many rows they stand for
    """

    def __init__(self, width: int, clip: float, device: torch.device) -> None:
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.variance = torch.ones(width, dtype=torch.float64, device=device)
        self.count = 0.0
        self._clip = clip

    def apply(self, observation: Tensor) -> Tensor:
        """Normalise and clip raw observations `[..., width]` float32 exactly as actors do."""
        scale = torch.rsqrt(self.variance.float() + VARIANCE_FLOOR)
        return ((observation - self.mean.float()) * scale).clamp_(-self._clip, self._clip)

    def fold(self, observation: Tensor) -> None:
        """Add rows `[N, width]` (Chan, Golub and LeVeque 1983, the pairwise update)."""
        count = float(observation.shape[0])
        if not count:
            return
        # Shifted by the running mean, float32 loses nothing that matters; the sums are float64. The first rows have
        # no running mean: far from the origin their own is rounded by more than a small spread, which is put right.
        shifted = observation - self.mean.float()
        shift = shifted.mean(0, dtype=torch.float64)
        rounded = shift.float()
        spread = (shifted - rounded).square_().mean(0, dtype=torch.float64)
        spread = (spread - (shift - rounded).square()).clamp_(min=0.0)
        mean = self.mean.float().double() + shift
        delta = mean - self.mean
        total = self.count + count
        self.variance = (
            self.variance * self.count + spread * count + delta.square() * (self.count * count / total)
        ) / total
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The statistics under their names in `Weights`."""
        return {
            "normalizer.mean": self.mean.float().cpu().numpy(),
            "normalizer.variance": self.variance.float().cpu().numpy(),
            "normalizer.count": np.array([self.count], np.float32),
        }

    def set_arrays(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Take statistics over from a policy file or a checkpoint."""
        device = self.mean.device
        self.mean = torch.from_numpy(arrays["normalizer.mean"].astype(np.float64)).to(device)
        self.variance = torch.from_numpy(arrays["normalizer.variance"].astype(np.float64)).to(device)
        self.count = float(arrays["normalizer.count"][0])
