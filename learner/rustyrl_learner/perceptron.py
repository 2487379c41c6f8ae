"""Perceptrons and their gradient by hand: layer by layer in torch, or compiled and whole on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rustyrl import perceptron
from rustyrl_learner.lanes import Scratch

__all__ = ["Layers", "Perceptron", "Trace", "input_gradient", "layer", "layer_gradient"]

NARROW = 16  # outputs below which a product is computed transposed
PIECE = 2048  # rows that are computed at a time where there are no gradients
Floats = NDArray[np.float32]


class Layers(list[tuple[Tensor, Tensor]]):
    """Weight `[in, out]` and bias `[out]` of each layer, or their gradients."""

    @cached_property
    def arrays(self) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
        """The same memory as compiled code reads it: all weights, and all biases."""
        return tuple(weight.numpy() for weight, _ in self), tuple(bias.numpy() for _, bias in self)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a perceptron keeps of a pass for its gradient, layer by layer: input, and what `layer_gradient` needs."""

    inputs: list[Tensor]
    kept: list[Tensor]


def layer(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, *, folded: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``activation(x @ weight + bias)``, in ``out`` if there is one, and what `layer_gradient` needs of it.

    A tanh is left folded: what comes out is ``s = sigmoid(2 z)``, of which ``tanh(z) = 2 s - 1``, and the next layer is
    told that its input is ``folded``, for which its product has factors anyway. Measured on a CPU with `[4096, 64]`
    float32: torch.tanh costs three and a half times what sigmoid does, and each further pass over them a sixth of it.
    Products with a few columns (the heads) are six times faster the other way round, of which two and a half come from
    a weight that is laid out so.
    """
    gain = 2 if activation == "tanh" else 1
    scale = 2 * gain if folded else gain
    if folded:
        bias = bias - weight.sum(0)
    if weight.shape[1] < NARROW:
        z = torch.addmm(bias[:, None], weight.T.contiguous(), x.T, beta=gain, alpha=scale).T
    else:
        z = torch.addmm(bias, x, weight, beta=gain, alpha=scale, out=out)
    y = _activate(z, activation)
    return y, z if activation == "silu" else y


def layer_gradient(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    activation: str,
    dweight: Tensor,
    dbias: Tensor,
    *,
    folded: bool = False,
) -> Tensor:
    """Write the gradients of a layer's weight and bias; the gradient of what came before its activation.

    Args:
        dy: `[N, out]` gradient of what came out, as `input_gradient` gives it; may be overwritten.
        x: `[N, in]` what went in.
        kept: `[N, out]` of `layer`.
        activation: of this layer.
        dweight: `[in, out]`, written.
        dbias: `[out]`, written.
        folded: as of `layer`.
    """
    dz = _activation_gradient(dy, kept, activation)
    torch.sum(dz, 0, out=dbias)
    if dz.shape[1] < NARROW:
        product = (dz.T @ x).T
        dweight.copy_(2 * product - dbias if folded else product)
    else:
        torch.mm(x.T, dz, out=dweight)
        if folded:
            dweight.mul_(2).sub_(dbias)
    return dz


def input_gradient(dz: Tensor, weight: Tensor, *, folded: bool = False, out: Tensor | None = None) -> Tensor:
    """The gradient of what went into a layer; four times that, if it was folded, as its own gradient then needs it."""
    return torch.mm(dz, (4 * weight if folded else weight).T, out=out)


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return z.sigmoid_()
    if activation == "relu":
        return z.relu_()
    if activation == "elu":
        return nn.functional.elu(z, inplace=True)
    if activation == "silu":
        return nn.functional.silu(z)
    return z


def _activation_gradient(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return torch.ops.aten.sigmoid_backward.grad_input(grad, kept, grad_input=grad)  # type: ignore[no-any-return]
    if activation == "relu":
        return grad.mul_(kept > 0)
    if activation == "elu":
        return grad.mul_(torch.where(kept > 0, 1.0, kept + 1))
    if activation == "silu":
        gate = torch.sigmoid(kept)
        return grad.mul_(gate * (1 + kept * (1 - gate)))
    return grad


class Perceptron:
    """What layers compute one after the other, and its gradient; it holds no parameters.

    Hand-derived, since networks are nothing but layers: autograd takes two to three times as long. Where no gradient
    is asked for, all layers may be computed for a few rows at a time by compiled code, see `rustyrl.perceptron`; with
    a gradient it computes the whole loss, see `rustyrl_learner.compiled`.
    """

    def __init__(
        self, activations: Sequence[str], lane: str, *, depth: int = 0, folded: bool = False, threads: int = 0
    ) -> None:
        """Make one.

        Args:
            activations: of its layers.
            lane: its names in scratch memory, which those who compute after each other can share.
            depth: how many layers there are before it.
            folded: what goes in is, see `layer`; nothing is where `apply` is compiled.
            threads: of compiled code, which must know the activations; 0 for torch.
        """
        self._activations = list(activations)
        self._lane = lane
        self._depth = depth
        self._codes = perceptron.encode_activations(activations) if threads else None
        self._threads = threads
        self._folded = [folded] + [activation == "tanh" for activation in self._activations[:-1]]

    def apply(self, layers: Layers, x: Tensor) -> Tensor:
        """`[N, in]` to `[N, out]`, keeping nothing."""
        if self._codes is not None:
            out = x.new_empty(x.shape[0], layers[-1][0].shape[1])
            perceptron.forward(x.numpy(), *layers.arrays, self._codes, out.numpy(), self._threads)
            return out
        # So many rows at a time that what is between the layers stays in a CPU's cache.
        scratch, count = Scratch(), x.shape[0]
        if x.device.type != "cpu" or count <= PIECE:
            return self.trace(layers, x, scratch)[0]
        pieces = [x[start : start + PIECE] for start in range(0, count, PIECE)]
        return torch.cat([self.trace(layers, piece, scratch)[0].clone() for piece in pieces])

    def trace(self, layers: Layers, x: Tensor, scratch: Scratch) -> tuple[Tensor, Trace]:
        """`[N, in]` to `[N, out]`, and what `backward` needs; what comes out of an activation is in the scratch."""
        trace = Trace([], [])
        for index, ((weight, bias), activation) in enumerate(zip(layers, self._activations, strict=True)):
            trace.inputs.append(x)
            room = None if activation == "identity" else self._room(scratch, index, x, layers)
            x, kept = layer(x, weight, bias, activation, folded=self._folded[index], out=room)
            trace.kept.append(kept)
        return x, trace

    def backward(
        self, layers: Layers, trace: Trace, dy: Tensor, into: Layers, scratch: Scratch, *, onward: bool
    ) -> Tensor | None:
        """Write every layer's gradient for the gradient `[N, out]` of what came out.

        Returns:
            The gradient `[N, in]` of what went in, see `input_gradient`, if it is asked for; it is in the scratch.
        """
        for index in reversed(range(len(layers))):
            x, activation, folded = trace.inputs[index], self._activations[index], self._folded[index]
            dz = layer_gradient(dy, x, trace.kept[index], activation, *into[index], folded=folded)
            if index or onward:
                turn = (self._depth + index) % 2  # of two that are read and written in turn
                out = scratch((self._lane, "gradient", turn), x.shape[0], x.shape[1], x)
                dy = input_gradient(dz, layers[index][0], folded=folded, out=out)
        return dy if onward else None

    def _room(self, scratch: Scratch, index: int, x: Tensor, layers: Layers) -> Tensor:
        return scratch((self._lane, self._depth + index), x.shape[0], layers[index][0].shape[1], x)
