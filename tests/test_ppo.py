"""Stop 8: the losses as pure functions, and one update, against an independent computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rustyrl import perceptron as compiled_code
from rustyrl.config import PPOConfig
from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl.weights import PolicySpec
from rustyrl_actors.inference import Policy
from rustyrl_learner import ppo
from rustyrl_learner.adam import Adam
from rustyrl_learner.network import SPLIT, ActorCritic, export_weights
from rustyrl_learner.ppo import Losses, kl_estimate, policy_loss, ppo_update, value_loss
from rustyrl_learner.rows import Minibatch, TrainingBatch

WIDTH = 5
ACTIONS = {
    "box": ActionSpec("box", shape=(3,), low=(-1.0,) * 3, high=(1.0,) * 3),
    "squashed": ActionSpec("box", shape=(3,), low=(-1.0, 0.0, 2.0), high=(1.0, 5.0, 2.5)),
    "discrete": ActionSpec("discrete", counts=(4,)),
    "masked": ActionSpec("discrete", counts=(4,), masked=True),
}
PLAIN = PPOConfig(
    epochs=1,
    minibatch_size=1 << 20,
    learning_rate=1e-3,
    schedule="constant",
    entropy=0.01,
    max_gradient_norm=1e9,
)


pytestmark = pytest.mark.usefixtures("one_thread")
threads = {"compiled": 0}  # of compiled code in the networks that `network_of` makes


@pytest.fixture(autouse=True, params=[0, 2], ids=["torch", "compiled"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both."""
    if request.param and not compiled_code.COMPILED:
        pytest.skip(compiled_code.PROBLEM)
    monkeypatch.setitem(threads, "compiled", request.param)


def with_config(**changes: Any) -> PPOConfig:
    return msgspec.structs.replace(PLAIN, **changes)


