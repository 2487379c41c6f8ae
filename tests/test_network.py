"""The networks: how they start, what they compute, and the way between torch parameters and `Weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl.weights import PolicySpec, decode_weights, encode_weights, weights_layout
from rustyrl_learner.network import ActorCritic, export_weights, import_weights
from rustyrl_learner.normalizer import ObservationNormalizer
from rustyrl_learner.perceptron import input_gradient, layer, layer_gradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "elu": F.elu,
    "silu": F.silu,
    "identity": lambda x: x,
}
BOX = ActionSpec("box", shape=(3,), low=(-1.0,) * 3, high=(1.0,) * 3)
DISCRETE = ActionSpec("discrete", counts=(5,))


pytestmark = pytest.mark.usefixtures("one_thread")


def policy_spec(
    action: ActionSpec = BOX,
    hidden: tuple[int, ...] = (32, 24),
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh",
    *,
    normalize: bool = False,
) -> PolicySpec:
    observation = (ArraySpec("place", (2, 3), "float32"), ArraySpec("speed", (), "float32"))
    return PolicySpec(observation, (action,), hidden, activation, normalize)


def network_of(
    spec: PolicySpec, *, shared: bool = False, seed: int = 0, log_std: float = 0.0, compiled: int = 0
) -> ActorCritic:
    torch.manual_seed(seed)
    return ActorCritic(spec, shared=shared, initial_log_std=log_std, compiled=compiled)


def dense_arguments(fan_in: int, fan_out: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(fan_in * 1000 + fan_out)
    shapes = [(7, fan_in), (fan_in, fan_out), (fan_out,)]
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def unfolded(y: Tensor, activation: str) -> Tensor:
    return 2 * y - 1 if activation == "tanh" else y


def gradients_of(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, activation: str, *, folded: bool = False
) -> list[Tensor]:
    """By our own layer: of input, weight and bias; ``dy`` and that of the input by what they stand for."""
    _, kept = layer(x, weight, bias, activation, folded=folded)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dy = (4 if activation == "tanh" else 1) * dy  # a copy, since it may be overwritten
    dz = layer_gradient(dy, x, kept, activation, dweight, dbias, folded=folded)
    dx = input_gradient(dz, weight, folded=folded)
    return [dx / 4 if folded else dx, dweight, dbias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("fan_in", "fan_out"), [(1, 1), (4, 3), (64, 2), (20, 64), (64, 64)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("folded", [False, True])
def test_a_layer_equals_autograd_of_the_plain_one(
    activation: str, fan_in: int, fan_out: int, dtype: torch.dtype, folded: bool
) -> None:
    arguments = dense_arguments(fan_in, fan_out, dtype)
    plain = [argument.clone().requires_grad_() for argument in arguments]
    expected = ACTIVATIONS[activation](F.linear(plain[0], plain[1].T, plain[2]))
    read = [(arguments[0] + 1) / 2 if folded else arguments[0], *arguments[1:]]
    result = unfolded(layer(*read, activation, folded=folded)[0], activation)  # type: ignore[call-arg, misc]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(result, expected, **close)
    dy = torch.linspace(-1, 1, result.numel(), dtype=dtype).reshape(result.shape)
    for name, mine, other in zip(
        ("x", "weight", "bias"),
        gradients_of(*read, dy, activation, folded=folded),  # type: ignore[call-arg, misc]
        torch.autograd.grad(expected, plain, dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_saturates_without_nan(activation: str) -> None:
    x, weight, bias = torch.tensor([[-1e4], [1e4]]), torch.ones(1, 1), torch.zeros(1)
    found = unfolded(layer(x, weight, bias, activation)[0], activation)
    torch.testing.assert_close(found, ACTIVATIONS[activation](x))
    assert all(torch.isfinite(g).all() for g in gradients_of(x, weight, bias, torch.ones(2, 1), activation))


def test_a_layer_leaves_its_arguments_as_they_are() -> None:
    for activation in ACTIVATIONS:
        arguments = [*dense_arguments(6, 20, torch.float32), torch.ones(7, 20)]
        before = [argument.clone() for argument in arguments]
        gradients_of(*arguments, activation)  # type: ignore[call-arg]
        for argument, old in zip(arguments, before, strict=True):
            assert torch.equal(argument, old)


def literal_mlp(parameters: dict[str, Tensor], prefix: str, x: Tensor, activations: list[str]) -> Tensor:
    for index, activation in enumerate(activations):
        weight, bias = parameters[f"{prefix}.weights.{index}"], parameters[f"{prefix}.biases.{index}"]
        x = ACTIVATIONS[activation](F.linear(x, weight.T, bias))
    return x


@pytest.mark.parametrize("compiled", [0, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_network_equals_the_literal_perceptrons(activation: Any, shared: bool, compiled: int) -> None:
    network = network_of(policy_spec(activation=activation), shared=shared, compiled=compiled)
    parameters = dict(network.named_parameters())
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    outputs, value = network(x)
    features = literal_mlp(parameters, "trunk", x, [activation] * 2)
    expected = literal_mlp(parameters, "policy_head", features, ["identity"])
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    if shared:
        expected = literal_mlp(parameters, "critic", features, ["identity"])
    else:
        expected = literal_mlp(parameters, "critic", x, [activation, activation, "identity"])
    assert value.shape == (9,)
    torch.testing.assert_close(value, expected[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(network.value(x), value)


def gradient_of(network: ActorCritic, x: Tensor, doutputs: Tensor, dvalue: Tensor) -> dict[str, Tensor]:
    _, into = network.flat()
    into.tensor.fill_(torch.nan)  # everything is to be written
    network.take_gradient(x, lambda _: doutputs, lambda _: dvalue)
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None and name != "log_std"}


@pytest.mark.parametrize("rows", [9, 1500])
@pytest.mark.parametrize("hidden", [(), (24,), (32, 24)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_the_gradient_is_that_of_autograd_through_the_literal_perceptrons(
    activation: Any, shared: bool, hidden: tuple[int, ...], rows: int
) -> None:
    network = network_of(policy_spec(hidden=hidden, activation=activation), shared=shared)
    generator = torch.Generator().manual_seed(1)
    x, doutputs, dvalue = (torch.randn(shape, generator=generator) for shape in [(rows, 7), (rows, 3), (rows,)])
    found = gradient_of(network, x, doutputs, dvalue)
    parameters = dict(network.named_parameters())
    activations = [activation] * len(hidden)
    features = literal_mlp(parameters, "trunk", x, activations)
    outputs = literal_mlp(parameters, "policy_head", features, ["identity"])
    seen, above = (features, []) if shared else (x, activations)
    value = literal_mlp(parameters, "critic", seen, [*above, "identity"])[:, 0]
    layers = {name: p for name, p in parameters.items() if name != "log_std"}
    expected = torch.autograd.grad((outputs * doutputs).sum() + (value * dvalue).sum(), list(layers.values()))
    assert found.keys() == layers.keys()
    for name, gradient in zip(layers, expected, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, gradient.abs().max().item())}
        torch.testing.assert_close(found[name], gradient, **close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("shared", [False, True])
def test_many_rows_come_to_the_same_as_few(shared: bool) -> None:
    for compiled in (0, 1, 2):
        network = network_of(policy_spec(), shared=shared, compiled=compiled)
        x = torch.randn(5000, 7, generator=torch.Generator().manual_seed(1))
        outputs, value = network(x)
        for first in (0, 2040, 4990):
            part = slice(first, first + 10)
            torch.testing.assert_close(network.policy(x[part]), outputs[part], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(network.value(x[part]), value[part], rtol=1e-5, atol=1e-6)


def test_a_separate_critic_shares_nothing_with_the_policy() -> None:
    found = gradient_of(network_of(policy_spec()), torch.ones(3, 7), torch.zeros(3, 3), torch.ones(3))
    assert {name for name, gradient in found.items() if gradient.any()} == {
        name for name in found if name.startswith("critic.")
    }


def test_a_shared_trunk_learns_from_the_critic_and_has_fewer_parameters() -> None:
    shared, separate = network_of(policy_spec(), shared=True), network_of(policy_spec(), shared=False)
    found = gradient_of(shared, torch.ones(3, 7), torch.zeros(3, 3), torch.ones(3))
    assert all(found[name].any() for name in found if name.startswith("trunk."))
    assert sum(p.numel() for p in separate.parameters()) - sum(p.numel() for p in shared.parameters()) == (
        7 * 32 + 32 + 32 * 24 + 24
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("action", [BOX, DISCRETE])
def test_a_policy_without_hidden_layers_is_linear(action: ActionSpec, shared: bool) -> None:
    spec = policy_spec(action, hidden=())
    network = network_of(spec, shared=shared)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    outputs, value = network(x)
    torch.testing.assert_close(network(2 * x)[0], 2 * outputs)  # biases start at 0
    torch.testing.assert_close(network.value(2 * x), 2 * value)
    assert export_weights(network, None).arrays.keys() == weights_layout(spec).keys()


def assert_orthogonal(weight: Tensor, gain: float) -> None:
    """The smaller side of the matrix holds orthogonal vectors of length ``gain``."""
    narrow = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = (narrow @ narrow.T).detach()
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_weights_start_orthogonal_with_the_gains_of_the_37_details(shared: bool) -> None:
    network = network_of(policy_spec(), shared=shared)
    assert network.trunk is not None
    hidden = [*network.trunk.weights, *network.critic.weights[:-1]]
    assert len(hidden) == (2 if shared else 4)
    for weight in hidden:
        assert_orthogonal(weight, 2**0.5)
    assert_orthogonal(network.policy_head.weights[0], 0.01)
    assert_orthogonal(network.critic.weights[-1], 1.0)
    for name, parameter in network.named_parameters():
        if "biases" in name:
            assert (parameter == 0).all()


def test_log_std_starts_where_it_is_told_and_only_boxes_have_one() -> None:
    network = network_of(policy_spec(BOX), log_std=-0.7)
    assert network.log_std.tolist() == pytest.approx([-0.7] * 3)
    choices = network_of(policy_spec(DISCRETE))
    assert choices.log_std is None
    assert "log_std" not in {**dict(choices.named_parameters()), **choices.policy_parameters()}


def test_the_same_seed_starts_with_the_same_bits() -> None:
    first, again, other = (network_of(policy_spec(), seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["trunk.weights.0"], other["trunk.weights.0"])


def normalizer_of(width: int, seed: int) -> ObservationNormalizer:
    normalizer = ObservationNormalizer(width, 10.0, torch.device("cpu"))
    normalizer.fold(3 + 2 * torch.randn(50, width, generator=torch.Generator().manual_seed(seed)))
    return normalizer


def scramble(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("action", [BOX, DISCRETE])
def test_policy_arrays_are_exactly_those_of_the_layout(action: ActionSpec, normalize: bool, shared: bool) -> None:
    spec = policy_spec(action, normalize=normalize)
    network = network_of(spec, shared=shared)
    weights = export_weights(network, normalizer_of(7, 0) if normalize else None)
    assert {name: array.shape for name, array in weights.arrays.items()} == weights_layout(spec)
    assert all(array.dtype == np.float32 for array in weights.arrays.values())
    assert decode_weights(encode_weights(weights)).spec == spec


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("action", [BOX, DISCRETE])
def test_export_and_import_give_the_same_bits_back(action: ActionSpec, shared: bool) -> None:
    spec = policy_spec(action, normalize=True)
    network, normalizer = network_of(spec, shared=shared), normalizer_of(7, 0)
    scramble(network, 1)
    content = encode_weights(export_weights(network, normalizer))
    other, other_normalizer = network_of(spec, shared=shared, seed=9), normalizer_of(7, 5)
    import_weights(decode_weights(content), other, other_normalizer)
    assert encode_weights(export_weights(other, other_normalizer)) == content
    observation = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(other_normalizer.apply(observation), normalizer.apply(observation))
    assert torch.equal(other(observation)[0], network(observation)[0])


def test_import_leaves_a_separate_critic_as_it_is() -> None:
    spec = policy_spec()
    network, other = network_of(spec), network_of(spec, seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    import_weights(export_weights(other, None), network, None)
    for name, tensor in network.state_dict().items():
        origin = before if name.startswith("critic.") else other.state_dict()
        assert torch.equal(tensor, origin[name]), name


def test_import_refuses_a_policy_of_another_kind() -> None:
    weights = export_weights(network_of(policy_spec(activation="relu")), None)
    with pytest.raises(ValueError, match="another kind"):
        import_weights(weights, network_of(policy_spec(activation="tanh")), None)


def test_exported_arrays_do_not_follow_later_training() -> None:
    network, normalizer = network_of(policy_spec(normalize=True)), normalizer_of(7, 0)
    weights = export_weights(network, normalizer)
    before = encode_weights(weights)
    scramble(network, 2)
    normalizer.fold(torch.full((5, 7), 100.0))
    assert encode_weights(weights) == before


def test_imported_parameters_do_not_follow_the_arrays() -> None:
    network = network_of(policy_spec())
    weights = export_weights(network_of(policy_spec(), seed=1), None)
    import_weights(weights, network, None)
    before = network.policy_parameters()["policy.0.weight"].detach().clone()
    weights.arrays["policy.0.weight"][...] = 0
    assert torch.equal(network.policy_parameters()["policy.0.weight"], before)


def test_entropy_and_log_prob_are_those_of_the_action() -> None:
    outputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    box = network_of(policy_spec(BOX), log_std=-0.5)
    normal = torch.distributions.Normal(outputs, box.log_std.exp())
    action = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(box.log_prob(outputs, action), normal.log_prob(action).sum(-1))
    torch.testing.assert_close(box.entropy(outputs).mean(), normal.entropy().sum(-1).mean())
    discrete = network_of(policy_spec(ActionSpec("discrete", counts=(3,))))
    categorical = torch.distributions.Categorical(logits=outputs)
    choice = torch.arange(8) % 3
    torch.testing.assert_close(discrete.log_prob(outputs, choice[:, None].float()), categorical.log_prob(choice))
    torch.testing.assert_close(discrete.entropy(outputs).mean(), categorical.entropy().mean())
