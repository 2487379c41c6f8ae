"""The actor and critic networks with their gradient, and the way between torch parameters and `Weights`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rustyrl.perceptron import encode_activations
from rustyrl.weights import PolicySpec, Weights
from rustyrl_learner.compiled import CompiledUpdate
from rustyrl_learner.distribution import ActionDistribution
from rustyrl_learner.lanes import Lanes, Scratch
from rustyrl_learner.normalizer import ObservationNormalizer
from rustyrl_learner.perceptron import Layers, Perceptron

__all__ = ["ActorCritic", "Flat", "export_weights", "import_weights"]

SPLIT = 1024  # rows from which on policy and critic are computed at the same time: below, telling takes too long


class LayerParameters(nn.Module):
    """The parameters of layers: weights `[in, out]`, orthogonal with the given gains, and biases, 0."""

    def __init__(self, sizes: list[int], last_gain: float) -> None:
        """Make them for the sizes of the input and of each layer's output; ``last_gain`` is the last layer's."""
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            gain = last_gain if index == len(sizes) - 2 else 2**0.5
            weight = torch.empty(fan_out, fan_in)
            nn.init.orthogonal_(weight, gain)
            self.weights.append(nn.Parameter(weight.T.contiguous()))
            self.biases.append(nn.Parameter(torch.zeros(fan_out)))


class Flat:
    """A flat tensor `[P]` of parameters or of their gradients, and its views in the order and shape of the parameters.

    tensor: `[P]`
    views: by the name of the parameter
    log_std: `[boxes]`, or None
    trunk: weight and bias of each layer that policy and critic share
    policy, critic: weight and bias of each of their own
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
        trunk, head, self.critic = map(self._layers, ("trunk", "policy_head", "critic"))
        self.trunk, self.policy = (trunk, head) if network.shared else (Layers(), Layers([*trunk, *head]))

    def _layers(self, part: str) -> Layers:
        count = sum(name.startswith(f"{part}.weights.") for name in self.views)
        return Layers((self.views[f"{part}.weights.{i}"], self.views[f"{part}.biases.{i}"]) for i in range(count))