def network_of(
    kind: str = "box",
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh",
    *,
    shared: bool = False,
    seed: int = 0,
    lanes: int = 1,
    compiled: int | None = None,
) -> ActorCritic:
    """A network whose policy is far from flat, so that a wrong gradient shows."""
    observation = (ArraySpec("main", (WIDTH,), "float32"),)
    box: Literal["clipped", "squashed"] = "squashed" if kind == "squashed" else "clipped"
    spec = PolicySpec(observation, (ACTIONS[kind],), (24, 8), activation, normalize=False, box=box)
    torch.manual_seed(seed)
    compiled = threads["compiled"] if compiled is None else compiled
    network = ActorCritic(spec, shared=shared, initial_log_std=-0.3, lanes=lanes, compiled=compiled)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def batch_of(
    network: ActorCritic, count: int = 60, seed: int = 0, *, drift: float = 0.3, lag: float = 0.0
) -> TrainingBatch:
    """Steps of an update that has gone ``drift`` in log-probability, started ``lag`` away from who collected them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    observation = normal(count, WIDTH)
    with torch.no_grad():
        outputs, value = network(observation)
        (part,), mask = network.spec.action, None
        if part.kind == "box":
            action = outputs + 0.7 * normal(*outputs.shape)
        else:
            choice = torch.randint(0, outputs.shape[1], (count, 1), generator=generator)
            action = choice.float()
            if part.masked:
                mask = (torch.rand(outputs.shape, generator=generator) < 0.5).scatter(1, choice, value=True)
        proximal = network.log_prob(outputs, action, mask) + drift * normal(count)
        behavior = proximal + lag * normal(count)
        old_value = value + drift * normal(count)
    advantage = 2 + 3 * normal(count)
    return TrainingBatch(observation, action, mask, behavior, proximal, advantage, old_value, old_value + advantage)


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


class Torch:
    """An optimiser of torch's own."""

    def __init__(self, kind: type[torch.optim.SGD] | type[torch.optim.Adam], network: ActorCritic) -> None:
        self.optimizer = kind(network.parameters(), lr=1.0)
        self.rates: list[float] = []

    def step(self, learning_rate: float) -> None:
        self.rates.append(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()


def update(
    network: ActorCritic,
    batch: TrainingBatch,
    config: PPOConfig,
    rate: float = 1e-3,
    on_minibatch: Callable[[], None] = lambda: None,
    *,
    plain_descent: bool = False,
    seed: int = 0,
) -> Losses:
    optimizer = Torch(torch.optim.SGD if plain_descent else torch.optim.Adam, network)
    return ppo_update(network, optimizer, batch, config, rate, torch.Generator().manual_seed(seed), on_minibatch)


def literal_policy_loss(ratio: list[float], importance: list[float], advantage: list[float], clip: float) -> float:
    rows = zip(ratio, importance, advantage, strict=True)
    terms = [weight * min(r * a, min(max(r, 1 - clip), 1 + clip) * a) for r, weight, a in rows]
    return -sum(terms) / len(terms)


def literal_value_loss(value: list[float], old: list[float], target: list[float], clip: float) -> float:
    total = 0.0
    for v, o, goal in zip(value, old, target, strict=True):
        error = (v - goal) ** 2
        if clip > 0:
            error = max(error, (o + min(max(v - o, -clip), clip) - goal) ** 2)
        total += error
    return total / (2 * len(value))


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_policy_loss_equals_the_literal_twin(seed: int, clip: float) -> None:
    rng = np.random.default_rng(seed)
    ratio, importance = np.exp(0.5 * rng.standard_normal((2, 40)))
    advantage = rng.standard_normal(40)
    ours = policy_loss(torch.from_numpy(ratio), torch.from_numpy(importance), torch.from_numpy(advantage), clip)
    expected = literal_policy_loss(ratio.tolist(), importance.tolist(), advantage.tolist(), clip)
    assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.5, 1.0, 0.0), (0.5, -1.0, 0.0), (1.5, -1.0, 1.0), (0.5, 1.0, -1.0), (1.1, 2.0, -2.0), (0.9, -2.0, 2.0)],
)
def test_the_surrogate_stops_rewarding_beyond_the_clip_but_still_punishes(
    ratio: float, advantage: float, slope: float
) -> None:
    at = torch.tensor([ratio], requires_grad=True)
    policy_loss(at, torch.ones(1), torch.tensor([advantage]), 0.2).backward()
    assert at.grad is not None
    assert at.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("clip", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_value_loss_equals_the_literal_twin(seed: int, clip: float) -> None:
    value, old, target = np.random.default_rng(seed).standard_normal((3, 40))
    ours = value_loss(torch.from_numpy(value), torch.from_numpy(old), torch.from_numpy(target), clip)
    assert ours.item() == pytest.approx(
        literal_value_loss(value.tolist(), old.tolist(), target.tolist(), clip), rel=1e-12
    )


def test_value_loss_without_a_clip_does_not_read_the_old_value() -> None:
    value, target = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    assert value_loss(value, torch.full((2,), math.nan), target, 0.0).item() == pytest.approx(1.25)


def test_a_value_that_moved_beyond_the_clip_towards_its_target_has_no_gradient() -> None:
    value = torch.tensor([1.0], requires_grad=True)
    value_loss(value, torch.tensor([0.0]), torch.tensor([2.0]), 0.1).backward()
    assert value.grad is not None
    assert value.grad.item() == 0.0


def test_kl_estimate_is_zero_without_a_change_and_never_negative() -> None:
    assert kl_estimate(torch.zeros(5)).item() == 0.0
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64)
    expected = [math.exp(x) - 1 - x for x in log_ratio.tolist()]
    assert kl_estimate(log_ratio).item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    for x in (-1e-3, 1e-3, -1.0, 1.0):
        assert kl_estimate(torch.tensor([x])).item() > 0
    assert kl_estimate(torch.tensor([1e-4])).item() == pytest.approx(5e-9, rel=1e-2)  # float32 keeps small ones


def test_kl_estimate_converges_to_the_divergence_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.3, 0.8)
    sample = torch.randn(200_000, generator=generator, dtype=torch.float64)
    estimate = kl_estimate(new.log_prob(sample) - old.log_prob(sample))
    assert estimate.item() == pytest.approx(torch.distributions.kl_divergence(old, new).item(), rel=0.02)


@dataclass
class Expected:
    """What one minibatch should give."""

    policy_loss: float
    value_loss: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    gradient: dict[str, Tensor]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(g.square().sum()) for g in self.gradient.values()))


def perceptron(parameters: dict[str, Tensor], prefix: str, x: Tensor, activate: Any, layers: int) -> Tensor:
    for index in range(layers):
        x = activate(F.linear(x, parameters[f"{prefix}.weights.{index}"].T, parameters[f"{prefix}.biases.{index}"]))
    return x


