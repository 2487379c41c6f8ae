"""The policy as plain numpy: what actors, evaluation and a shipped game run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rustyrl.weights import VARIANCE_FLOOR, PolicySpec, Weights, read_policy

__all__ = ["Policy"]

Floats = NDArray[np.float32]


class Policy:
    """One policy version, ready to act for a fixed number of slots without allocating.

    Holds its own copy of the arrays: `load` replaces them in place.
    """

    def __init__(self, weights: Weights, slots: int) -> None:
        self.spec: PolicySpec = weights.spec
        self.slots = slots
        sizes = [*weights.spec.hidden, weights.spec.action.parameter_count]
        self._layers = [
            (np.empty_like(weights.arrays[f"policy.{i}.weight"]), np.empty(n, np.float32)) for i, n in enumerate(sizes)
        ]
        self._outputs = [np.empty((slots, n), np.float32) for n in sizes]
        self._scratch = [np.empty((slots, n), np.float32) for n in sizes]
        self._input = np.empty((slots, self._layers[0][0].shape[0]), np.float32)
        self._activate = ACTIVATIONS[weights.spec.activation]
        action = weights.spec.action
        if action.kind == "box":
            self._low, self._high = (np.array(b, np.float32).reshape(action.shape) for b in (action.low, action.high))
        else:
            self._choices = np.empty(slots, np.int64)
            self._column = np.empty((slots, 1), np.float32)
            self._passed = np.empty((slots, action.count), bool)
            self._first = np.arange(slots) * action.count  # where each slot's logits start, flattened
        self.load(weights)

    @classmethod
    def from_file(cls, path: Path | str, slots: int = 1) -> Policy:
        """Read a policy file, such as the ``policy.safetensors`` of a run folder."""
        return cls(read_policy(Path(path)), slots)

    def load(self, weights: Weights) -> None:
        """Take the arrays of another version of the same policy."""
        if weights.spec != self.spec:
            raise ValueError(f"weights of another policy: expected {self.spec}, got {weights.spec}")
        for index, (weight, bias) in enumerate(self._layers):
            weight[...] = weights.arrays[f"policy.{index}.weight"]
            bias[...] = weights.arrays[f"policy.{index}.bias"]
        if self.spec.action.kind == "box":
            self._log_std = weights.arrays["log_std"].copy()
            self._std = np.exp(self._log_std)
            self._log_density = float(-self._log_std.sum() - 0.5 * math.log(2 * math.pi) * len(self._std))
        if self.spec.normalize:
            self._mean = weights.arrays["normalizer.mean"].copy()
            self._scale = 1 / np.sqrt(weights.arrays["normalizer.variance"] + np.float32(VARIANCE_FLOOR))

    def act(
        self,
        observation: dict[str, NDArray[np.generic]],
        noise: Floats | None,
        action: NDArray[np.generic],
        log_prob: Floats | None = None,
    ) -> None:
        """Choose an action for every slot and write it, raw, with its log-probability.

        Args:
            observation: name to `[W, ...]`, as the environment gave it.
            noise: `[W, A]` standard normal (box) or `[W, 1]` uniform (discrete); None acts greedily.
            action: `[W, ...]`, written.
            log_prob: `[W]` float32, written; may be left out when acting greedily.
        """
        outputs = self.forward(observation)
        if self.spec.action.kind == "box":
            self._act_box(outputs, noise, action, log_prob)
        else:
            self._act_discrete(outputs, noise, action, log_prob)

    def forward(self, observation: dict[str, NDArray[np.generic]]) -> Floats:
        """Logits or means `[W, A]`; the array is reused by the next call."""
        x = self._prepare(observation)
        last = len(self._layers) - 1
        for index, (weight, bias) in enumerate(self._layers):
            out = self._outputs[index]
            np.matmul(x, weight, out=out)
            np.add(out, bias, out=out)
            if index < last:
                self._activate(out, self._scratch[index])
            x = out
        return x

    def clip(self, action: NDArray[np.generic], out: NDArray[np.generic]) -> NDArray[np.generic]:
        """What the environment is given for a raw action `[W, ...]`: a box clipped to its bounds, into ``out``."""
        if self.spec.action.kind == "discrete":
            return action
        return np.clip(action, self._low, self._high, out=out)

    def _prepare(self, observation: dict[str, NDArray[np.generic]]) -> Floats:
        arrays = [observation[array.name].reshape(self.slots, -1) for array in self.spec.observation]
        if not self.spec.normalize:
            if len(arrays) == 1:
                return arrays[0]  # type: ignore[return-value]
            np.concatenate(arrays, axis=1, out=self._input)
            return self._input
        np.concatenate(arrays, axis=1, out=self._input)
        np.subtract(self._input, self._mean, out=self._input)
        np.multiply(self._input, self._scale, out=self._input)
        limit = self.spec.observation_clip
        return np.clip(self._input, -limit, limit, out=self._input)

    def _act_box(
        self, mean: Floats, noise: Floats | None, action: NDArray[np.generic], log_prob: Floats | None
    ) -> None:
        flat = action.reshape(self.slots, -1)
        if noise is None:
            flat[...] = mean
            return
        np.multiply(noise, self._std, out=flat)
        np.add(flat, mean, out=flat)
        if log_prob is not None:  # (action - mean) / std is the noise itself
            np.einsum("wa,wa->w", noise, noise, out=log_prob)
            np.multiply(log_prob, np.float32(-0.5), out=log_prob)
            np.add(log_prob, np.float32(self._log_density), out=log_prob)

    def _act_discrete(
        self, logits: Floats, noise: Floats | None, action: NDArray[np.generic], log_prob: Floats | None
    ) -> None:
        if noise is None:
            np.argmax(logits, axis=1, out=self._choices)
            action[...] = self._choices
            return
        probability, column = self._scratch[-1], self._column
        np.max(logits, axis=1, keepdims=True, out=column)
        np.subtract(logits, column, out=logits)
        np.exp(logits, out=probability)
        np.cumsum(probability, axis=1, out=probability)
        total = probability[:, -1:]
        np.multiply(noise, total, out=column)
        np.less_equal(probability, column, out=self._passed)
        np.sum(self._passed, axis=1, out=self._choices)
        np.minimum(self._choices, logits.shape[1] - 1, out=self._choices)  # rounding at the upper end
        action[...] = self._choices
        if log_prob is not None:
            np.log(total, out=column)
            np.add(self._choices, self._first, out=self._choices)
            np.take(logits, self._choices, out=log_prob, mode="clip")
            np.subtract(log_prob, column[:, 0], out=log_prob)


def _tanh(x: Floats, _scratch: Floats) -> None:
    np.tanh(x, out=x)


def _relu(x: Floats, _scratch: Floats) -> None:
    np.maximum(x, 0, out=x)


def _elu(x: Floats, scratch: Floats) -> None:
    np.minimum(x, 0, out=scratch)
    np.expm1(scratch, out=scratch)
    np.maximum(x, 0, out=x)
    np.add(x, scratch, out=x)


def _silu(x: Floats, scratch: Floats) -> None:
    np.multiply(x, np.float32(0.5), out=scratch)  # x * sigmoid(x), sigmoid(x) = (tanh(x / 2) + 1) / 2
    np.tanh(scratch, out=scratch)
    np.add(scratch, 1, out=scratch)
    np.multiply(x, scratch, out=x)
    np.multiply(x, np.float32(0.5), out=x)


ACTIVATIONS: dict[str, Callable[[Floats, Floats], None]] = {
    "elu": _elu,
    "relu": _relu,
    "silu": _silu,
    "tanh": _tanh,
}