class ActorCritic(nn.Module):
    """A policy and a value function over the same flat, normalised observations `[N, width]`.

    With ``shared`` the value head reads the policy's last hidden layer; otherwise the critic is a perceptron of
    the same widths of its own. Initialised as in 'The 37 Implementation Details of PPO': gain sqrt(2), 0.01
    for the policy's last layer, 1 for the value's.
    """

    def __init__(
        self, spec: PolicySpec, *, shared: bool, initial_log_std: float, lanes: int = 1, compiled: int = 0
    ) -> None:
        """Make one.

        Args:
            spec: of the policy.
            shared: whether policy and critic share their hidden layers.
            initial_log_std: of boxes.
            lanes: 2 computes policy and critic at the same time, if they share nothing.
            compiled: threads of compiled code on a CPU, if it knows these networks; 0 for torch.
        """
        super().__init__()
        self.spec = spec
        self.shared = shared
        width = sum(array.width for array in spec.observation)
        sizes = [width, *spec.hidden]
        self.trunk = LayerParameters(sizes, 2**0.5) if spec.hidden else None
        self.policy_head = LayerParameters([sizes[-1], spec.output_width], 0.01)
        self.critic = LayerParameters([sizes[-1], 1] if shared else [*sizes, 1], 1.0)
        self.distribution = ActionDistribution(spec)
        self.log_std = nn.Parameter(torch.full((spec.box_width,), float(initial_log_std))) if spec.box_width else None
        self._lanes = Lanes(1 if shared else lanes)
        self._flat: tuple[Flat, Flat] | None = None
        hidden = [spec.activation] * len(spec.hidden)
        self._threads = compiled if encode_activations([*hidden, "identity"]) is not None else 0
        self.compiled: CompiledUpdate | None = None  # once the parameters lie where they stay
        make = partial(Perceptron, threads=self._threads)
        self._trunk = make(hidden, "policy") if shared and hidden else None
        if shared:
            reads = partial(make, depth=len(hidden), folded=spec.activation == "tanh" and bool(hidden))
            self._policy, self._critic = reads(["identity"], "policy"), reads(["identity"], "critic")
        else:
            self._policy, self._critic = (make([*hidden, "identity"], lane) for lane in ("policy", "critic"))

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
            if self._threads:
                self.compiled = CompiledUpdate(self.distribution, self.spec.activation, *self._flat, self._threads)
        return self._flat

    @torch.no_grad()
    def take_gradient(
        self, x: Tensor, by_outputs: Callable[[Tensor], Tensor], by_value: Callable[[Tensor], Tensor]
    ) -> None:
        """Write the gradients of all layers, for a loss whose gradients by what the networks say are given.

        Policy and critic are computed in `Lanes` unless they share layers.

        Args:
            x: `[N, width]`.
            by_outputs: given the policy's outputs `[N, outputs]`, the gradient by them.
            by_value: given the values `[N]`, the gradient by them.
        """
        layers, into = self.flat()

        def policy_lane(features: Tensor, scratch: Scratch, *, onward: bool) -> Tensor | None:
            outputs, kept = self._policy.trace(layers.policy, features, scratch)
            return self._policy.backward(layers.policy, kept, by_outputs(outputs), into.policy, scratch, onward=onward)

        def value_lane(features: Tensor, scratch: Scratch, *, onward: bool) -> Tensor | None:
            value, kept = self._critic.trace(layers.critic, features, scratch)
            dvalue = by_value(value.squeeze(-1))[:, None]
            return self._critic.backward(layers.critic, kept, dvalue, into.critic, scratch, onward=onward)

        def one_lane(scratch: Scratch) -> None:
            features, kept = (x, None) if self._trunk is None else self._trunk.trace(layers.trunk, x, scratch)
            onward = kept is not None
            ours, theirs = (lane(features, scratch, onward=onward) for lane in (policy_lane, value_lane))
            if self._trunk is not None and kept is not None and ours is not None and theirs is not None:
                self._trunk.backward(layers.trunk, kept, ours.add_(theirs), into.trunk, scratch, onward=False)

        if self.shared:
            self._lanes.one(one_lane)
        else:
            lanes = (partial(lane, x, onward=False) for lane in (policy_lane, value_lane))
            self._lanes.both(*lanes, together=x.shape[0] >= SPLIT)

    @torch.no_grad()
    def evaluate(self, x: Tensor, action: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values `[M]` of all rows, and the log-probabilities `[N]` of actions of the first N, in `Lanes`.

        Args:
            x: `[M, width]`.
            action: `[N, A]`, raw.
            mask: as of `log_prob`.
        """
        count = len(action)
        self.flat()
        if self.compiled is not None:
            return self.value(x), self.compiled.log_prob(x[:count], action, mask)
        found: dict[str, Tensor] = {}

        def say_log_prob(_: Scratch) -> None:
            found["log_prob"] = self.log_prob(self.policy(x[:count]), action, mask)

        def say_values(_: Scratch) -> None:
            found["values"] = self.value(x)

        self._lanes.both(say_log_prob, say_values, together=count >= SPLIT)
        return found["values"], found["log_prob"]

    @torch.no_grad()
    def policy(self, x: Tensor) -> Tensor:
        """Logits and means `[N, outputs]` alone."""
        return self._policy.apply(self.flat()[0].policy, self._features(x))

    @torch.no_grad()
    def value(self, x: Tensor) -> Tensor:
        """Values `[N]` alone."""
        return self._critic.apply(self.flat()[0].critic, self._features(x)).squeeze(-1)

    def _features(self, x: Tensor) -> Tensor:
        return x if self._trunk is None else self._trunk.apply(self.flat()[0].trunk, x)

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