def literal_minibatch(network: ActorCritic, batch: TrainingBatch, config: PPOConfig) -> Expected:
    """The whole loss from the papers with torch.distributions and autograd, in float64."""
    p = {name: value.double().requires_grad_() for name, value in parameters_of(network).items()}
    x = batch.observation.double()
    activate = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}[network.spec.activation]
    features = perceptron(p, "trunk", x, activate, 2)
    outputs = perceptron(p, "policy_head", features, lambda y: y, 1)
    if network.shared:
        value = perceptron(p, "critic", features, lambda y: y, 1)[:, 0]
    else:
        hidden = perceptron(p, "critic", x, activate, 2)
        value = F.linear(hidden, p["critic.weights.2"].T, p["critic.biases.2"])[:, 0]
    if network.spec.action[0].kind == "box":
        normal = torch.distributions.Normal(outputs, p["log_std"].exp().expand_as(outputs))
        log_prob, entropy = normal.log_prob(batch.action.double()).sum(1), normal.entropy().sum(1).mean()
        if network.spec.box == "squashed":
            part = network.spec.action[0]
            half = (torch.tensor(part.high) - torch.tensor(part.low)).double() / 2
            log_prob = log_prob - (half / torch.cosh(batch.action.double()) ** 2).log().sum(1)
            # What the tanh adds, by the trapezoidal rule over 8 deviations to both sides.
            z = torch.linspace(-8, 8, 401, dtype=torch.float64)
            slope = half[:, None] / torch.cosh(outputs[..., None] + p["log_std"].exp()[:, None] * z) ** 2
            density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
            entropy = entropy + torch.trapezoid(slope.log() * density, z).sum(1).mean()
    else:
        # A choice that is not allowed has probability 0, so nothing of it is left in any sum or gradient.
        odds = outputs.exp() if batch.action_mask is None else outputs.exp() * batch.action_mask
        probability = odds / odds.sum(1, keepdim=True)
        log_prob = probability.gather(1, batch.action.long())[:, 0].log()
        entropy = -torch.special.xlogy(probability, probability.clamp(min=1e-300)).sum(1).mean()
    advantage = batch.advantage.double()
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / advantage.std(correction=1)
    log_ratio = log_prob - batch.proximal_log_prob.double()
    ratio = log_ratio.exp()
    low, high = 1 - config.clip, 1 + config.clip
    surrogate = torch.where(advantage >= 0, ratio.clamp(max=high), ratio.clamp(min=low)) * advantage
    start = batch.proximal_log_prob.double().exp() / batch.behavior_log_prob.double().exp()
    surrogate = surrogate * torch.where(start > 2, 2.0, start)
    old, target = batch.value.double(), batch.value_target.double()
    error = (value - target) ** 2
    if config.value_clip:
        moved = old + torch.clip(value - old, -config.value_clip, config.value_clip)
        error = torch.stack([error, (moved - target) ** 2]).amax(0)
    critic = error.mean() / 2
    loss = -surrogate.mean() + config.value_coefficient * critic - config.entropy * entropy
    gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    return Expected(
        policy_loss=-surrogate.mean().item(),
        value_loss=critic.item(),
        entropy=entropy.item(),
        approx_kl=(ratio - 1 - log_ratio).mean().item(),
        clip_fraction=((ratio < low) | (ratio > high)).double().mean().item(),
        gradient={n: torch.zeros_like(p[n]) if g is None else g for n, g in zip(p, gradients, strict=True)},
    )


