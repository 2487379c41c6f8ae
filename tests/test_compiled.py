"""Gradients and optimiser steps in compiled code: against autograd in float64, and torch, on every kind of action."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_action_spaces import EVERY, KINDS, Kind
from torch import Tensor
from torch.nn import functional as F

from rustyrl import perceptron
from rustyrl.config import PPOConfig
from rustyrl.spec import ActionSpec
from rustyrl.weights import PolicySpec
from rustyrl_learner import ppo
from rustyrl_learner.adam import Adam
from rustyrl_learner.device import share_threads
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.ppo import minibatch_gradient, policy_loss, value_loss
from rustyrl_learner.rows import APPROX_KL, GRADIENT_NORM, VALUE_LOSS, Minibatch, TrainingBatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not perceptron.COMPILED, reason=perceptron.PROBLEM or "compiled"),
]
CONFIG = PPOConfig(clip=0.2, value_clip=0.3, entropy=0.05, value_coefficient=0.7)
ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}


def network_of(
    kind: Kind = KINDS["discrete"],
    hidden: tuple[int, ...] = (16, 8),
    activation: str = "tanh",
    *,
    shared: bool = False,
    compiled: int = 1,
    seed: int = 0,
) -> ActorCritic:
    """A network whose policy is far from flat, so that a wrong gradient shows."""
    spec: PolicySpec = msgspec.structs.replace(kind.policy, hidden=hidden, activation=activation)
    torch.manual_seed(seed)
    network = ActorCritic(spec, shared=shared, initial_log_std=-0.3, compiled=compiled)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def batch_of(network: ActorCritic, count: int, seed: int = 0) -> TrainingBatch:
    """Made-up experience of an update that is under way, started away from who collected it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spec = network.spec
    observation = normal(count, sum(array.width for array in spec.observation))
    outputs, value = network(observation)
    columns, masks = [], []
    for block, deviations in network.distribution.blocks:
        part = outputs[:, block.output]
        if deviations is not None:
            columns.append(part + 0.7 * normal(*part.shape))
            continue
        choice = torch.randint(0, block.choices, (count, block.groups), generator=generator)
        columns.append(choice.float())
        if block.mask is not None:
            allowed = torch.rand((count, block.groups, block.choices), generator=generator) < 0.5
            masks.append(allowed.scatter(2, choice[..., None], value=True).flatten(1))
    action, mask = torch.cat(columns, 1), torch.cat(masks, 1) if masks else None
    proximal = network.log_prob(outputs, action, mask).detach() + 0.3 * normal(count)
    advantage, old = 2 + 3 * normal(count), value + 0.3 * normal(count)
    behavior = proximal + 0.5 * normal(count)
    return TrainingBatch(observation, action, mask, behavior, proximal, advantage, old, old + advantage)


def importance_of(rows: TrainingBatch) -> Tensor:
    return (rows.proximal_log_prob - rows.behavior_log_prob).exp().clamp(max=2)


def gradient_of(network: ActorCritic, rows: TrainingBatch, config: PPOConfig = CONFIG) -> tuple[Minibatch, Tensor]:
    gradient = network.flat()[1].tensor
    gradient.fill_(math.nan)  # everything is to be written
    return minibatch_gradient(network, rows, importance_of(rows), config), gradient.clone()


def through(p: dict[str, Tensor], part: str, x: Tensor, activation: str, *, last: bool) -> Tensor:
    count = sum(name.startswith(f"{part}.weights.") for name in p)
    for index in range(count):
        x = F.linear(x, p[f"{part}.weights.{index}"].T, p[f"{part}.biases.{index}"])
        x = x if last and index == count - 1 else ACTIVATIONS[activation](x)
    return x


