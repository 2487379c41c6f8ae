"""The actor and critic networks with their gradient, and the way between torch parameters and `Weights`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rustyrl.weights import PolicySpec, Weights
from rustyrl_learner.distribution import ActionDistribution
from rustyrl_learner.normalizer import ObservationNormalizer

__all__ = ["ActorCritic", "Trace", "export_weights", "import_weights", "layer", "layer_gradient"]


NARROW = 16  # outputs below which a product is computed transposed


@dataclass(frozen=True, slots=True)
class Trace:
    """What a perceptron keeps of a pass for its gradient, layer by layer: input, and what its activation left."""

    inputs: list[Tensor]
    kept: list[Tensor]


def layer(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``activation(x @ weight + bias)``, and what `layer_gradient` needs of it.

    Measured on a CPU with `[4096, 64]` float32: torch.tanh costs twice to four times what ``2 sigmoid(2 x) - 1`` does,
    a bias that is broadcast in a pass of its own a fifth, and products with a few columns (the heads) are four to six
    times faster the other way round.
    """
    narrow = weight.shape[1] < NARROW
    z = torch.addmm(bias[:, None], weight.T, x.T).T if narrow else torch.addmm(bias, x, weight)
    y = _activate(z, activation)
    return y, z if activation == "silu" else y


def layer_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, kept: Tensor, activation: str, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """Write the gradients of a layer's weight and bias; the gradient of what came before its activation."""
    dz = _activation_gradient(dy, kept, activation)
    if weight.shape[1] < NARROW:
        dweight.copy_((dz.T @ x).T)
    else:
        torch.mm(x.T, dz, out=dweight)
    torch.sum(dz, 0, out=dbias)
    return dz


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return z.mul_(2).sigmoid_().mul_(2).sub_(1)
    if activation == "relu":
        return z.relu_()
    if activation == "elu":
        return nn.functional.elu(z)
    if activation == "silu":
        return nn.functional.silu(z)
    return z


