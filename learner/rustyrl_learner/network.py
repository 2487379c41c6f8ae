"""The actor and critic networks with their gradient, and the way between torch parameters and `Weights`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rustyrl.weights import PolicySpec, Weights
from rustyrl_learner.distribution import ActionDistribution
from rustyrl_learner.lanes import Lanes, Scratch
from rustyrl_learner.normalizer import ObservationNormalizer

__all__ = ["ActorCritic", "Flat", "Trace", "export_weights", "import_weights", "input_gradient", "layer"]
__all__ += ["layer_gradient"]


NARROW = 16  # outputs below which a product is computed transposed
PIECE = 2048  # rows that are computed at a time where there are no gradients
SPLIT = 1024  # rows from which on policy and critic are computed at the same time: below, telling takes too long
Layers = list[tuple[Tensor, Tensor]]  # weight and bias of each


@dataclass(frozen=True, slots=True)
class Trace:
    """What a perceptron keeps of a pass for its gradient, layer by layer: input, and what its activation left."""

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


class Perceptron(nn.Module):
    """Layers; weights are `[in, out]`, orthogonal with the given gains, biases 0.

    With ``folded`` it reads what another one left folded, see `layer`.
    """

    def __init__(
        self,
        sizes: list[int],
        activation: str,
        last: str,
        last_gain: float,
        *,
        folded: bool = False,
        depth: int = 0,
        lane: str = "policy",
    ) -> None:
        """Make one.

        Args:
            sizes: of the input and of each layer's output.
            activation: of all layers but the last.
            last: that of the last layer.
            last_gain: the gain of the last layer.
            folded: what goes in is.
            depth: how many layers there are before it.
            lane: its names in scratch memory, which those who compute after each other can share.
        """
        super().__init__()
        self._depth = depth
        self._lane = lane
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self._activations = [activation] * (len(sizes) - 2) + [last]
        self._folded = [folded] + [activation == "tanh"] * (len(sizes) - 2)
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            gain = last_gain if index == len(sizes) - 2 else 2**0.5
            weight = torch.empty(fan_out, fan_in)
            nn.init.orthogonal_(weight, gain)
            self.weights.append(nn.Parameter(weight.T.contiguous()))
            self.biases.append(nn.Parameter(torch.zeros(fan_out)))

    def trace(self, layers: Layers, x: Tensor, scratch: Scratch) -> tuple[Tensor, Trace]:
        """`[N, in]` to `[N, out]`, and what `backward` needs; hidden layers are in the scratch."""
        trace = Trace([], [])
        for index, ((weight, bias), activation) in enumerate(zip(layers, self._activations, strict=True)):
            trace.inputs.append(x)
            lasting = activation == "identity"
            out = None if lasting else scratch((self._lane, index), x.shape[0], weight.shape[1], x)
            x, kept = layer(x, weight, bias, activation, folded=self._folded[index], out=out)
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
            x, kept, activation = trace.inputs[index], trace.kept[index], self._activations[index]
            folded = self._folded[index]
            dz = layer_gradient(dy, x, kept, activation, *into[index], folded=folded)
            if index or onward:
                turn = (self._depth + index) % 2  # of two that are read and written in turn
                out = scratch((self._lane, "gradient", turn), x.shape[0], x.shape[1], x)
                dy = input_gradient(dz, layers[index][0], folded=folded, out=out)
        return dy if onward else None


class Flat:
    """A flat tensor `[P]` of parameters or of their gradients, and its views in the order and shape of the parameters.

    tensor: `[P]`
    views: by the name of the parameter
    log_std: `[boxes]`, or None
    trunk, policy_head, critic: weight and bias of each of their layers
    """

    def __init__(self, network: ActorCritic, tensor: Tensor) -> None:
        self.tensor = tensor
        self.views: dict[str, Tensor] = {}
        start = 0
        for name, parameter in network.named_parameters():
            stop = start + parameter.numel()
            self.views[name] = tensor[start:stop].view(parameter.shape)
            start = stop
        self.log_std = self.views.get("log_std")
        self.trunk, self.policy_head, self.critic = map(self._layers, ("trunk", "policy_head", "critic"))

    def _layers(self, part: str) -> Layers:
        count = sum(name.startswith(f"{part}.weights.") for name in self.views)
        return [(self.views[f"{part}.weights.{i}"], self.views[f"{part}.biases.{i}"]) for i in range(count)]


class ActorCritic(nn.Module):
    """A policy and a value function over the same flat, normalised observations `[N, width]`.

    With ``shared`` the value head reads the policy's last hidden layer; otherwise the critic is a perceptron of
    the same widths of its own. Initialised as in 'The 37 Implementation Details of PPO': gain sqrt(2), 0.01
    for the policy's last layer, 1 for the value's.
    """

    def __init__(self, spec: PolicySpec, *, shared: bool, initial_log_std: float, threads: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.shared = shared
        width = sum(array.width for array in spec.observation)
        sizes = [width, *spec.hidden]
        activation, depth = spec.activation, len(spec.hidden)
        self.trunk = Perceptron(sizes, activation, activation, 2**0.5) if spec.hidden else None
        folded = self.trunk is not None and activation == "tanh"
        head = [sizes[-1], spec.output_width]
        self.policy_head = Perceptron(head, activation, "identity", 0.01, folded=folded, depth=depth)
        if shared:
            head = [sizes[-1], 1]
            self.critic = Perceptron(head, activation, "identity", 1.0, folded=folded, depth=depth, lane="critic")
        else:
            self.critic = Perceptron([*sizes, 1], activation, "identity", 1.0)
        self.distribution = ActionDistribution(spec)
        self._lanes = Lanes(1 if shared else threads)
        self._flat: tuple[Flat, Flat] | None = None
        self.log_std = nn.Parameter(torch.full((spec.box_width,), float(initial_log_std))) if spec.box_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and means `[N, outputs]` and values `[N]`."""
        return self.policy(x), self.value(x)

    def flat(self) -> tuple[Flat, Flat]:
        """All parameters, and all gradients, each in one block of which they are views from then on.

        They are laid out at the first call, on the device where they are by then.
        """
        if self._flat is None:
            block = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()])
            self._flat = Flat(self, block), Flat(self, torch.zeros_like(block))
            for name, parameter in self.named_parameters():
                parameter.data, parameter.grad = (flat.views[name] for flat in self._flat)
        return self._flat

    @torch.no_grad()
    def take_gradient(
        self, x: Tensor, by_outputs: Callable[[Tensor], Tensor], by_value: Callable[[Tensor], Tensor]
    ) -> None:
        """Write the gradients of all layers, for a loss whose gradients by what the networks say are given.

        Hand-derived, since networks are nothing but layers: autograd takes twice to three times as long for it. Policy
        and critic are computed in `Lanes` unless they share layers.

        Args:
            x: `[N, width]`.
            by_outputs: given the policy's outputs `[N, outputs]`, the gradient by them.
            by_value: given the values `[N]`, the gradient by them.
        """
        layers, into = self.flat()

        def value_lane(features: Tensor, scratch: Scratch, *, onward: bool) -> Tensor | None:
            value, kept = self.critic.trace(layers.critic, features, scratch)
            dvalue = by_value(value.squeeze(-1))[:, None]
            return self.critic.backward(layers.critic, kept, dvalue, into.critic, scratch, onward=onward)

        def policy_lane(scratch: Scratch) -> None:
            features, hidden = (x, None) if self.trunk is None else self.trunk.trace(layers.trunk, x, scratch)
            outputs, kept = self.policy_head.trace(layers.policy_head, features, scratch)
            doutputs, onward = by_outputs(outputs), hidden is not None
            dy = self.policy_head.backward(layers.policy_head, kept, doutputs, into.policy_head, scratch, onward=onward)
            dvalue = value_lane(features, scratch, onward=onward) if self.shared else None
            if self.trunk is not None and hidden is not None and dy is not None:
                dy = dy if dvalue is None else dy.add_(dvalue)
                self.trunk.backward(layers.trunk, hidden, dy, into.trunk, scratch, onward=False)

        if self.shared:
            self._lanes.one(policy_lane)
        else:
            together = x.shape[0] >= SPLIT
            self._lanes.both(policy_lane, partial(value_lane, x, onward=False), together=together)

    def evaluate(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Values `[N]` of all rows, and logits and means `[first, outputs]` of the first so many, in `Lanes`."""
        found: dict[str, Tensor] = {}

        def say_outputs(_: Scratch) -> None:
            found["outputs"] = self.policy(x[:first])

        def say_values(_: Scratch) -> None:
            found["values"] = self.value(x)

        self._lanes.both(say_outputs, say_values, together=first >= SPLIT)
        return found["values"], found["outputs"]

    def policy(self, x: Tensor) -> Tensor:
        """Logits and means `[N, outputs]` alone."""
        layers = self.flat()[0]

        def say(rows: Tensor, scratch: Scratch) -> Tensor:
            features = rows if self.trunk is None else self.trunk.trace(layers.trunk, rows, scratch)[0]
            return self.policy_head.trace(layers.policy_head, features, scratch)[0]

        return self._piecewise(x, say)

    def value(self, x: Tensor) -> Tensor:
        """Values `[N]` alone."""
        layers = self.flat()[0]

        def say(rows: Tensor, scratch: Scratch) -> Tensor:
            if self.shared and self.trunk is not None:
                rows = self.trunk.trace(layers.trunk, rows, scratch)[0]
            return self.critic.trace(layers.critic, rows, scratch)[0].squeeze(-1)

        return self._piecewise(x, say)

    @torch.no_grad()
    def _piecewise(self, x: Tensor, say: Callable[[Tensor, Scratch], Tensor]) -> Tensor:
        """Compute so many rows at a time that what is between the layers stays in a CPU's cache."""
        scratch, count = Scratch(), x.shape[0]
        if x.device.type != "cpu" or count <= PIECE:
            return say(x, scratch)
        return torch.cat([say(x[start : start + PIECE], scratch) for start in range(0, count, PIECE)])

    @property
    def value_head(self) -> tuple[Tensor, Tensor]:
        """Weight `[in, 1]` and bias `[1]` of the layer that values come from."""
        return self.critic.weights[-1], self.critic.biases[-1]

    def log_prob(self, outputs: Tensor, action: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probability `[N]` of raw actions `[N, A]` under these outputs and masks `[N, M]`."""
        return self.distribution.log_prob(outputs, self.log_std, action, mask)

    def entropy(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Entropy, `[N]` or `[]` where it is the same for every row."""
        return self.distribution.entropy(outputs, self.log_std, mask)

    def policy_parameters(self) -> dict[str, Tensor]:
        """The parameters that an actor needs, under their names in `Weights`."""
        layers = [] if self.trunk is None else list(zip(self.trunk.weights, self.trunk.biases, strict=True))
        layers += zip(self.policy_head.weights, self.policy_head.biases, strict=True)
        named = {f"policy.{i}.weight": weight for i, (weight, _) in enumerate(layers)}
        named |= {f"policy.{i}.bias": bias for i, (_, bias) in enumerate(layers)}
        if self.log_std is not None:
            named["log_std"] = self.log_std
        return named


def export_weights(network: ActorCritic, normalizer: ObservationNormalizer | None) -> Weights:
    """Copy what an actor needs out of torch (stop 9 of the straight line)."""
    named = network.policy_parameters()
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in named.values()]).cpu().numpy()
    arrays: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    offset = 0
    for name, tensor in named.items():
        arrays[name] = flat[offset : offset + tensor.numel()].reshape(tensor.shape)
        offset += tensor.numel()
    if normalizer is not None:
        arrays |= normalizer.arrays()
    return Weights(network.spec, arrays)


def import_weights(weights: Weights, network: ActorCritic, normalizer: ObservationNormalizer | None) -> None:
    """Put a policy's arrays into the network and the normaliser; the critic stays as it is."""
    if weights.spec != network.spec:
        raise ValueError(
            f"the policy is of another kind: it maps {weights.spec.summary}, this run's maps {network.spec.summary}"
        )
    with torch.no_grad():
        for name, parameter in network.policy_parameters().items():
            parameter.copy_(torch.from_numpy(weights.arrays[name].copy()))
    if normalizer is not None:
        normalizer.set_arrays(weights.arrays)
