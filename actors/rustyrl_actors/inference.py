"""The policy without torch, in numpy or compiled code: what actors, evaluation and a shipped game run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rustyrl import perceptron
from rustyrl.spec import action_blocks
from rustyrl.weights import VARIANCE_FLOOR, PolicySpec, Weights, read_policy
from rustyrl_actors.sampling import BoxSampler, ChoiceSampler

__all__ = ["Policy"]

Floats = NDArray[np.float32]


class Policy:
    """One policy version, ready to act for a fixed number of slots in arrays of its own.

    Holds its own copy of the arrays: `load` replaces them in place.
    """

    def __init__(self, weights: Weights, slots: int) -> None:
        self.spec: PolicySpec = weights.spec
        self.slots = slots
        sizes = [*weights.spec.hidden, weights.spec.output_width]
        self._weights = tuple(
            np.empty(weights.arrays[f"policy.{i}.weight"].shape, np.float32) for i in range(len(sizes))
        )
        self._biases = tuple(np.empty(n, np.float32) for n in sizes)
        self._outputs = [np.empty((slots, n), np.float32) for n in sizes]
        self._scratch = [np.empty((slots, n), np.float32) for n in sizes]
        self._input = np.empty((slots, sum(array.width for array in weights.spec.observation)), np.float32)
        self._codes = perceptron.encode_activations([*[weights.spec.activation] * len(weights.spec.hidden), "identity"])
        squashed = weights.spec.box == "squashed"
        self._blocks = perceptron.encode_blocks(weights.spec.action, squashed=squashed)
        self._log_prob = np.empty(slots, np.float32)
        self._joined = np.empty((slots, sum(part.width for part in weights.spec.action)), np.float32)
        ends = np.cumsum([part.width for part in weights.spec.action]).tolist()
        self._columns = [slice(end - part.width, end) for part, end in zip(weights.spec.action, ends, strict=True)]
        self._masked = [part.name for part in weights.spec.action if part.masked]
        self._log_std = np.zeros(weights.spec.box_width, np.float32)
        self._normalizer: tuple[Floats, Floats, float] | None = None
        self._activate = ACTIVATIONS[weights.spec.activation]
        self._samplers = self._make_samplers()
        self._log_half = sum(s.log_half for s in self._samplers if isinstance(s, BoxSampler))
        self.load(weights)

    @classmethod
    def from_file(cls, path: Path | str, slots: int = 1) -> Policy:
        """Read a policy file, such as the ``policy.safetensors`` of a run folder."""
        return cls(read_policy(Path(path)), slots)

    def load(self, weights: Weights) -> None:
        """Take the arrays of another version of the same policy."""
        if weights.spec != self.spec:
            raise ValueError(f"weights of another policy: expected {self.spec}, got {weights.spec}")
        for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            weight[...] = weights.arrays[f"policy.{index}.weight"]
            bias[...] = weights.arrays[f"policy.{index}.bias"]
        start = 0
        for sampler in self._samplers:
            if isinstance(sampler, BoxSampler):
                sampler.load(weights.arrays["log_std"][start : start + sampler.width])
                start += sampler.width
        if start:
            self._log_std[...] = weights.arrays["log_std"]
        if self.spec.normalize:
            mean, variance = weights.arrays["normalizer.mean"], weights.arrays["normalizer.variance"]
            scale = 1 / np.sqrt(variance + np.float32(VARIANCE_FLOOR))
            self._normalizer = mean.copy(), scale, self.spec.observation_clip

    def allocate_action(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for `act` to write into: part to `[W, ...]`."""
        return {part.name: np.zeros((self.slots, *part.shape), part.array.dtype) for part in self.spec.action}

    def act(
        self,
        observation: Mapping[str, NDArray[np.generic]],
        noise: Floats | None,
        action: Mapping[str, NDArray[np.generic]],
        log_prob: Floats | None = None,
        mask: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> None:
        """Choose an action for every slot and write it, raw, with its log-probability (stop 11).

        Args:
            observation: name to `[W, ...]`, as the environment gave it.
            noise: `[W, A]`, standard normal for a box and uniform for a choice; None acts greedily.
            action: part to `[W, ...]`, written.
            log_prob: `[W]` float32, written; may be left out when acting greedily.
            mask: part to `[W, choices]`, for the parts that are masked; a choice that is False is never taken.
        """
        masks = [self._mask_of(name, mask) for name in self._masked]
        noise = None if noise is None else np.asarray(noise, np.float32)
        if noise is not None and log_prob is not None and self._codes is not None:
            self._act_compiled(self._codes, observation, noise, action, log_prob, masks)
            return
        outputs = self.forward(observation)
        for index, sampler in enumerate(self._samplers):
            name, block = sampler.part.name, sampler.block
            given = None if block.mask is None else masks[self._masked.index(name)]
            target = action[name].reshape(self.slots, -1)[:, block.within]
            drawn = None if noise is None else noise[:, block.column]
            sampler.draw(outputs[:, block.output], drawn, given, target)
            if log_prob is None or noise is None:
                continue
            if index == 0:
                log_prob[...] = sampler.log_prob
            else:
                log_prob += sampler.log_prob

    def _act_compiled(
        self,
        codes: bytes,
        observation: Mapping[str, NDArray[np.generic]],
        noise: Floats,
        action: Mapping[str, NDArray[np.generic]],
        log_prob: Floats,
        masks: list[NDArray[np.bool_]],
    ) -> None:
        """`act` in one call of compiled code, which takes what samplers do in twenty."""
        mask = masks[0] if len(masks) == 1 else np.concatenate(masks, axis=1) if masks else None
        x, layers = self._join(observation), (self._weights, self._biases, codes)
        boxes = (self._blocks, self._log_std, self._log_half)
        perceptron.policy(x, self._normalizer, *layers, *boxes, mask, noise, self._joined, self._log_prob, 1)
        log_prob[...] = self._log_prob
        for part, columns in zip(self.spec.action, self._columns, strict=True):
            action[part.name].reshape(self.slots, -1)[...] = self._joined[:, columns]

    def forward(self, observation: Mapping[str, NDArray[np.generic]]) -> Floats:
        """Logits and means `[W, outputs]`; the array is reused by the next call."""
        x = self._prepare(observation)
        if self._codes is not None:
            perceptron.forward(x, self._weights, self._biases, self._codes, self._outputs[-1], 1)
            return self._outputs[-1]
        last = len(self._weights) - 1
        for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            out = self._outputs[index]
            np.matmul(x, weight, out=out)
            np.add(out, bias, out=out)
            if index < last:
                self._activate(out, self._scratch[index])
            x = out
        return x

    def bound(self, action: Mapping[str, NDArray[np.generic]], out: Mapping[str, NDArray[np.generic]]) -> None:
        """Write what the environment is given for raw actions: choices as they are, boxes within their bounds.

        Args:
            action: part to `[W, ...]`, raw, as `act` wrote it.
            out: part to `[W, ...]`, written; may be ``action`` itself.
        """
        for sampler in self._samplers:
            name, within = sampler.part.name, sampler.block.within
            raw, bounded = (arrays[name].reshape(self.slots, -1)[:, within] for arrays in (action, out))
            sampler.bound(raw, bounded)

    def _mask_of(self, name: str, mask: Mapping[str, NDArray[np.bool_]] | None) -> NDArray[np.bool_]:
        if mask is None or name not in mask:
            raise ValueError(f"the policy masks the choices of action {name!r}; pass mask={{{name!r}: ...}}")
        return np.ascontiguousarray(mask[name], np.bool_)

    def _join(self, observation: Mapping[str, NDArray[np.generic]]) -> Floats:
        """`[W, in]` float32, raw, in memory of its own if it has to be joined or converted."""
        arrays = [observation[array.name].reshape(self.slots, -1) for array in self.spec.observation]
        if len(arrays) == 1 and arrays[0].dtype == np.float32 and arrays[0].flags.aligned:
            return arrays[0]  # type: ignore[return-value]
        np.concatenate(arrays, axis=1, out=self._input, casting="unsafe")
        return self._input

    def _prepare(self, observation: Mapping[str, NDArray[np.generic]]) -> Floats:
        """`_join`, normalised."""
        x = self._join(observation)
        if self._normalizer is None:
            return x
        mean, scale, limit = self._normalizer
        np.subtract(x, mean, out=self._input)
        np.multiply(self._input, scale, out=self._input)
        return np.clip(self._input, -limit, limit, out=self._input)

    def _make_samplers(self) -> list[BoxSampler | ChoiceSampler]:
        samplers: list[BoxSampler | ChoiceSampler] = []
        for block in action_blocks(self.spec.action):
            part = self.spec.action[block.part]
            if block.kind == "box":
                samplers.append(BoxSampler(part, block, self.slots, squashed=self.spec.box == "squashed"))
            else:
                samplers.append(ChoiceSampler(part, block, self.slots))
        return samplers


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