def expected_of(network: ActorCritic, rows: TrainingBatch, config: PPOConfig) -> tuple[Minibatch, Tensor]:
    """By autograd, in float64, of the loss that is written down in ppo.py."""
    p = {name: value.detach().double().requires_grad_() for name, value in network.named_parameters()}
    wide = {f.name: getattr(rows, f.name) for f in fields(rows)}
    rows = TrainingBatch(**{n: a.double() if a is not None and a.is_floating_point() else a for n, a in wide.items()})
    activation, distribution = network.spec.activation, network.distribution
    features = through(p, "trunk", rows.observation, activation, last=False)
    outputs = through(p, "policy_head", features, activation, last=True)
    read = features if network.shared else rows.observation
    value = through(p, "critic", read, activation, last=True)[:, 0]
    log_std = p.get("log_std")
    log_prob = distribution.log_prob(outputs, log_std, rows.action, rows.action_mask)
    entropy = distribution.entropy(outputs, log_std, rows.action_mask).mean()
    advantage = rows.advantage
    if config.normalize_advantage and len(advantage) > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (log_prob - rows.proximal_log_prob).exp()
    loss = policy_loss(ratio, importance_of(rows), advantage, config.clip) - config.entropy * entropy
    loss = loss + config.value_coefficient * value_loss(value, rows.value, rows.value_target, config.value_clip)
    found = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    given = zip(p.values(), found, strict=True)
    flat = torch.cat([(torch.zeros_like(at) if gradient is None else gradient).reshape(-1) for at, gradient in given])
    return Minibatch(advantage, log_prob, value, entropy, flat.norm()), flat


def check(network: ActorCritic, rows: TrainingBatch, config: PPOConfig = CONFIG) -> None:
    (ours, gradient), (theirs, expected) = gradient_of(network, rows, config), expected_of(network, rows, config)
    for name in ("advantage", "log_prob", "value", "entropy", "gradient_norm"):
        found, right = getattr(ours, name).double(), getattr(theirs, name).detach()
        torch.testing.assert_close(found, right, rtol=1e-4, atol=3e-5, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@EVERY
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_on_every_kind_of_action_is_that_of_autograd(kind: Kind, activation: str, shared: bool) -> None:
    network = network_of(kind, activation=activation, shared=shared)
    check(network, batch_of(network, 130))
    plain = msgspec.structs.replace(CONFIG, entropy=0.0, value_clip=0.0, normalize_advantage=False)
    check(network, batch_of(network, 50, seed=1), plain)


@pytest.mark.parametrize("name", ["squashed-dict", "half-masked"])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 47, 48, 49, 95, 96, 97, 200])
def test_any_number_of_rows(name: str, rows: int) -> None:
    network = network_of(KINDS[name])
    check(network, batch_of(network, rows))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hidden", [(), (1,), (7,), (8, 9), (15, 16, 17), (64, 64), (130, 5, 33), (2,) * 12])
def test_any_widths_and_number_of_layers(hidden: tuple[int, ...], shared: bool) -> None:
    network = network_of(KINDS["dict"], hidden, shared=shared)
    check(network, batch_of(network, 70))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(KINDS)),
    rows=st.integers(1, 400),
    hidden=st.lists(st.integers(1, 40), max_size=4),
    activation=st.sampled_from(list(ACTIVATIONS)),
    shared=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_of_them_together(
    name: str, rows: int, hidden: list[int], activation: str, shared: bool, threads: int, seed: int
) -> None:
    network = network_of(KINDS[name], tuple(hidden), activation, shared=shared, compiled=threads, seed=seed)
    check(network, batch_of(network, rows, seed))


def test_many_choices() -> None:
    network = network_of(Kind((ActionSpec("discrete", counts=(300,)),)), (32,))
    check(network, batch_of(network, 60))


def test_observations_and_actions_may_lie_anywhere() -> None:
    network = network_of(KINDS["tuple"])
    rows = batch_of(network, 100)
    plain, gradient = gradient_of(network, rows)
    gapped = replace(
        rows, observation=rows.observation.T.contiguous().T, action=rows.action.repeat_interleave(2, 1)[:, ::2]
    )
    assert not gapped.observation.is_contiguous()
    assert not gapped.action.is_contiguous()
    again, same = gradient_of(network, gapped)
    assert torch.equal(gradient, same)
    assert torch.equal(plain.log_prob, again.log_prob)


