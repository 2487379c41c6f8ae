"""The gradient of the whole loss in compiled code: against autograd in float64, on every kind of action."""

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
from rustyrl_learner.device import share_threads
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.ppo import minibatch_gradient, policy_loss, value_loss
from rustyrl_learner.rows import Minibatch, TrainingBatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not perceptron.COMPILED, reason=perceptron.PROBLEM or "compiled"),
]
CONFIG = PPOConfig(clip=0.2, value_clip=0.3, entropy=0.05, value_coefficient=0.7)
ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu}


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
        self.inner = perceptron.ppo_gradient
        monkeypatch.setattr(perceptron, "ppo_gradient", self)

    def framed(self, array: Any) -> Any:
        if array is None or array.dtype != np.float32:
            return array
        whole = np.full(array.size + 64, np.float32(np.nan))
        inside = whole[32:-32].reshape(array.shape)
        inside[...] = array
        self.frames.append((whole, array))
        return inside

    def __call__(self, *given: Any) -> None:
        arguments = [
            tuple(map(self.framed, argument)) if index in (5, 6) else argument if index > 6 else self.framed(argument)
            for index, argument in enumerate(given)
        ]
        self.inner(*arguments)
        for whole, array in self.frames:
            assert np.isnan(whole[:32]).all()
            assert np.isnan(whole[-32:]).all()
            array[...] = whole[32:-32].reshape(array.shape)


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
    """What `ppo_gradient` is called with."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(perceptron, "ppo_gradient", lambda *given: seen.extend(given))
        gradient_of(network, batch_of(network, 20))
    names = ("parameters", "gradient", "layers", "blocks", "quadrature", "rows", "outs", "numbers", "threads")
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
        (1, 3, 3, "layers do not follow each other"),
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
        perceptron.ppo_gradient(*call.values())


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
        perceptron.ppo_gradient(*call.values())


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
        ("outs", 3, np.zeros(1, np.float32), ValueError, r"figures must be \[1, 2\]"),
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
        perceptron.ppo_gradient(*call.values())


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
        perceptron.ppo_gradient(*call.values())
        with pytest.raises(ValueError, match="threads"):
            perceptron.ppo_gradient(*(call | {"threads": 0}).values())
        with pytest.raises(ValueError, match="too many layers"):
            perceptron.ppo_gradient(*(call | {"layers": np.zeros((65, 6), np.int32)}).values())
    assert [sys.getrefcount(array) for array in arrays] == counts
