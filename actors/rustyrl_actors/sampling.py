"""Drawing actions from a policy's outputs, with their log-probabilities, as numpy on preallocated arrays.

The learner's twin is ``rustyrl_learner/distribution.py``, and the compiled one ``rustyrl/c/policy.h``; tests hold them
together for every kind of action.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rustyrl.spec import ActionBlock, ActionSpec

__all__ = ["BoxSampler", "ChoiceSampler"]

Floats = NDArray[np.float32]
MASKED_LOGIT = np.float32(-1e9)  # far below any logit, its exponential is 0, and products with 0 stay finite


class BoxSampler:
    """A diagonal Gaussian over one box, whose samples are clipped to its bounds or squashed into them."""

    def __init__(self, part: ActionSpec, block: ActionBlock, slots: int, *, squashed: bool) -> None:
        self.part, self.block = part, block
        self.width = part.width
        self.log_prob = np.empty(slots, np.float32)
        self._squashed = squashed
        self._low, self._high = (np.array(bound, np.float32) for bound in (part.low, part.high))
        self._std = np.ones(self.width, np.float32)
        self._log_density = np.float32(0)
        self.log_half = 0.0  # of the half widths of a box that is squashed, summed
        if squashed:
            self._half = (self._high - self._low) * np.float32(0.5)
            self.log_half = float(np.log(self._half).sum())
            self._middle = self._low + self._half
            self._scratch = np.empty((slots, self.width), np.float32)

    def load(self, log_std: Floats) -> None:
        """Take the log standard deviations `[A]` of another version."""
        self._std = np.exp(log_std)
        # The density of what the environment is given: per unit of the box.
        self._log_density = np.float32(-log_std.sum() - 0.5 * math.log(2 * math.pi) * self.width - self.log_half)

    def draw(
        self, mean: Floats, noise: Floats | None, _mask: NDArray[np.bool_] | None, out: NDArray[np.generic]
    ) -> None:
        """Write raw actions `[W, A]`, and with noise their log-probability."""
        if noise is None:
            out[...] = mean
            return
        np.multiply(noise, self._std, out=out)
        np.add(out, mean, out=out)
        np.einsum("wa,wa->w", noise, noise, out=self.log_prob)  # (action - mean) / std is the noise itself
        np.multiply(self.log_prob, np.float32(-0.5), out=self.log_prob)
        np.add(self.log_prob, self._log_density, out=self.log_prob)
        if self._squashed:
            # log(1 - tanh(u)^2) = 2 (log 2 - u - log(1 + exp(-2 u))), which does not lose small numbers at large |u|.
            scratch = self._scratch
            np.multiply(out, np.float32(-2), out=scratch)
            np.logaddexp(scratch, np.float32(0), out=scratch)
            np.add(scratch, out, out=scratch)
            np.subtract(scratch, np.float32(math.log(2)), out=scratch)
            self.log_prob += 2 * scratch.sum(axis=1)

    def bound(self, raw: NDArray[np.generic], out: NDArray[np.generic]) -> None:
        """Write what the environment is given for raw actions `[W, A]`."""
        if not self._squashed:
            np.clip(raw, self._low, self._high, out=out)
            return
        np.tanh(raw, out=out)
        np.multiply(out, self._half, out=out)
        np.add(out, self._middle, out=out)
        np.clip(out, self._low, self._high, out=out)  # rounding at the ends


class ChoiceSampler:
    """k independent categorical choices among n each, some of them masked.

    Slots come last in its arrays `[k, n, W]`, so that what goes over two or three choices runs along whole rows.
    """

    def __init__(self, part: ActionSpec, block: ActionBlock, slots: int) -> None:
        self.part, self.block = part, block
        groups, count = block.groups, block.choices
        self.log_prob = np.empty(slots, np.float32)
        first = sum(part.counts[: block.within.start])
        self._mask_columns = slice(first, first + groups * count)
        self._shape = (groups, count, slots)
        self._logits = np.empty(self._shape, np.float32)
        self._probability = np.empty(self._shape, np.float32)
        self._passed = np.empty(self._shape, bool)
        self._row = np.empty((groups, 1, slots), np.float32)
        self._chosen = np.empty((groups, slots), np.float32)
        self._choice = np.empty((groups, slots), np.int64)
        self._flat = np.empty((groups, slots), np.int64)
        self._first = np.arange(groups)[:, None] * (count * slots) + np.arange(slots)  # of each group's logits

    def draw(
        self, outputs: Floats, noise: Floats | None, mask: NDArray[np.bool_] | None, out: NDArray[np.generic]
    ) -> None:
        """Write choices `[W, k]`, and with noise their log-probability; the mask is that of the whole part."""
        logits, probability, row = self._logits, self._probability, self._row
        np.copyto(logits, outputs.T.reshape(self._shape))
        if mask is not None:
            np.copyto(logits, MASKED_LOGIT, where=~mask[:, self._mask_columns].T.reshape(self._shape))
        if noise is None:
            np.argmax(logits, axis=1, out=self._choice)
            out[...] = self._choice.T
            return
        np.maximum.reduce(logits, axis=1, keepdims=True, out=row)
        np.subtract(logits, row, out=logits)
        np.exp(logits, out=probability)
        np.add.accumulate(probability, axis=1, out=probability)
        total = probability[:, -1:]
        # The first choice whose cumulated probability exceeds the threshold; below the total, so that one does and
        # a choice of probability 0 never is the one.
        np.multiply(noise.T[:, None], total, out=row)
        np.minimum(row, np.nextafter(total, np.float32(0)), out=row)
        np.less_equal(probability, row, out=self._passed)
        np.add.reduce(self._passed, axis=1, dtype=np.int64, out=self._choice)
        out[...] = self._choice.T
        np.log(total, out=row)
        np.multiply(self._choice, len(self.log_prob), out=self._flat)
        np.add(self._flat, self._first, out=self._flat)
        logits.take(self._flat, out=self._chosen, mode="clip")
        np.subtract(self._chosen, row[:, 0], out=self._chosen)
        np.add.reduce(self._chosen, axis=0, out=self.log_prob)

    def bound(self, raw: NDArray[np.generic], out: NDArray[np.generic]) -> None:
        """Write what the environment is given for choices `[W, k]`: they are within their bounds."""
        if out is not raw:
            out[...] = raw