@pytest.mark.parametrize("name", ["squashed-dict", "masked-multi-discrete"])
@pytest.mark.parametrize("rows", [1, 97, 400, 4096, 5000])
def test_any_number_of_threads_comes_to_the_same_bits(name: str, rows: int) -> None:
    found = []
    for threads in (1, 2, 3, 8, 64):
        network = network_of(KINDS[name], (64, 64), compiled=threads)
        minibatch, gradient = gradient_of(network, batch_of(network, rows))
        found.append((gradient, *(getattr(minibatch, f.name) for f in fields(minibatch))))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_callers_do_not_disturb_each_other() -> None:
    networks = [network_of(KINDS["dict"], (64, 64), compiled=1 + seed, seed=seed) for seed in range(3)]
    batches = [batch_of(network, 3000, seed) for seed, network in enumerate(networks)]
    expected = [gradient_of(*pair)[1] for pair in zip(networks, batches, strict=True)]
    wrong: list[int] = []

    def again(index: int) -> None:
        for _ in range(40):
            if not torch.equal(gradient_of(networks[index], batches[index])[1], expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=again, args=(index,)) for index in range(len(networks))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_logits_and_ratios_at_the_ends_of_float32_are_as_by_torch() -> None:
    network = network_of(KINDS["discrete"], ())
    rows = batch_of(network, 64)
    with torch.no_grad():
        network.policy_head.weights[0].mul_(300.0)  # logits of hundreds, probabilities of 0 and 1
    outputs, _ = network(rows.observation)
    settled = replace(rows, action=outputs.argmax(1, keepdim=True).float(), proximal_log_prob=torch.zeros(64))
    assert outputs.abs().max() > 200
    check(network, replace(settled, behavior_log_prob=torch.zeros(64)))
    # Where a ratio overflows upwards it is clipped away, or makes a loss that is not finite; never a wrong number.
    far = replace(settled, proximal_log_prob=torch.full((64,), -200.0), behavior_log_prob=torch.full((64,), -200.0))
    config = msgspec.structs.replace(CONFIG, normalize_advantage=False)
    fine, wrong = (replace(far, advantage=torch.full((64,), sign)) for sign in (1.0, -1.0))
    assert gradient_of(network, fine, config)[1].isfinite().all()
    assert not gradient_of(network, wrong, config)[0].gradient_norm.isfinite()


def of_two_choices(logit: Tensor) -> tuple[ActorCritic, TrainingBatch]:
    """A policy that says 0 and ``logit`` of two choices, and experience of which the first was chosen."""
    network = network_of(Kind((ActionSpec("discrete", counts=(2,)),)), ())
    with torch.no_grad():
        network.policy_head.weights[0].zero_()[0, 1] = 1.0
        network.policy_head.biases[0].zero_()
    rows = batch_of(network, len(logit))
    rows.observation[:, 0] = logit
    return network, replace(rows, action=torch.zeros(len(logit), 1))


def test_exponentials_and_logarithms_are_within_roundings() -> None:
    logit = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-1, 1, 3001)])
    found = gradient_of(*of_two_choices(logit))[0].log_prob.double()
    torch.testing.assert_close(found, -F.softplus(logit.double()), rtol=3e-7, atol=1.5e-7)


def test_one_logit_that_is_no_number_leaves_none_of_its_row() -> None:
    network, rows = of_two_choices(torch.zeros(20))
    rows.observation[3, 0] = math.nan
    assert gradient_of(network, rows)[0].log_prob.isnan().nonzero().flatten().tolist() == [3]
    with torch.no_grad():
        network.policy_head.biases[0][1] = math.nan
    assert gradient_of(network, rows)[0].log_prob.isnan().all()


def test_a_choice_that_is_never_allowed_has_no_gradient_at_all() -> None:
    network = network_of(KINDS["masked-discrete"])
    rows = batch_of(network, 100)
    assert rows.action_mask is not None
    rows.action_mask[:, 2] = False
    rows.action[rows.action == 2] = 1
    rows.action_mask[:, 1] = True
    gradient_of(network, rows)
    gradient = network.flat()[1].views["policy_head.biases.0"]
    assert gradient[2] == 0
    assert gradient.count_nonzero() == 4