def _activation_gradient(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(grad, kept)  # type: ignore[no-any-return]
    if activation == "relu":
        return grad * (kept > 0)
    if activation == "elu":
        return grad * torch.where(kept > 0, 1.0, kept + 1)
    if activation == "silu":
        gate = torch.sigmoid(kept)
        return grad * (gate * (1 + kept * (1 - gate)))
    return grad


class Perceptron(nn.Module):
    """Layers; weights are `[in, out]`, orthogonal with the given gains, biases 0."""

    def __init__(self, sizes: list[int], activation: str, last: str, last_gain: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self._activations = [activation] * (len(sizes) - 2) + [last]
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            gain = last_gain if index == len(sizes) - 2 else 2**0.5
            weight = torch.empty(fan_out, fan_in)
            nn.init.orthogonal_(weight, gain)
            self.weights.append(nn.Parameter(weight.T.contiguous()))
            self.biases.append(nn.Parameter(torch.zeros(fan_out)))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in]` to `[N, out]`; for a gradient there is `trace`."""
        return self.trace(x)[0]

    @torch.no_grad()
    def trace(self, x: Tensor) -> tuple[Tensor, Trace]:
        """`[N, in]` to `[N, out]`, and what `backward` needs."""
        trace = Trace([], [])
        for weight, bias, activation in zip(self.weights, self.biases, self._activations, strict=True):
            trace.inputs.append(x)
            x, kept = layer(x, weight, bias, activation)
            trace.kept.append(kept)
        return x, trace

    @torch.no_grad()
    def backward(self, trace: Trace, dy: Tensor, *, onward: bool) -> Tensor | None:
        """Write every parameter's ``grad``, which must be there, for the gradient `[N, out]` of what came out.

        Returns:
            The gradient `[N, in]` of what went in, if it is asked for.
        """
        for index in reversed(range(len(self.weights))):
            weight, bias, x = self.weights[index], self.biases[index], trace.inputs[index]
            assert weight.grad is not None  # noqa: S101 - see ActorCritic.gradient
            assert bias.grad is not None  # noqa: S101
            kept, activation = trace.kept[index], self._activations[index]
            dz = layer_gradient(dy, x, weight, kept, activation, weight.grad, bias.grad)
            if index or onward:
                dy = dz @ weight.T
        return dy if onward else None


class ActorCritic(nn.Module):
    """A policy and a value function over the same flat, normalised observations `[N, width]`.

    With ``shared`` the value head reads the policy's last hidden layer; otherwise the critic is a perceptron of
    the same widths of its own. Initialised as in 'The 37 Implementation Details of PPO': gain sqrt(2), 0.01
    for the policy's last layer, 1 for the value's.
    """

    def __init__(self, spec: PolicySpec, *, shared: bool, initial_log_std: float) -> None:
        super().__init__()
        self.spec = spec
        self.shared = shared
        width = sum(array.width for array in spec.observation)
        sizes = [width, *spec.hidden]
        self.trunk = Perceptron(sizes, spec.activation, spec.activation, 2**0.5) if spec.hidden else None
        self.policy_head = Perceptron([sizes[-1], spec.output_width], spec.activation, "identity", 0.01)
        self.critic = Perceptron([sizes[-1], 1] if shared else [*sizes, 1], spec.activation, "identity", 1.0)
        self.distribution = ActionDistribution(spec)
        self._block: Tensor | None = None
        self._gradient: Tensor | None = None
        self.log_std = nn.Parameter(torch.full((spec.box_width,), float(initial_log_std))) if spec.box_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and means `[N, outputs]` and values `[N]`."""
        features = x if self.trunk is None else self.trunk(x)
        value = self.critic(features if self.shared else x)
        return self.policy_head(features), value.squeeze(-1)

    def block(self) -> Tensor:
        """The flat tensor `[P]` of which every parameter is a view: the deviations of boxes, then all layers."""
        return self._flat()[0]

    def gradient(self) -> Tensor:
        """The flat tensor `[P]` of which every parameter's ``grad`` is a view."""
        return self._flat()[1]

    def _flat(self) -> tuple[Tensor, Tensor]:
        """Parameters and gradients in one block each; made at the first call, once the device is known."""
        if self._block is None or self._gradient is None:
            parameters = list(self.parameters())  # the deviations are the first
            self._block = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            self._gradient = torch.zeros_like(self._block)
            start = 0
            for parameter in parameters:
                stop = start + parameter.numel()
                parameter.data = self._block[start:stop].view(parameter.shape)
                parameter.grad = self._gradient[start:stop].view(parameter.shape)
                start = stop
        return self._block, self._gradient

    def trace(self, x: Tensor) -> tuple[Tensor, Tensor, list[Trace]]:
        """What `forward` gives, and what `backward` needs."""
        features, trunk = (x, None) if self.trunk is None else self.trunk.trace(x)
        outputs, policy = self.policy_head.trace(features)
        value, critic = self.critic.trace(features if self.shared else x)
        return outputs, value.squeeze(-1), [policy, critic, *([] if trunk is None else [trunk])]

    def backward(self, traces: list[Trace], doutputs: Tensor, dvalue: Tensor) -> None:
        """Write the gradients of all layers into what `gradient` gave.

        Hand-derived, since networks are nothing but layers: autograd takes twice to three times as long for it.

        Args:
            traces: of `trace`.
            doutputs: `[N, outputs]`, the loss by the policy's outputs.
            dvalue: `[N]`, the loss by the values.
        """
        policy, critic, *trunk = traces
        onward = bool(trunk)
        dfeatures = self.policy_head.backward(policy, doutputs, onward=onward)
        by_value = self.critic.backward(critic, dvalue[:, None], onward=onward and self.shared)
        if self.trunk is not None and dfeatures is not None:
            self.trunk.backward(trunk[0], dfeatures if by_value is None else dfeatures + by_value, onward=False)

    def policy(self, x: Tensor) -> Tensor:
        """Logits and means `[N, outputs]` alone."""
        return self.policy_head(x if self.trunk is None else self.trunk(x))  # type: ignore[no-any-return]

    def value(self, x: Tensor) -> Tensor:
        """Values `[N]` alone."""
        features = self.trunk(x) if self.shared and self.trunk is not None else x
        return self.critic(features).squeeze(-1)  # type: ignore[no-any-return]

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