@pytest.mark.parametrize("config", [PLAIN, with_config(value_clip=0.2, entropy=0.05), with_config(clip=0.05)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [("box", "tanh"), ("squashed", "tanh"), ("discrete", "elu"), ("masked", "relu"), ("box", "silu")],
)
@pytest.mark.parametrize("lag", [0.0, 0.6])
def test_the_loss_and_gradient_of_a_minibatch_equal_the_literal_twin(
    kind: str, activation: Any, shared: bool, config: PPOConfig, lag: float
) -> None:
    network = network_of(kind, activation, shared=shared)
    batch = batch_of(network, lag=lag)
    expected = literal_minibatch(network, batch, config)
    before = parameters_of(network)
    # One step of plain gradient descent with rate 1: what the parameters lost is the gradient.
    losses = update(network, batch, config, 1.0, plain_descent=True)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"):
        assert getattr(losses, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name
    assert losses.gradient_norm == pytest.approx(expected.norm, rel=1e-4)
    assert losses.epochs == 1
    scale = max(g.abs().max().item() for g in expected.gradient.values())
    for name, parameter in network.named_parameters():
        gradient = (before[name] - parameter.detach()).double()
        torch.testing.assert_close(gradient, expected.gradient[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_the_gradient_agrees_with_finite_differences_of_the_literal_loss() -> None:
    """The twin's own gradient, checked without autograd."""
    network = network_of()
    batch = batch_of(network)

    def loss() -> float:
        expected = literal_minibatch(network, batch, PLAIN)
        return expected.policy_loss + PLAIN.value_coefficient * expected.value_loss - PLAIN.entropy * expected.entropy

    gradient = literal_minibatch(network, batch, PLAIN).gradient
    network.double()
    for name, parameter in network.named_parameters():
        index = tuple(0 for _ in parameter.shape)
        here = parameter[index].item()
        parameter.data[index] = here + 1e-6
        above = loss()
        parameter.data[index] = here - 1e-6
        below = loss()
        parameter.data[index] = here
        assert (above - below) / 2e-6 == pytest.approx(gradient[name][index].item(), rel=1e-3, abs=1e-6), name


def test_gradients_are_scaled_down_to_the_largest_norm() -> None:
    batch = batch_of(network_of())
    free, bound = network_of(), network_of()
    before = parameters_of(free)
    norm = update(free, batch, PLAIN, 1.0, plain_descent=True).gradient_norm
    reported = update(bound, batch, with_config(max_gradient_norm=norm / 4), 1.0, plain_descent=True).gradient_norm
    assert reported == pytest.approx(norm)  # the norm before it is scaled
    for name, parameter in bound.named_parameters():
        step, full = before[name] - parameter.detach(), before[name] - free.get_parameter(name).detach()
        torch.testing.assert_close(step, full / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["box", "discrete", "masked"])
def test_the_first_ratio_is_one_when_the_same_weights_acted(kind: str, shared: bool) -> None:
    network = network_of(kind, shared=shared)
    batch = batch_of(network, 400, drift=0.0)
    losses = update(network, batch, with_config(minibatch_size=100, epochs=3), 1e-2)
    assert losses.first_ratio_error <= 1e-4
    assert losses.approx_kl > 1e-4  # and later ones are not


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
@pytest.mark.parametrize("kind", ["box", "discrete", "masked"])
def test_the_first_ratio_is_one_when_an_actor_acted_with_the_exported_weights(kind: str, activation: Any) -> None:
    network = network_of(kind, activation)
    batch = batch_of(network, 256)
    policy = Policy(export_weights(network, None), 256)
    rng = np.random.default_rng(0)
    action, log_prob = policy.allocate_action(), np.empty(256, np.float32)
    noise = rng.standard_normal((256, 3)) if kind == "box" else rng.random((256, 1))
    masks = None if batch.action_mask is None else {"main": batch.action_mask.numpy()}
    policy.act({"main": batch.observation.numpy()}, noise.astype(np.float32), action, log_prob, masks)
    behavior = torch.from_numpy(log_prob)
    taken = torch.from_numpy(action["main"].reshape(256, -1).astype(np.float32))
    batch = replace(batch, action=taken, behavior_log_prob=behavior, proximal_log_prob=behavior.clone())
    losses = update(network, batch, PLAIN)
    assert losses.first_ratio_error <= 1e-4
    assert losses.clip_fraction == 0.0


def test_the_first_ratio_error_names_the_step_that_is_furthest_off() -> None:
    network = network_of()
    batch = batch_of(network, drift=0.0)
    batch.behavior_log_prob[17] -= math.log(1.25)
    losses = update(network, batch, PLAIN)
    assert losses.first_ratio_error == pytest.approx(0.25, rel=1e-4)
    assert losses.approx_kl == pytest.approx(0.0, abs=1e-6)  # which is measured from where the update starts


def test_a_step_that_its_collector_found_unlikely_counts_double_at_most() -> None:
    network = network_of()
    batch = batch_of(network, drift=0.0)
    config = with_config(normalize_advantage=False)
    plain = update(network_of(), batch, config).policy_loss
    for factor, expected in ((0.5, 0.5), (1.5, 1.5), (2.0, 2.0), (8.0, 2.0)):
        moved = replace(batch, behavior_log_prob=batch.behavior_log_prob - math.log(factor))
        assert update(network_of(), moved, config).policy_loss == pytest.approx(expected * plain, rel=1e-4)


def test_a_minibatch_normalizes_its_own_advantages() -> None:
    """Scaling and shifting the advantages of a whole minibatch cannot change what is learned from it."""
    network, moved = network_of(), network_of()
    batch = batch_of(network)
    other = replace(batch, advantage=100 * batch.advantage - 40)
    first = update(network, batch, PLAIN)
    second = update(moved, other, PLAIN)
    assert second.policy_loss == pytest.approx(first.policy_loss, rel=1e-4)
    for name, parameter in moved.named_parameters():
        torch.testing.assert_close(parameter, network.get_parameter(name), rtol=1e-4, atol=1e-5)
    without = with_config(normalize_advantage=False)
    assert update(network_of(), other, without).policy_loss != pytest.approx(first.policy_loss, rel=0.5)


def test_advantages_are_normalized_per_minibatch_and_not_over_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rate 0 the policy stands still: the loss is then the mean over minibatches of their literal losses."""
    network = network_of()
    batch = batch_of(network, 40)
    batch.advantage[:10] += 50  # no two minibatches agree on the mean
    config = with_config(minibatch_size=10, entropy=0.0)
    seen: list[Tensor] = []
    inner = ppo.minibatch_gradient

    def watched(network: ActorCritic, rows: TrainingBatch, *others: Any) -> Minibatch:
        seen.append(rows.observation)
        return inner(network, rows, *others)

    monkeypatch.setattr(ppo, "minibatch_gradient", watched)
    losses = update(network, batch, config, 0.0, plain_descent=True)
    assert [len(x) for x in seen] == [10] * 4
    rows = [torch.tensor([int((batch.observation == row).all(1).nonzero()) for row in x]) for x in seen]
    assert torch.cat(rows).sort().values.tolist() == list(range(40))
    parts = [literal_minibatch(network, rows_of(batch, r), config) for r in rows]
    assert losses.policy_loss == pytest.approx(sum(part.policy_loss for part in parts) / 4, rel=1e-4)
    assert losses.value_loss == pytest.approx(sum(part.value_loss for part in parts) / 4, rel=1e-4)
    assert losses.policy_loss != pytest.approx(literal_minibatch(network, batch, config).policy_loss, rel=1e-2)


def rows_of(batch: TrainingBatch, rows: Tensor) -> TrainingBatch:
    return TrainingBatch(
        batch.observation[rows],
        batch.action[rows],
        None if batch.action_mask is None else batch.action_mask[rows],
        batch.behavior_log_prob[rows],
        batch.proximal_log_prob[rows],
        batch.advantage[rows],
        batch.value[rows],
        batch.value_target[rows],
    )


def test_a_minibatch_of_one_step_is_not_normalized() -> None:
    network = network_of()
    losses = update(network, batch_of(network, 1), PLAIN)
    assert math.isfinite(losses.policy_loss)
    assert losses.policy_loss != 0.0


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(60, 20, 3), (60, 1 << 20, 1), (55, 20, 3), (65, 20, 3), (7, 1, 7)]
)
def test_an_epoch_has_as_many_minibatches_as_come_nearest_to_the_size(count: int, size: int, expected: int) -> None:
    network = network_of()
    calls: list[None] = []
    config = with_config(epochs=3, minibatch_size=size)
    losses = update(network, batch_of(network, count), config, on_minibatch=lambda: calls.append(None))
    assert len(calls) == 3 * expected
    assert losses.epochs == 3


def test_an_update_can_be_abandoned_between_minibatches() -> None:
    class AbandonedError(Exception):
        pass

    calls: list[None] = []

    def stop_at_the_second() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise AbandonedError

    network = network_of()
    with pytest.raises(AbandonedError):
        update(network, batch_of(network), with_config(epochs=9), on_minibatch=stop_at_the_second)
    assert len(calls) == 2


def with_kl_schedule(**changes: Any) -> PPOConfig:
    steering = {"target_kl": 0.01, "min_learning_rate": 1e-6, "max_learning_rate": 1.0, "entropy": 0.0}
    return with_config(schedule="kl", **steering | changes)


def test_the_kl_schedule_raises_a_rate_that_changes_too_little() -> None:
    network = network_of()
    batch = batch_of(network, drift=0.0)
    losses = update(network, batch, with_kl_schedule(), 1e-4)
    assert losses.approx_kl < 0.005
    assert losses.learning_rate == pytest.approx(1.5e-4)


def test_the_kl_schedule_lowers_a_rate_that_changes_too_much() -> None:
    network = network_of()
    batch = batch_of(network, drift=0.5)  # already far away in the first minibatch
    losses = update(network, batch, with_kl_schedule(), 1.5e-4)
    assert losses.approx_kl > 0.02
    assert losses.learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(("kl", "factor"), [(0.004, 1.5), (0.006, 1.0), (0.01, 1.0), (0.018, 1.0), (0.022, 1 / 1.5)])
@pytest.mark.parametrize("minibatch_size", [1000, 4000])
def test_the_kl_schedule_acts_below_half_and_above_twice_the_target(
    kl: float, factor: float, minibatch_size: int
) -> None:
    network = network_of()
    batch = batch_of(network, 4000, drift=math.sqrt(2 * math.log1p(kl)))  # normal log-ratios have this KL
    config = with_kl_schedule(minibatch_size=minibatch_size, min_learning_rate=1e-9)
    losses = update(network, batch, config, 1e-7)
    assert losses.approx_kl == pytest.approx(kl, rel=0.08)
    assert losses.learning_rate == pytest.approx(factor * 1e-7)


def test_the_kl_schedule_acts_after_every_epoch() -> None:
    network = network_of()
    optimizer = Torch(torch.optim.Adam, network)
    batch = batch_of(network, drift=0.0)
    config = with_kl_schedule(epochs=3, minibatch_size=30)
    generator = torch.Generator().manual_seed(0)
    losses = ppo_update(network, optimizer, batch, config, 1e-5, generator)
    assert optimizer.rates == pytest.approx([1e-5, 1e-5, 1.5e-5, 1.5e-5, 2.25e-5, 2.25e-5])
    assert losses.learning_rate == pytest.approx(3.375e-5)


def test_the_kl_schedule_stays_between_its_ends() -> None:
    network = network_of()
    calm, wild = batch_of(network, drift=0.0), batch_of(network, drift=0.5)
    top = update(network, calm, with_kl_schedule(epochs=5, max_learning_rate=1.2e-4), 1e-4)
    assert top.learning_rate == 1.2e-4
    bottom = update(network, wild, with_kl_schedule(epochs=5, min_learning_rate=8e-5), 1e-4)
    assert bottom.learning_rate == 8e-5


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_other_schedules_leave_the_rate_to_the_caller(schedule: str) -> None:
    network = network_of()
    losses = update(network, batch_of(network, drift=0.5), with_config(schedule=schedule, epochs=3), 3e-4)
    assert losses.learning_rate == 3e-4


def test_too_large_a_divergence_ends_the_epochs() -> None:
    network = network_of()
    batch = batch_of(network, drift=0.5)
    calls: list[None] = []
    config = with_config(epochs=6, minibatch_size=20, stop_kl=0.02)
    losses = update(network, batch, config, on_minibatch=lambda: calls.append(None))
    assert losses.epochs == 1
    assert len(calls) == 3  # the epoch is finished first
    assert update(network_of(), batch, with_config(epochs=6, stop_kl=0.0)).epochs == 6
    assert update(network_of(), batch_of(network, drift=0.0), with_config(epochs=6, stop_kl=0.5)).epochs == 6


@pytest.mark.parametrize(
    ("field", "number", "named"),
    [
        ("advantage", math.nan, "policy loss is nan"),
        ("advantage", math.inf, "policy loss is -inf"),
        ("behavior_log_prob", math.nan, "policy loss is nan"),
        ("proximal_log_prob", math.nan, "policy loss is nan"),
        ("value_target", math.nan, "value loss is nan"),
        ("value_target", math.inf, "value loss is inf"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_update_and_leave_the_parameters(
    field: str, number: float, named: str
) -> None:
    network = network_of()
    batch = batch_of(network)
    getattr(batch, field)[7] = number
    before = parameters_of(network)
    with pytest.raises(FloatingPointError, match=named):
        update(network, batch, with_config(normalize_advantage=False))
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_nan_in_a_later_minibatch_keeps_the_steps_before_it() -> None:
    network = network_of()
    batch = batch_of(network, 40)
    batch.advantage[3] = math.nan
    config = with_config(minibatch_size=10)
    states: list[dict[str, Tensor]] = [parameters_of(network)]
    seed = next(  # a shuffle in which row 3 comes neither first nor last
        seed
        for seed in range(100)
        if torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist().index(3) // 10 == 2
    )
    with pytest.raises(FloatingPointError, match="policy loss"):
        update(network, batch, config, on_minibatch=lambda: states.append(parameters_of(network)), seed=seed)
    assert len(states) == 3
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, states[-1][name]), name


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter() -> None:
    network = network_of(compiled=0)
    batch = batch_of(network)
    inner = network.take_gradient

    def spoiled(*arguments: Any) -> None:
        inner(*arguments)
        gradient = network.get_parameter("critic.weights.1").grad
        assert gradient is not None
        gradient.mul_(math.inf)

    network.take_gradient = spoiled  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"gradient of critic\.weights\.1"):
        update(network, batch, PLAIN)


def test_the_same_seed_gives_the_same_bits() -> None:
    config = with_kl_schedule(epochs=3, minibatch_size=16)
    ends = []
    for seed in (3, 3, 4):
        network = network_of()
        losses = update(network, batch_of(network), config, seed=seed)
        ends.append((losses, parameters_of(network)))
    (first, bits), (again, bits_again), (other, bits_other) = ends
    assert again == first
    assert all(torch.equal(bits[name], bits_again[name]) for name in bits)
    assert other != first
    assert any(not torch.equal(bits[name], bits_other[name]) for name in bits)


def test_an_update_reads_its_batch_and_changes_nothing_in_it() -> None:
    network = network_of()
    batch, same = batch_of(network), batch_of(network)
    update(network, batch, with_config(epochs=2, minibatch_size=16, value_clip=0.2))
    for name in (
        "observation",
        "action",
        "behavior_log_prob",
        "proximal_log_prob",
        "advantage",
        "value",
        "value_target",
    ):
        assert torch.equal(getattr(batch, name), getattr(same, name)), name


def test_updates_move_probability_to_what_turned_out_well() -> None:
    network = network_of("discrete")
    batch = batch_of(network, 200, drift=0.0)
    batch = replace(batch, advantage=torch.where(batch.action[:, 0] == 2, 1.0, -1.0))

    def probability() -> float:
        with torch.no_grad():
            return torch.softmax(network(batch.observation)[0], -1)[:, 2].mean().item()

    before = probability()
    update(network, batch, with_config(epochs=5, minibatch_size=50), 3e-3)
    assert probability() > before + 0.02


@pytest.mark.parametrize("kind", ["box", "squashed", "discrete", "masked"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("of", ["lanes", "compiled"])
def test_two_threads_give_the_bits_of_one(kind: str, shared: bool, of: str) -> None:
    ends = []
    for threads in (1, 2):
        network = network_of(kind, shared=shared, **{of: threads})  # type: ignore[arg-type]
        config = with_config(epochs=3, minibatch_size=SPLIT, entropy=0.02)
        update(network, batch_of(network, 3 * SPLIT + 5), config, 1e-2)
        ends.append(network.flat()[0].tensor.clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("broken", ["by_outputs", "by_value"])
def test_an_exception_in_either_lane_is_raised(broken: str) -> None:
    def fail(_: Tensor) -> Tensor:
        raise ValueError(broken)

    network = network_of(lanes=2)
    by = {"by_outputs": torch.zeros_like, "by_value": torch.zeros_like, broken: fail}
    with pytest.raises(ValueError, match=broken):
        network.take_gradient(torch.zeros(SPLIT, network.spec.observation[0].width), **by)


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("shared", [False, True])
def test_an_epoch_on_another_device_waits_for_no_number_of_it(kind: str, shared: bool) -> None:
    """On torch's device without numbers, where to look at one is an error."""
    batch = batch_of(network_of(kind), 64)
    network = network_of(kind, shared=shared, compiled=0).to("meta")
    rows = batch.map(lambda array: array.to("meta"))
    parameters, gradient = network.flat()
    optimizer = Adam(parameters.tensor, gradient.tensor, epsilon=1e-8)
    order = torch.empty(64, dtype=torch.int64, device="meta")
    config = with_config(value_clip=0.2, minibatch_size=16)
    figures = ppo.run_epoch(network, optimizer, rows, config, order, 1e-3)
    assert optimizer.steps == 4
    with pytest.raises((RuntimeError, NotImplementedError)):
        figures.tolist()