@pytest.mark.parametrize("name", ["box", "squashed"])
def test_deviations_may_be_so_small_that_a_density_is_beyond_float32(name: str) -> None:
    wide = Kind((ActionSpec("box", shape=(24,), low=(-1e-3,) * 24, high=(1e-3,) * 24),), KINDS[name].box)
    network = network_of(wide)
    with torch.no_grad():
        network.log_std.fill_(-4.7)
    rows = batch_of(network, 60)  # fewer than fill the last eight
    outputs, _ = network(rows.observation)
    near = outputs + 0.01 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    proximal = network.log_prob(outputs, near).detach()
    assert 24 * (4.7 - 0.5 * math.log(2 * math.pi)) > math.log(torch.finfo(torch.float32).max)  # at the mean
    # Log-probabilities of this size have roundings of a thousandth of what matters of them, their difference.
    (ours, gradient), (_, expected) = (
        of(network, replace(rows, action=near, proximal_log_prob=proximal, behavior_log_prob=proximal), CONFIG)
        for of in (gradient_of, expected_of)
    )
    assert ours.gradient_norm.isfinite()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("choice", [-1.0, 5.0, 0.5, math.nan])
def test_a_choice_that_is_none_is_no_number(choice: float) -> None:
    network = network_of()
    rows = batch_of(network, 60)
    rows.action[13] = choice
    found, gradient = gradient_of(network, rows)
    assert found.log_prob.isnan().nonzero().flatten().tolist() == [13]
    assert gradient.isnan().any()
    assert found.gradient_norm.isnan()


@EVERY
@pytest.mark.parametrize("field", ["observation", "proximal_log_prob", "advantage", "value_target"])
def test_what_is_not_a_number_is_not_lost(kind: Kind, field: str) -> None:
    network = network_of(kind)
    rows = batch_of(network, 60)
    getattr(rows, field)[17] = math.nan
    found, gradient = gradient_of(network, rows)
    assert found.gradient_norm.isnan()
    policy = network.flat()[1].views["policy_head.weights.0"]
    critic = network.flat()[1].views["critic.weights.1"]
    of_policy, of_critic = field != "value_target", field in ("observation", "value_target")
    assert (policy.isnan().any().item(), critic.isnan().any().item()) == (of_policy, of_critic)
    assert gradient.isnan().any()


