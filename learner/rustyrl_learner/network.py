"""The actor and critic networks, and the way between torch parameters and `Weights`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rustyrl.weights import PolicySpec, Weights
from rustyrl_learner.distribution import ActionDistribution
from rustyrl_learner.normalizer import ObservationNormalizer

__all__ = ["ActorCritic", "Dense", "export_weights", "import_weights"]


NARROW = 16  # outputs below which a product is computed transposed


class Dense(torch.autograd.Function):
    """``activation(x @ weight + bias)`` with a hand-derived gradient.

    Autograd would do; on a CPU it takes nearly twice as long, for reasons measured with `[4096, 64]` float32:
    torch.tanh costs twice to four times what ``2 sigmoid(2 x) - 1`` does, the bias is broadcast in a pass of its
    own, and products with a few columns (the heads) are four to six times faster the other way round.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:  # noqa: D102
        narrow = weight.shape[1] < NARROW
        z = torch.addmm(bias[:, None], weight.T, x.T).T if narrow else torch.addmm(bias, x, weight)
        y = _activate(z, activation)
        ctx.activation = activation
        ctx.save_for_backward(x, weight, z if activation == "silu" else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # noqa: D102
        x, weight, kept = ctx.saved_tensors
        dz = _activation_gradient(grads[0], kept, ctx.activation)
        dx = dz @ weight.T if ctx.needs_input_grad[0] else None
        dw = (dz.T @ x).T if weight.shape[1] < NARROW else x.T @ dz
        return dx, dw, dz.sum(0), None


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
    """Layers of `Dense`; weights are `[in, out]`, orthogonal with the given gains, biases 0."""

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
        """`[N, in]` to `[N, out]`."""
        for weight, bias, activation in zip(self.weights, self.biases, self._activations, strict=True):
            x = Dense.apply(x, weight, bias, activation)  # type: ignore[no-untyped-call]
        return x


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
        self.log_std = nn.Parameter(torch.full((spec.box_width,), float(initial_log_std))) if spec.box_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and means `[N, outputs]` and values `[N]`."""
        features = x if self.trunk is None else self.trunk(x)
        value = self.critic(features if self.shared else x)
        return self.policy_head(features), value.squeeze(-1)

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
