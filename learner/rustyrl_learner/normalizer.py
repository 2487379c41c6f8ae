"""What observations, rewards and values are divided by so that networks see numbers of the size of 1."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl.weights import VARIANCE_FLOOR
from rustyrl_learner.gae import discounted_sum
from rustyrl_learner.statistics import RunningStatistics

__all__ = ["ObservationNormalizer", "RewardNormalizer", "ValueNormalizer"]

NAMES = ("normalizer.mean", "normalizer.variance", "normalizer.count")
SMALLEST_DEVIATION = 1e-4  # of value targets: where all are alike, there is nothing to scale


class ObservationNormalizer:
    """Statistics of all observations folded in so far; frozen while an update runs."""

    def __init__(self, width: int, clip: float, device: torch.device) -> None:
        self.statistics = RunningStatistics(width, device)
        self._clip = clip

    def apply(self, observation: Tensor) -> Tensor:
        """Normalise and clip raw observations `[..., width]` float32 exactly as actors do."""
        scale = torch.rsqrt(self.statistics.variance.float() + VARIANCE_FLOOR)
        return ((observation - self.statistics.mean.float()) * scale).clamp_(-self._clip, self._clip)

    def fold(self, observation: Tensor) -> None:
        """Add rows `[N, width]`."""
        self.statistics.fold(observation)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The statistics under their names in `Weights`."""
        return {
            "normalizer.mean": self.statistics.mean.float().cpu().numpy(),
            "normalizer.variance": self.statistics.variance.float().cpu().numpy(),
            "normalizer.count": np.array([self.statistics.count], np.float32),
        }

    def set_arrays(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Take statistics over from a policy file."""
        self.statistics.set_tensors("normalizer", {name: torch.from_numpy(arrays[name].copy()) for name in NAMES})


class RewardNormalizer:
    """Divides rewards by the running deviation of the discounted return so far, and clips them.

    The return of a slot is summed up from the start of its episode, or of the first batch that is learned from, step by
    step, and never looks ahead (OpenAI baselines' VecNormalize); rewards are not shifted, since that would change what
    an episode's length is worth.

    carried: `[B]` float64, the return so far of the episode that each slot is in
    """

    def __init__(self, slots: int, clip: float, device: torch.device) -> None:
        self.statistics = RunningStatistics(1, device)
        self.carried = torch.zeros(slots, dtype=torch.float64, device=device)
        self._clip = clip

    def fold(self, reward: Tensor, ended: Tensor, valid: Tensor, fresh: Tensor, gamma: float) -> None:
        """Carry the returns through a batch and add each of them to the statistics.

        Args:
            reward: `[T, B]` float32; what stands in rows that are not valid is not read.
            ended: `[T, B]` bool, terminated or truncated.
            valid: `[T, B]` bool.
            fresh: `[B]` bool, slots whose episodes began with this batch.
            gamma: discount of a step.
        """
        running = self.carried.masked_fill(fresh, 0.0)
        known = reward.double().masked_fill(~valid, 0.0)
        keep = torch.ones_like(known).masked_fill_(valid, gamma)  # nothing passes for a slot without an agent
        known[0] += keep[0] * running
        keep[1:].masked_fill_(ended[:-1], 0.0)
        seen = discounted_sum(known.flip(0), keep.flip(0)).flip(0)  # the past is to a step what the future is to others
        self.carried = seen[-1].masked_fill(ended[-1], 0.0)
        self.statistics.fold(seen[valid][:, None])

    def apply(self, reward: Tensor) -> Tensor:
        """Rewards `[...]` float32 as they are learned from."""
        scale = torch.rsqrt(self.statistics.variance.float() + VARIANCE_FLOOR)
        return (reward * scale).clamp_(-self._clip, self._clip)


class ValueNormalizer:
    """Lets the critic work in units in which its targets have mean 0 and deviation 1.

    When the statistics move, the critic's last layer is changed so that every value stays what it was (van Hasselt et
    al. 2016, 'Learning values across many orders of magnitude', section 2.2).
    """

    def __init__(self, window: float, device: torch.device) -> None:
        self.statistics = RunningStatistics(1, device, window)

    @property
    def mean(self) -> Tensor:
        """Of the value targets of late, `[]` float32."""
        return self.statistics.mean[0].float()

    @property
    def deviation(self) -> Tensor:
        """Of the value targets of late, `[]` float32; 1 before the first."""
        return self.statistics.variance[0].sqrt().clamp(min=SMALLEST_DEVIATION).float()

    def to_reward_units(self, value: Tensor) -> Tensor:
        """What the critic says, in the units of the rewards."""
        return value * self.deviation + self.mean

    def to_critic_units(self, value: Tensor) -> Tensor:
        """The way back."""
        return (value - self.mean) / self.deviation

    @torch.no_grad()
    def fold(self, target: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Add value targets `[N]` in the units of the rewards, and keep what the critic's last layer says.

        Args:
            target: `[N]` float32.
            weight: `[in, 1]` of the critic's last layer, changed in place.
            bias: `[1]` of it, changed in place.
        """
        mean, deviation = self.mean, self.deviation
        self.statistics.fold(target[:, None])
        weight.mul_(deviation / self.deviation)
        bias.mul_(deviation).add_(mean - self.mean).div_(self.deviation)

    @torch.no_grad()
    def leave(self, weight: Tensor, bias: Tensor) -> None:
        """Have the critic's last layer, as in `fold`, speak in the units of the rewards by itself."""
        weight.mul_(self.deviation)
        bias.mul_(self.deviation).add_(self.mean)