class Framed:
    """A call whose arrays lie in memory of which a frame around each is watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames: list[tuple[np.ndarray, np.ndarray]] = []
        self.inner = perceptron.ppo_epoch
        monkeypatch.setattr(perceptron, "ppo_epoch", self)

    def framed(self, array: Any) -> Any:
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            return array
        whole = np.full(array.size + 64, np.float32(np.nan))
        inside = whole[32:-32].reshape(array.shape)
        inside[...] = array
        self.frames.append((whole, array))
        return inside

    def __call__(self, *given: Any) -> int:
        arguments = [
            tuple(map(self.framed, argument)) if isinstance(argument, tuple) else self.framed(argument)
            for index, argument in enumerate(given)
        ]
        taken = self.inner(*arguments)
        for whole, array in self.frames:
            assert np.isnan(whole[:32]).all()
            assert np.isnan(whole[-32:]).all()
            array[...] = whole[32:-32].reshape(array.shape)
        return taken


@EVERY
def test_nothing_is_written_or_read_beyond_the_arrays(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, hidden, shared in itertools.product((5, 50), ((), (7, 13)), (False, True)):
        network = network_of(kind, hidden, shared=shared)
        batch = batch_of(network, rows)
        with monkeypatch.context() as patch:
            watched = Framed(patch)
            check(network, batch)  # what lies beyond is not a number, so to read it would show
        assert len(watched.frames) > 10


def call_of(network: ActorCritic, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ppo_epoch` is called with."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(perceptron, "ppo_epoch", lambda *given: seen.extend(given))
        gradient_of(network, batch_of(network, 20))
    names = ("parameters", "gradient", "layers", "blocks", "quadrature", "rows", "order", "edges", "outs")
    names += ("numbers", "adam", "threads")
    return dict(zip(names, seen, strict=True))


def changed(table: np.ndarray, row: int, column: int, number: int) -> np.ndarray:
    table = table.copy()
    table[row, column] = number
    return table


@pytest.mark.parametrize(
    ("row", "column", "number", "message"),
    [
        (0, 0, 2, "layers do not follow each other|there must be layers"),
        (0, 0, 3, "layers do not follow each other"),
        (0, 1, 8, "layers do not follow each other"),
        (1, 2, 0, "layers do not follow each other"),
        (1, 3, 9, "layers do not follow each other"),
        (1, 4, 1 << 20, "outside of the parameters"),
        (1, 5, -1, "outside of the parameters"),
        (2, 3, 2, "no activation"),
        (-1, 2, 2, "outside of the parameters|one value"),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    row: int, column: int, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(network_of(), monkeypatch)
    call["layers"] = changed(call["layers"], row, column, number)
    with pytest.raises(ValueError, match=message):
        perceptron.ppo_epoch(*call.values())


@pytest.mark.parametrize(
    ("column", "number", "message"),
    [
        (0, 3, "do not fit the action"),
        (1, 0, "do not fit the action"),
        (2, 1 << 30, "masks or the deviations|do not cover"),
        (2, 4, "do not cover"),
        (3, 1, "do not fit the action"),
        (4, 1, "do not fit the action"),
        (5, 1, "masks or the deviations"),
        (5, -2, "masks or the deviations"),
        (0, 0, "masks or the deviations"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    column: int, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(network_of(KINDS["masked-discrete"]), monkeypatch)
    call["blocks"] = changed(call["blocks"], 0, column, number)
    with pytest.raises(ValueError, match=message):
        perceptron.ppo_epoch(*call.values())


@pytest.mark.parametrize(
    ("name", "index", "value", "error", "message"),
    [
        ("parameters", None, np.zeros((2, 2), np.float32), ValueError, "parameters must have 1 axes, got 2"),
        ("gradient", None, np.zeros(3, np.float32), ValueError, r"gradient must be \[1, \d+\], got \[1, 3\]"),
        ("layers", None, np.zeros((3, 6)), TypeError, "layers must hold int32, got format 'd'"),
        ("layers", None, np.zeros((65, 6), np.int32), ValueError, "too many layers"),
        ("layers", None, np.zeros((0, 6), np.int32), ValueError, "must be layers of a policy"),
        ("blocks", None, np.zeros((3, 5), np.int32), ValueError, r"blocks must be \[3, 6\], got \[3, 5\]"),
        ("blocks", None, np.zeros((0, 6), np.int32), ValueError, "do not cover"),
        ("quadrature", None, np.zeros((3, 5), np.float32), ValueError, r"quadrature must be \[2, 5\]"),
        ("rows", 1, np.zeros((19, 1), np.float32), ValueError, r"action must be \[20, 1\], got \[19, 1\]"),
        ("rows", 2, np.zeros((20, 5), np.float32), TypeError, "action_mask must hold bool"),
        ("rows", 5, np.zeros(19, np.float32), ValueError, r"an array of rows must be \[1, 20\]"),
        ("outs", 1, np.zeros(19, np.float32), ValueError, r"log_prob must be \[1, 20\]"),
        ("outs", 3, np.zeros((1, 5), np.float32), ValueError, r"figures must be \[1, 6\], got \[1, 5\]"),
        ("edges", None, np.array([0, 20]), TypeError, "edges must hold int32"),
        ("order", None, np.arange(20), TypeError, "order must hold int32"),
        ("order", None, np.arange(1, 21, dtype=np.int32), ValueError, "names rows that there are not"),
        ("order", None, np.arange(-1, 19, dtype=np.int32), ValueError, "names rows that there are not"),
        ("order", None, np.arange(19, dtype=np.int32), ValueError, "edges do not fit the order"),
        ("edges", None, np.array([20], np.int32), ValueError, "edges do not fit the order"),
        ("edges", None, np.array([0, 21], np.int32), ValueError, "edges do not fit the order"),
        ("edges", None, np.array([-1, 20], np.int32), ValueError, "edges do not fit the order"),
        ("edges", None, np.array([0, 7, 7, 20], np.int32), ValueError, "edges do not rise"),
        ("adam", None, (np.zeros(3, np.float32),) * 2 + (1.0,) * 6 + (0, 0), ValueError, "first moments must be"),
        ("adam", None, (), TypeError, "takes exactly 10 arguments"),
        ("threads", None, 65, ValueError, "threads must be 1 to 64, got 65"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_what_was_expected(
    name: str, index: int | None, value: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(network_of(), monkeypatch)
    given = list(call[name]) if index is not None else []
    if index is not None:
        given[index] = value
    call[name] = value if index is None else tuple(given)
    with pytest.raises(error, match=message):
        perceptron.ppo_epoch(*call.values())


@pytest.mark.parametrize(("kept", "steps"), [(-1, 0), (0, -1)])
def test_steps_that_cannot_be_are_refused(kept: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(network_of(), monkeypatch)
    call["adam"] = (*(np.zeros_like(call["parameters"]) for _ in range(2)), *(1.0,) * 6, kept, steps)
    with pytest.raises(ValueError, match="can be negative"):
        perceptron.ppo_epoch(*call.values())


class Trained:
    """A network and what optimises it, by compiled code or by torch."""

    def __init__(self, kind: Kind, compiled: int, *, shared: bool = False, hidden: tuple[int, ...] = (16, 8)) -> None:
        self.network = network_of(kind, hidden, shared=shared, compiled=compiled)
        self.parameters, gradient = (flat.tensor for flat in self.network.flat())
        kept = 0 if self.network.log_std is None else self.network.log_std.numel()
        self.adam = Adam(self.parameters, gradient, epsilon=1e-5, decay=0.3, kept=kept)

    def epoch(self, rows: TrainingBatch, config: PPOConfig, seed: int, **more: Any) -> list[float]:
        order = torch.randperm(len(rows.advantage), generator=torch.Generator().manual_seed(seed))
        return ppo.run_epoch(self.network, self.adam, rows, config, order, 3e-3, **more).tolist()


STEPPING = msgspec.structs.replace(CONFIG, minibatch_size=30, max_gradient_norm=0.4)


@EVERY
@pytest.mark.parametrize("shared", [False, True])
def test_steps_and_figures_are_those_of_torch(kind: Kind, shared: bool) -> None:
    ours, theirs = (Trained(kind, compiled, shared=shared) for compiled in (2, 0))
    rows, norms = batch_of(ours.network, 200), []
    for epoch, config in enumerate(
        (STEPPING, msgspec.structs.replace(STEPPING, value_clip=0.0, max_gradient_norm=9.0))
    ):
        found, expected = ours.epoch(rows, config, epoch), theirs.epoch(rows, config, epoch)
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert ours.adam.steps == theirs.adam.steps == 7 * (epoch + 1)
        norms.append(found[GRADIENT_NORM])
        torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-3, atol=1e-4)
    assert norms[0] > STEPPING.max_gradient_norm
    torch.testing.assert_close(ours.adam.first, theirs.adam.first, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(ours.adam.second, theirs.adam.second, rtol=5e-3, atol=1e-6)
    assert ours.adam._taken == theirs.adam._taken


def test_a_step_is_adams_to_the_roundings() -> None:
    """On one gradient, so that no rounding of before is divided by its root."""
    ours, theirs = (Trained(KINDS["dict"], compiled) for compiled in (1, 0))
    rows, config = batch_of(ours.network, 64), msgspec.structs.replace(CONFIG, minibatch_size=64, max_gradient_norm=1e9)
    for steps in (0, 1, 50, 100_000):
        for side in (ours, theirs):
            side.adam.set_steps(steps)
            side.adam.first.fill_(0.02)
            side.adam.second.fill_(0.003)
            side.parameters.copy_(torch.linspace(-1, 1, len(side.parameters)))
        before = ours.parameters.clone()
        for side in (ours, theirs):
            side.epoch(rows, config, 0)
        torch.testing.assert_close(ours.parameters - before, theirs.parameters - before, rtol=1e-4, atol=3e-7)


def test_a_stop_is_asked_for_after_as_much_as_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Trained(KINDS["dict"], 1), Trained(KINDS["dict"], 1)
    rows, asked = batch_of(whole.network, 200), []
    expected = whole.epoch(rows, STEPPING, 0, on_minibatch=lambda: asked.append(0))
    monkeypatch.setattr(ppo, "AT_ONCE", 90 * len(whole.parameters))
    assert parts.epoch(rows, STEPPING, 0, on_minibatch=lambda: asked.append(1)) == pytest.approx(expected, rel=1e-6)
    assert asked == [0, 1, 1, 1]  # seven minibatches of 28 or 29, three at a time
    assert torch.equal(whole.parameters, parts.parameters)
    assert torch.equal(whole.adam.second, parts.adam.second)


@EVERY
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_log_probabilities_of_a_batch_are_those_of_torch(kind: Kind, shared: bool) -> None:
    ours, torchs = (network_of(kind, shared=shared, compiled=compiled) for compiled in (2, 0))
    rows = batch_of(torchs, 150)
    more = torch.cat([rows.observation, torch.randn(20, rows.observation.shape[1])])
    value, log_prob = ours.evaluate(more, rows.action, rows.action_mask)
    assert (ours.compiled is not None, torchs.compiled) == (True, None)
    expected, expected_log_prob = torchs.evaluate(more, rows.action, rows.action_mask)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_prob, expected_log_prob, rtol=1e-4, atol=1e-4)


def test_minibatches_may_be_of_any_sizes() -> None:
    """The largest needs the most memory, wherever it stands."""
    config, order = msgspec.structs.replace(STEPPING, max_gradient_norm=1e9), np.arange(2010, dtype=np.int32)
    for edges in np.array([[0, 2000, 2001, 2010], [0, 1, 2001, 2007], [5, 100, 1700, 1800]], np.int32):
        side, twin = Trained(KINDS["dict"], 2, hidden=(64, 64)), Trained(KINDS["dict"], 1, hidden=(64, 64))
        rows = batch_of(side.network, 2010)
        assert side.network.compiled is not None
        assert twin.network.compiled is not None
        given = side.network.compiled.arrays(rows, importance_of(rows))
        taken, figures, _ = side.network.compiled.steps(given, config, order, edges, side.adam, 1e-3)
        assert taken == 3
        for index in range(3):
            some = edges[index : index + 2]
            _, (alone,), _ = twin.network.compiled.steps(given, config, order, some, twin.adam, 1e-3)
            assert np.array_equal(figures[index], alone)
        assert torch.equal(side.parameters, twin.parameters)


@pytest.mark.parametrize(("hidden", "minibatch_size"), [((64, 64), 1024), ((64, 64), 250), ((256, 256), 1024)])
def test_steps_are_the_same_bits_with_any_number_of_threads(hidden: tuple[int, ...], minibatch_size: int) -> None:
    """Of wide networks, the sums of gradients and the steps along them are shared out, too."""
    sides = [Trained(KINDS["squashed-dict"], threads, hidden=hidden) for threads in (1, 2, 3)]
    config = msgspec.structs.replace(STEPPING, minibatch_size=minibatch_size)
    figures = [side.epoch(batch_of(side.network, 3000), config, 0) for side in sides]
    assert figures[0] == figures[1] == figures[2]
    assert all(torch.equal(sides[0].parameters, side.parameters) for side in sides[1:])


def test_steps_of_wide_networks_are_those_of_torch() -> None:
    ours, theirs = (Trained(KINDS["dict"], compiled, hidden=(256, 200)) for compiled in (2, 0))
    rows, config = batch_of(ours.network, 600), msgspec.structs.replace(STEPPING, minibatch_size=200)
    assert ours.epoch(rows, config, 0) == pytest.approx(theirs.epoch(rows, config, 0), rel=2e-3, abs=1e-5)
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-3, atol=1e-4)


def test_an_old_value_that_is_no_number_is_not_lost() -> None:
    ours, theirs = Trained(KINDS["discrete"], 1), Trained(KINDS["discrete"], 0)
    rows = batch_of(ours.network, 200)
    rows.value[7] = math.nan
    for side in (ours, theirs):
        assert math.isnan(side.epoch(rows, STEPPING, 0)[VALUE_LOSS])


@pytest.mark.parametrize("at_once", [1, 1 << 30])
def test_a_gradient_that_is_not_finite_is_not_stepped_along(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "AT_ONCE", at_once)
    side, twin = Trained(KINDS["discrete"], 1), Trained(KINDS["discrete"], 1)
    rows = batch_of(side.network, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    rows.value_target[order[100]] = math.inf  # in the fourth minibatch of seven
    with pytest.raises(FloatingPointError, match="the value loss is inf"):
        side.epoch(rows, STEPPING, 0)
    assert side.adam.steps == int(side.adam._taken) == 3
    assert side.parameters.isfinite().all()
    for start, stop in ((0, 28), (28, 57), (57, 85)):
        fine = rows.select(order[start:stop])
        ppo.run_epoch(twin.network, twin.adam, fine, STEPPING, torch.arange(stop - start), 3e-3)
    torch.testing.assert_close(side.parameters, twin.parameters)


@pytest.mark.parametrize("drift", [1e-5, 1e-3, 0.1, 0.49, 0.51, 2.0])
def test_the_divergence_keeps_its_digits_however_small_it_is(drift: float) -> None:
    side = Trained(KINDS["box"], 1)
    rows = batch_of(side.network, 200)
    exact = expected_of(side.network, rows, CONFIG)[0].log_prob.detach()
    proximal = (exact + drift).float()
    found = side.epoch(
        replace(rows, proximal_log_prob=proximal), msgspec.structs.replace(CONFIG, minibatch_size=200), 0
    )
    apart = exact - proximal.double()
    expected = (torch.expm1(apart) - apart).mean().item()
    # what is left of log-probabilities near 3 has roundings of some 1e-6
    assert found[APPROX_KL] == pytest.approx(expected, rel=max(3e-6, 3e-6 / drift))


def test_nothing_is_written_or_read_beyond_the_arrays_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (KINDS["squashed-dict"], KINDS["half-masked"]):
        sides = [Trained(kind, 1) for _ in range(2)]
        rows, (plain, framed) = batch_of(sides[0].network, 101), sides
        plain.epoch(rows, STEPPING, 0)
        with monkeypatch.context() as patch:
            watched = Framed(patch)
            framed.epoch(rows, STEPPING, 0)
        assert len(watched.frames) > 10
        assert torch.equal(plain.parameters, framed.parameters)


def test_what_is_said_of_threads_is_what_networks_do() -> None:
    for hidden in ((8,) * 31, (8,) * 32):
        network = network_of(hidden=hidden)
        network.flat()
        said = share_threads(1, shared=False, activations=[*["tanh"] * len(hidden), "identity"])
        assert said.compiled == (network.compiled is not None) == (len(hidden) < 32)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(network_of(KINDS["masked-discrete"]), monkeypatch)
    arrays = [call["parameters"], call["layers"], call["quadrature"], *call["rows"], *call["outs"]]
    counts = [sys.getrefcount(array) for array in arrays]
    for _ in range(500):
        perceptron.ppo_epoch(*call.values())
        with pytest.raises(ValueError, match="threads"):
            perceptron.ppo_epoch(*(call | {"threads": 0}).values())
        with pytest.raises(ValueError, match="too many layers"):
            perceptron.ppo_epoch(*(call | {"layers": np.zeros((65, 6), np.int32)}).values())
    assert [sys.getrefcount(array) for array in arrays] == counts
