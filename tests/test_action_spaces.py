"""Every kind of action from the sampler to the loss: numpy and torch agree, and both with the definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import gymnasium.spaces as gs
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, stats

from rustyrl.config import PPOConfig
from rustyrl.errors import WireError
from rustyrl.rollout import Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import UNBOUNDED, ActionSpec, ArraySpec, EnvironmentSpec, action_blocks, read_spec, spec_to_json
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, Weights, decode_weights, encode_weights, weights_layout
from rustyrl.wire import RolloutHeader, decode_header, decode_rollout, encode_rollout
from rustyrl_actors.contract import Place
from rustyrl_actors.environment import StepRows, TimeStep, allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.spaces import action_parts
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll
from rustyrl_learner.advantage import training_batch
from rustyrl_learner.batch import BatchBuffer
from rustyrl_learner.ingest import admit
from rustyrl_learner.network import ActorCritic, export_weights
from rustyrl_learner.normalizer import ObservationNormalizer

CPU = torch.device("cpu")
STEPS, SLOTS = 6, 3
OBSERVATION = (ArraySpec("place", (3,), "float32"), ArraySpec("speed", (), "float32"))
LOW, HIGH = np.array([-1.0, 0.5], np.float32), np.array([3.0, 0.75], np.float32)
BOX = gs.Box(LOW, HIGH)
HYBRID = gs.Dict({"choice": gs.Discrete(3), "push": BOX, "steps": gs.MultiDiscrete([2, 4, 4])})
TWO_BOXES = gs.Tuple((BOX, gs.Discrete(3), gs.Box(-2.0, 7.0, (3, 1))))
ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))

Arrays = dict[str, NDArray[np.generic]]
Masks = dict[str, NDArray[np.bool_]]

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Kind:
    """A kind of action: its parts, and what becomes of a box."""

    action: tuple[ActionSpec, ...]
    box: str = "clipped"

    @property
    def policy(self) -> PolicySpec:
        return PolicySpec(OBSERVATION, self.action, (16, 8), "tanh", normalize=True, box=self.box)  # type: ignore[arg-type]

    @property
    def spec(self) -> EnvironmentSpec:
        return EnvironmentSpec("test", OBSERVATION, self.action, SLOTS, step_s=0.1, max_episode_steps=50)


KINDS = {
    "discrete": Kind(action_parts("test", gs.Discrete(5))),
    "multi-discrete": Kind(action_parts("test", gs.MultiDiscrete([3, 5, 2]))),
    "table-of-choices": Kind(action_parts("test", gs.MultiDiscrete([[3, 3], [2, 3]]))),
    "multi-binary": Kind(action_parts("test", gs.MultiBinary(3))),
    "box": Kind(action_parts("test", BOX)),
    "squashed": Kind(action_parts("test", BOX), "squashed"),
    "dict": Kind(action_parts("test", HYBRID)),
    "squashed-dict": Kind(action_parts("test", HYBRID), "squashed"),
    "two-boxes": Kind(action_parts("test", TWO_BOXES)),
    "squashed-two-boxes": Kind(action_parts("test", TWO_BOXES), "squashed"),
    "tuple": Kind(action_parts("test", gs.Tuple((BOX, gs.Discrete(4), gs.MultiBinary(2))))),
    "masked-discrete": Kind(action_parts("test", gs.Discrete(5), masked=True)),
    "masked-multi-discrete": Kind(action_parts("test", gs.MultiDiscrete([3, 3, 4]), masked=True)),
    "masked-dict": Kind(action_parts("test", HYBRID, masked=True)),
    "masked-squashed-tuple": Kind(
        action_parts("test", gs.Tuple((gs.MultiDiscrete([3, 2]), BOX)), masked=True), "squashed"
    ),
    "half-masked": Kind(
        (
            ActionSpec("discrete", "free", counts=(3,)),
            ActionSpec("discrete", "bound", shape=(2,), counts=(3, 4), masked=True),
        )
    ),
}
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def only(rule: str) -> pytest.MarkDecorator:
    """The kinds that have choices, masks or boxes."""

    def fits(kind: Kind) -> bool:
        return any(
            {"choices": p.kind == "discrete", "masks": p.masked, "boxes": p.kind == "box"}[rule] for p in kind.action
        )

    chosen = {name: kind for name, kind in KINDS.items() if fits(kind)}
    return pytest.mark.parametrize("kind", chosen.values(), ids=chosen.keys())


# The definition, one number at a time


@dataclass(frozen=True)
class Number:
    """One number of an action: where it stands, and where its outputs, its deviation and its mask do."""

    part: ActionSpec
    index: int  # within the part, flattened
    column: int  # of the joined action
    outputs: slice
    mask: slice | None  # of the mask of the part
    joined_mask: slice | None
    deviation: int = -1


def numbers(kind: Kind) -> Iterator[Number]:
    column = output = deviation = masked = 0
    for part in kind.action:
        start = 0
        for index in range(math.prod(part.shape)):
            width = part.counts[index] if part.kind == "discrete" else 1
            mask = slice(start, start + width) if part.masked else None
            joined = slice(masked, masked + width) if part.masked else None
            number = Number(part, index, column, slice(output, output + width), mask, joined, deviation)
            yield number
            column, output, start = column + 1, output + width, start + width
            deviation += part.kind == "box"
            masked += width * part.masked


def softmax(logits: NDArray[np.float64], allowed: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    odds = np.exp(logits.astype(np.float64) - logits.max())
    if allowed is not None:
        odds = odds * allowed
    return odds / odds.sum()


def literal_log_prob(
    kind: Kind, outputs: NDArray[np.float32], log_std: NDArray[np.float32], action: Arrays, mask: Masks, row: int
) -> float:
    total = 0.0
    for number in numbers(kind):
        part, value = number.part, action[number.part.name][row].ravel()[number.index]
        seen = outputs[row, number.outputs].astype(np.float64)
        if part.kind == "discrete":
            allowed = None if number.mask is None else mask[part.name][row, number.mask]
            total += math.log(softmax(seen, allowed)[int(value)])
            continue
        total += stats.norm.logpdf(float(value), seen[0], math.exp(log_std[number.deviation]))
        if kind.box == "squashed":  # by the change of variables to what the environment is given
            half = (part.high[number.index] - part.low[number.index]) / 2
            total -= math.log(half / math.cosh(float(value)) ** 2)
    return float(total)


# What the tests act with


def network_of(kind: Kind, seed: int = 0) -> tuple[ActorCritic, ObservationNormalizer]:
    """A network whose policy is far from flat."""
    torch.manual_seed(seed)
    network = ActorCritic(kind.policy, shared=False, initial_log_std=-0.4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    normalizer = ObservationNormalizer(4, 10.0, CPU)
    normalizer.fold(2 + 3 * torch.randn(100, 4))
    return network, normalizer


def constant_policy(kind: Kind, outputs: NDArray[np.float32], slots: int, log_std: float = -0.4) -> Policy:
    """A policy whose outputs are these `[outputs]` whatever it sees."""
    spec = PolicySpec(OBSERVATION, kind.action, (), "tanh", normalize=False, box=kind.box)  # type: ignore[arg-type]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights_layout(spec).items()}
    arrays["policy.0.bias"][:] = outputs
    if "log_std" in arrays:
        arrays["log_std"][:] = log_std
    return Policy(Weights(spec, arrays), slots)


def constant_outputs(kind: Kind, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, kind.policy.output_width).astype(np.float32)


def observe(slots: int, rng: np.random.Generator) -> Arrays:
    return {a.name: (2 + 3 * rng.standard_normal((slots, *a.shape))).astype(np.float32) for a in OBSERVATION}


def flat(observation: Arrays) -> torch.Tensor:
    slots = len(observation["speed"])
    return torch.from_numpy(np.concatenate([observation[a.name].reshape(slots, -1) for a in OBSERVATION], axis=1))


def draw_noise(kind: Kind, slots: int, seed: int = 0) -> NDArray[np.float32]:
    noise = allocate_noise(kind.spec, 1, slots)
    fill_noise(noise, kind.spec, slice(0, slots), noise_generator(seed, 0, 0))
    return noise[0]


def draw_masks(kind: Kind, slots: int, rng: np.random.Generator) -> Masks:
    """Masks that leave every number some choice."""
    masks: Masks = {p.name: rng.random((slots, sum(p.counts))) < 0.5 for p in kind.action if p.masked}
    for number in numbers(kind):
        if number.mask is not None:
            kept = number.mask.start + rng.integers(0, number.mask.stop - number.mask.start, slots)
            masks[number.part.name][np.arange(slots), kept] = True
    return masks


def joined(kind: Kind, action: Arrays) -> torch.Tensor:
    slots = len(next(iter(action.values())))
    parts = [action[part.name].reshape(slots, -1).astype(np.float32) for part in kind.action]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def joined_masks(kind: Kind, masks: Masks) -> torch.Tensor | None:
    parts = [masks[part.name] for part in kind.action if part.masked]
    return torch.from_numpy(np.concatenate(parts, axis=1)) if parts else None


def bounds(part: ActionSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the greatest of every number."""
    if part.kind == "discrete":
        return np.zeros(part.shape), np.reshape(part.counts, part.shape) - 1.0
    return np.reshape(part.low, part.shape), np.reshape(part.high, part.shape)


def choices(kind: Kind) -> list[Number]:
    return [number for number in numbers(kind) if number.part.kind == "discrete"]


# Numpy and torch


@pytest.mark.usefixtures("either_way")
@EVERY
def test_actor_and_learner_agree_on_the_log_prob_after_a_trip_over_the_wire(kind: Kind) -> None:
    slots, rng = 200, np.random.default_rng(0)
    network, normalizer = network_of(kind)
    weights = decode_weights(encode_weights(export_weights(network, normalizer)))
    assert weights.spec == kind.policy
    policy, observation, masks = Policy(weights, slots), observe(slots, rng), draw_masks(kind, slots, rng)
    action, log_prob = policy.allocate_action(), np.full(slots, np.nan, np.float32)
    policy.act(observation, draw_noise(kind, slots), action, log_prob, masks)
    with torch.no_grad():
        outputs, _ = network(normalizer.apply(flat(observation)))
        ours = network.log_prob(outputs, joined(kind, action), joined_masks(kind, masks))
    np.testing.assert_allclose(log_prob, ours, rtol=0, atol=1e-4)
    log_std = weights.arrays.get("log_std", np.empty(0, np.float32))
    literal = [literal_log_prob(kind, outputs.numpy(), log_std, action, masks, row) for row in range(slots)]
    np.testing.assert_allclose(log_prob, literal, rtol=1e-4, atol=1e-4)
    assert log_prob.std() > 0.01


@pytest.mark.usefixtures("either_way")
@only("choices")
def test_choices_are_drawn_as_often_as_the_softmax_of_what_is_allowed_says(kind: Kind) -> None:
    slots, outputs = 20_000, constant_outputs(kind)
    masks = {
        name: np.repeat(mask, slots, axis=0) for name, mask in draw_masks(kind, 1, np.random.default_rng(3)).items()
    }
    policy = constant_policy(kind, outputs, slots)
    action = policy.allocate_action()
    policy.act(
        observe(slots, np.random.default_rng(1)), draw_noise(kind, slots), action, np.empty(slots, np.float32), masks
    )
    for number in choices(kind):
        allowed = None if number.mask is None else masks[number.part.name][0, number.mask]
        expected = slots * softmax(outputs[number.outputs], allowed)
        taken = action[number.part.name].reshape(slots, -1)[:, number.index]
        counts = np.bincount(taken, minlength=len(expected))
        assert len(counts) == len(expected)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        if possible.sum() > 1:
            assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-4


@pytest.mark.usefixtures("either_way")
@only("choices")
def test_the_choices_of_one_action_are_drawn_independently(kind: Kind) -> None:
    slots, outputs = 20_000, np.zeros(kind.policy.output_width, np.float32)
    policy = constant_policy(kind, outputs, slots)
    action, masks = policy.allocate_action(), {p.name: np.ones((slots, sum(p.counts)), bool) for p in kind.action}
    policy.act(
        observe(slots, np.random.default_rng(1)), draw_noise(kind, slots), action, np.empty(slots, np.float32), masks
    )
    columns = joined(kind, action).numpy().T
    if len(columns) > 1:
        assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.05


@pytest.mark.usefixtures("either_way")
@only("masks")
@pytest.mark.parametrize(
    "noise", [0.0, 0.5, ALMOST_ONE, 1.0, None], ids=["zero", "half", "almost-one", "rounded-to-one", "greedy"]
)
@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_a_forbidden_choice_is_never_drawn(kind: Kind, place: str, noise: float | None) -> None:
    given = None if noise is None else np.full((1, kind.spec.action_width), noise, np.float32)
    masked = [number for number in choices(kind) if number.mask is not None]
    for forbidden_logit in (0.0, 50.0, 1e4, -1e4):
        outputs = np.full(kind.policy.output_width, forbidden_logit, np.float32)
        masks: Masks = {part.name: np.zeros((1, sum(part.counts)), bool) for part in kind.action if part.masked}
        allowed = [
            {"first": 0, "last": n.part.counts[n.index] - 1, "middle": n.part.counts[n.index] // 2}[place]
            for n in masked
        ]
        for number, choice in zip(masked, allowed, strict=True):
            masks[number.part.name][0, number.mask][choice] = True
            outputs[number.outputs.start + choice] = 0.0
        policy = constant_policy(kind, outputs, 1)
        action, log_prob = policy.allocate_action(), np.zeros(1, np.float32)
        policy.act(observe(1, np.random.default_rng(0)), given, action, log_prob, masks)
        for number, choice in zip(masked, allowed, strict=True):
            assert action[number.part.name].ravel()[number.index] == choice
        assert math.isfinite(log_prob[0])
        if all(part.masked for part in kind.action):
            assert log_prob[0] == 0.0  # there was nothing else


@pytest.mark.usefixtures("either_way")
@only("masks")
def test_the_ends_of_the_noise_take_the_first_and_the_last_choice_that_is_allowed(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    outputs = constant_outputs(kind)
    for noise, end in ((0.0, 0), (ALMOST_ONE, -1)):
        for _ in range(20):
            masks = draw_masks(kind, 1, rng)
            policy = constant_policy(kind, outputs, 1)
            action = policy.allocate_action()
            given = np.full((1, kind.spec.action_width), noise, np.float32)
            policy.act(observe(1, rng), given, action, np.empty(1, np.float32), masks)
            for number in choices(kind):
                if number.mask is not None:
                    allowed = np.flatnonzero(masks[number.part.name][0, number.mask])
                    assert action[number.part.name].ravel()[number.index] == allowed[end]


@pytest.mark.usefixtures("either_way")
@only("choices")
def test_acting_greedily_takes_the_likeliest_choice_that_is_allowed_and_the_mean_of_a_box(kind: Kind) -> None:
    slots, rng = 100, np.random.default_rng(0)
    outputs, masks = constant_outputs(kind), draw_masks(kind, slots, rng)
    policy = constant_policy(kind, outputs, slots)
    action = policy.allocate_action()
    policy.act(observe(slots, rng), None, action, mask=masks)
    for row in range(slots):
        for number in numbers(kind):
            value, seen = action[number.part.name][row].ravel()[number.index], outputs[number.outputs]
            if number.part.kind == "box":
                assert value == seen[0]
                continue
            allowed = np.ones(len(seen), bool) if number.mask is None else masks[number.part.name][row, number.mask]
            assert value == max(np.flatnonzero(allowed), key=lambda choice, seen=seen: seen[choice])


@pytest.mark.usefixtures("either_way")
@only("masks")
def test_a_policy_with_masks_asks_for_them(kind: Kind) -> None:
    policy = constant_policy(kind, constant_outputs(kind), 1)
    for masks in (None, {}):
        with pytest.raises(ValueError, match="pass mask="):
            policy.act(observe(1, np.random.default_rng(0)), None, policy.allocate_action(), mask=masks)
    network, _ = network_of(kind)
    outputs, action = torch.zeros(1, kind.policy.output_width), torch.zeros(1, kind.spec.action_width)
    for function in (lambda: network.log_prob(outputs, action), lambda: network.entropy(outputs)):
        with pytest.raises(ValueError, match="missing"):
            function()


# Probabilities of choices, entropies


@only("choices")
def test_the_probabilities_of_all_choices_sum_to_one(kind: Kind) -> None:
    """Where there is a box too, to its density; forbidden choices have none at all."""
    rng = np.random.default_rng(0)
    network, _ = network_of(kind)
    outputs = torch.from_numpy(constant_outputs(kind))[None]
    masks = draw_masks(kind, 1, rng)
    actions = list(all_choices(kind))
    probability = np.array([log_prob_of(kind, network, outputs, action, masks) for action in actions])
    allowed = np.array([is_allowed(kind, action, masks) for action in actions])
    assert allowed.sum() > 1
    assert (np.exp(probability[~allowed]) == 0).all()
    boxes = [number for number in numbers(kind) if number.part.kind == "box"]
    free = Kind(tuple(part for part in kind.action if part.kind == "box"), kind.box)
    log_density = 0.0
    if boxes:
        means = np.array([[float(outputs[0, number.outputs][0]) for number in boxes]], np.float32)
        log_std = network.log_std.detach().numpy()  # type: ignore[union-attr]
        log_density = literal_log_prob(free, means, log_std, actions[0], {}, 0)
    assert np.exp(probability[allowed] - log_density).sum() == pytest.approx(1.0, abs=1e-5)


def all_choices(kind: Kind) -> Iterator[Arrays]:
    """Every action of one slot; its boxes are 0.3."""
    places = choices(kind)
    for combination in itertools.product(*(range(n.part.counts[n.index]) for n in places)):
        action: Arrays = {part.name: np.full((1, *part.shape), 0.3, np.float32) for part in kind.action}
        for number, choice in zip(places, combination, strict=True):
            action[number.part.name].reshape(1, -1)[0, number.index] = choice
        yield action


def is_allowed(kind: Kind, action: Arrays, masks: Masks) -> bool:
    return all(
        masks[n.part.name][0, n.mask][int(action[n.part.name].ravel()[n.index])]
        for n in choices(kind)
        if n.mask is not None
    )


def log_prob_of(kind: Kind, network: ActorCritic, outputs: torch.Tensor, action: Arrays, masks: Masks) -> float:
    with torch.no_grad():
        return network.log_prob(outputs, joined(kind, action), joined_masks(kind, masks)).item()


@EVERY
def test_entropy_is_the_expected_surprise(kind: Kind) -> None:
    """Summed over every choice; boxes in closed form, squashed ones by drawing from them."""
    network, _ = network_of(kind)
    outputs = torch.from_numpy(constant_outputs(kind))[None]
    masks = draw_masks(kind, 1, np.random.default_rng(2))
    expected = 0.0
    for number in choices(kind):
        allowed = None if number.mask is None else masks[number.part.name][0, number.mask]
        expected += stats.entropy(softmax(outputs[0, number.outputs].numpy(), allowed))
    for number in numbers(kind):
        if number.part.kind == "discrete":
            continue
        assert network.log_std is not None
        mean, std = float(outputs[0, number.outputs][0]), math.exp(network.log_std[number.deviation].item())
        expected += stats.norm.entropy(mean, std)
        if kind.box == "squashed":
            raw = mean + std * np.random.default_rng(number.index).standard_normal(400_000)
            half = (number.part.high[number.index] - number.part.low[number.index]) / 2
            expected += np.log(half / np.cosh(raw) ** 2).mean()
    with torch.no_grad():
        ours = network.entropy(outputs, joined_masks(kind, masks))
    assert ours.numel() == 1
    assert ours.item() == pytest.approx(expected, abs=0.01 if kind.box == "squashed" else 1e-5)


@pytest.mark.parametrize("log_std", [-2.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 0.7, 4.0])
def test_the_entropy_of_a_squashed_box_is_that_of_its_density(mean: float, log_std: float) -> None:
    """By numerical integration, from barely to strongly squashed."""
    kind = squashed_line(-0.5, 2.5)
    network = ActorCritic(kind.policy, shared=False, initial_log_std=log_std)
    std, half = math.exp(log_std), 1.5
    grid = np.linspace(mean - 10 * std, mean + 10 * std, 20_001)
    log_density = stats.norm.logpdf(grid, mean, std) - np.log(half) + 2 * np.logaddexp(grid, -grid) - 2 * math.log(2)
    expected = -integrate.simpson(stats.norm.pdf(grid, mean, std) * log_density, x=grid)
    with torch.no_grad():
        assert network.entropy(torch.tensor([[mean]])).item() == pytest.approx(expected, abs=0.02)


@only("masks")
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradients_of_masked_distributions_are_finite_and_leave_forbidden_logits_alone(
    kind: Kind, scale: float
) -> None:
    slots, rng = 50, np.random.default_rng(0)
    network, _ = network_of(kind)
    masks = draw_masks(kind, slots, rng)
    outputs = (scale * torch.randn(slots, kind.policy.output_width)).requires_grad_()
    actions = constant_policy(kind, constant_outputs(kind), slots)
    action = actions.allocate_action()
    actions.act(observe(slots, rng), draw_noise(kind, slots), action, np.empty(slots, np.float32), masks)
    mask = joined_masks(kind, masks)
    (network.entropy(outputs, mask).sum() + network.log_prob(outputs, joined(kind, action), mask).sum()).backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    assert (outputs.grad != 0).any()
    for number in choices(kind):
        if number.mask is not None:
            gradient = outputs.grad[:, number.outputs].numpy()
            assert (gradient[~masks[number.part.name][:, number.mask]] == 0).all()
    if network.log_std is not None:
        assert torch.isfinite(network.log_std.grad).all()


@only("masks")
def test_with_one_choice_left_there_is_no_entropy_and_nothing_to_learn(kind: Kind) -> None:
    if not all(part.masked for part in kind.action):
        kind = Kind(tuple(part for part in kind.action if part.masked))
    network, _ = network_of(kind)
    masks: Masks = {part.name: np.zeros((1, sum(part.counts)), bool) for part in kind.action}
    for number in choices(kind):
        assert number.mask is not None
        masks[number.part.name][0, number.mask.start + 1] = True
    outputs = torch.randn(1, kind.policy.output_width, requires_grad=True)
    action = torch.ones(1, kind.spec.action_width)
    entropy = network.entropy(outputs, joined_masks(kind, masks)).sum()
    log_prob = network.log_prob(outputs, action, joined_masks(kind, masks)).sum()
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert log_prob.item() == pytest.approx(0.0, abs=1e-6)
    (entropy + log_prob).backward()
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, torch.zeros_like(outputs), rtol=0, atol=1e-6)


# Boxes


def squashed_line(low: float, high: float) -> Kind:
    return Kind((ActionSpec("box", shape=(1,), low=(low,), high=(high,)),), "squashed")


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 2.5), (10.0, 10.25), (-300.0, 0.0)])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.6, 1.0), (-1.2, 0.5)])
def test_the_density_of_a_squashed_box_integrates_to_one_over_its_bounds(
    low: float, high: float, mean: float, std: float
) -> None:
    kind = squashed_line(low, high)
    network = ActorCritic(kind.policy, shared=False, initial_log_std=math.log(std)).double()
    edge = 1e-9 * (high - low)
    points = np.linspace(low + edge, high - edge, 20_001)
    raw = np.arctanh(np.clip((points - (low + high) / 2) / ((high - low) / 2), -1 + 1e-12, 1 - 1e-12))
    with torch.no_grad():
        outputs = torch.full((len(points), 1), mean, dtype=torch.float64)
        log_prob = network.log_prob(outputs, torch.from_numpy(raw)[:, None]).numpy()
    assert integrate.trapezoid(np.exp(log_prob), points) == pytest.approx(1.0, abs=2e-3)


@only("boxes")
def test_a_bounded_box_lies_within_its_bounds_and_a_choice_stays_what_it_is(kind: Kind) -> None:
    rng, slots = np.random.default_rng(0), 60
    policy = constant_policy(kind, constant_outputs(kind), slots)
    raw = policy.allocate_action()
    for part in kind.action:
        if part.kind == "discrete":
            raw[part.name][...] = rng.integers(0, np.reshape(part.counts, part.shape), raw[part.name].shape)
        else:
            spread = 10.0 ** rng.uniform(-3, 6, raw[part.name].shape)
            raw[part.name][...] = spread * rng.choice([-1, 1], raw[part.name].shape)
    before = {name: array.copy() for name, array in raw.items()}
    out = policy.allocate_action()
    policy.bound(raw, out)
    for part in kind.action:
        np.testing.assert_array_equal(raw[part.name], before[part.name])
        if part.kind == "discrete":
            np.testing.assert_array_equal(out[part.name], raw[part.name])
            continue
        value = before[part.name].astype(np.float64)
        low, high = bounds(part)
        middle, half = (high + low) / 2, (high - low) / 2
        expected = middle + half * np.tanh(value) if kind.box == "squashed" else np.clip(value, low, high)
        np.testing.assert_allclose(out[part.name], expected, rtol=1e-6, atol=1e-6)
        assert (out[part.name] >= low).all()
        assert (out[part.name] <= high).all()
        assert ((out[part.name] == low).any(axis=0) & (out[part.name] == high).any(axis=0)).all()
    policy.bound(raw, raw)
    for name, array in out.items():
        np.testing.assert_array_equal(raw[name], array)


def test_rounding_takes_no_squashed_box_beyond_its_bounds() -> None:
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.normal(0, 10.0 ** rng.uniform(-3, 3, 5000), (2, 5000)), axis=0).astype(np.float32)
    kind = Kind(action_parts("test", gs.Box(low, high)), "squashed")
    policy = constant_policy(kind, np.zeros(5000, np.float32), 2)
    raw = {"main": np.stack([np.full(5000, -50, np.float32), np.full(5000, 50, np.float32)])}
    policy.bound(raw, raw)
    assert (raw["main"] >= low).all()
    assert (raw["main"] <= high).all()
    np.testing.assert_allclose(raw["main"], [low, high], rtol=1e-4, atol=1e-4)


def test_what_the_environment_is_given_of_a_squashed_box_has_the_density_that_is_trained_on() -> None:
    slots, mean, std = 20_000, 0.4, math.exp(-0.4)
    kind = squashed_line(-0.5, 2.5)
    policy = constant_policy(kind, np.array([mean], np.float32), slots)
    action, log_prob = policy.allocate_action(), np.empty(slots, np.float32)
    policy.act(observe(slots, np.random.default_rng(0)), draw_noise(kind, slots), action, log_prob)
    given = policy.allocate_action()
    policy.bound(action, given)
    value = given["main"][:, 0].astype(np.float64)

    def cumulated(point: NDArray[np.float64]) -> NDArray[np.float64]:
        return stats.norm.cdf(np.arctanh((point - 1.0) / 1.5), mean, std)  # type: ignore[no-any-return]

    assert stats.kstest(value, cumulated).pvalue > 1e-3
    inside = np.abs(value - 1.0) < 1.45
    step = 1e-4
    slope = (cumulated(value[inside] + step / 2) - cumulated(value[inside] - step / 2)) / step
    np.testing.assert_allclose(log_prob[inside], np.log(slope), atol=2e-3)


@pytest.mark.parametrize("raw", [-1e4, -30.0, -9.0, 9.0, 30.0, 1e4])
def test_a_strongly_squashed_action_has_a_finite_log_prob_and_gradient(raw: float) -> None:
    """A tanh of it is 1 in float32, whose own log-derivative would be that of 0."""
    kind = squashed_line(-0.5, 2.5)
    network = ActorCritic(kind.policy, shared=False, initial_log_std=0.0)
    outputs = torch.tensor([[raw]], requires_grad=True)
    log_prob = network.log_prob(outputs, torch.tensor([[raw]]))
    expected = -0.5 * math.log(2 * math.pi) - math.log(1.5) - 2 * (math.log(2) - abs(raw))
    assert log_prob.item() == pytest.approx(expected, rel=1e-5)
    (log_prob + network.entropy(outputs)).sum().backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    policy = constant_policy(kind, np.array([raw], np.float32), 1, log_std=0.0)
    action, ours = policy.allocate_action(), np.empty(1, np.float32)
    policy.act(observe(1, np.random.default_rng(0)), np.zeros((1, 1), np.float32), action, ours)
    assert ours[0] == pytest.approx(expected, rel=1e-5)


# Rollouts and batches


class RandomWorld:
    """E slots that see, may do and earn random things, and hold what they are given against the action space."""

    def __init__(self, kind: Kind, index: int) -> None:
        self.spec = kind.spec
        self.place = Place("test", (index,))
        self._kind = kind
        self._rng = np.random.default_rng(index)

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        self._show(out)

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        self.place.step += 1
        assert list(action) == [part.name for part in self.spec.action]
        for part in self.spec.action:
            given = action[part.name]
            assert given.shape == (SLOTS, *part.shape)
            low, high = bounds(part)
            assert ((given >= low) & (given <= high)).all()
        self._show(out)
        out.reward[:] = self._rng.standard_normal(SLOTS)
        out.terminated[:] = out.truncated[:] = False
        out.valid[:] = True
        return TimeStep()

    def close(self) -> None:
        pass

    def _show(self, out: StepRows) -> None:
        for name, array in observe(SLOTS, self._rng).items():
            out.observation[name][...] = array
        for name, mask in draw_masks(self._kind, SLOTS, self._rng).items():
            out.action_mask[name][...] = mask


def recorded(kind: Kind, worlds: tuple[int, ...], times: int = 1) -> Rollout:
    """What the actor's own loop records of these worlds, the last time of so many, under the policy of `network_of`."""
    spec, slots = kind.spec, SLOTS * len(worlds)
    origin = RolloutOrigin(spec.fingerprint, "main", Ticket(0, 0, worlds), 0, 0, 0)
    columns = [slice(i * SLOTS, (i + 1) * SLOTS) for i in range(len(worlds))]
    buffer = UnrollBuffer(
        allocate_rollout(spec, STEPS, slots, origin, poison=True), columns, allocate_noise(spec, STEPS, slots)
    )
    owned = []
    for world, part in zip(worlds, columns, strict=True):
        fill_noise(buffer.noise, spec, part, noise_generator(0, world, 0))
        environment = RandomWorld(kind, world)
        now = allocate_rows(spec)
        environment.reset((0,), now)
        owned.append(OwnedWorld(world, environment, 0, now))
    policy = Policy(export_weights(*network_of(kind)), slots)
    for _ in range(times):
        rollout = unroll(owned, policy, buffer, Stages())
    return rollout


def received(rollout: Rollout) -> Rollout:
    frame, blob = encode_rollout(rollout)
    header = decode_header(frame)
    assert isinstance(header, RolloutHeader)
    return decode_rollout(header, memoryview(bytes(blob)))


@EVERY
def test_a_rollout_arrives_unchanged_and_is_admitted(kind: Kind) -> None:
    sent = recorded(kind, (4, 1))
    got = received(sent)
    assert list(got.action) == [part.name for part in kind.action]
    assert list(got.action_mask) == [part.name for part in kind.action if part.masked]
    for group in ("observation", "action", "action_mask"):
        for name, array in getattr(sent, group).items():
            assert getattr(got, group)[name].dtype == array.dtype
            np.testing.assert_array_equal(getattr(got, group)[name], array)
    for name in ("behavior_log_prob", "reward", "terminated", "truncated", "valid"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
    for part in kind.action:
        assert got.action[part.name].shape == (STEPS, 2 * SLOTS, *part.shape)
        if part.masked:
            assert got.action_mask[part.name].shape == (STEPS + 1, 2 * SLOTS, sum(part.counts))
    admit(got, kind.spec, STEPS, 0)


@EVERY
def test_a_rollout_goes_on_where_the_one_before_ended(kind: Kind) -> None:
    first, second = recorded(kind, (4, 1)), recorded(kind, (4, 1), times=2)
    for group in ("observation", "action_mask"):
        for name, array in getattr(second, group).items():
            np.testing.assert_array_equal(array[0], getattr(first, group)[name][-1])
            assert (array[1:] != getattr(first, group)[name][1:]).any()
    admit(received(second), kind.spec, STEPS, 0)


@EVERY
def test_the_spec_of_an_environment_survives_its_file(kind: Kind) -> None:
    assert read_spec(spec_to_json(kind.spec)) == kind.spec
    fingerprints = {other.spec.fingerprint for other in KINDS.values() if other.action != kind.action}
    assert kind.spec.fingerprint not in fingerprints


@only("choices")
def test_a_choice_outside_its_counts_is_refused(kind: Kind) -> None:
    rollout = recorded(kind, (0,))
    for number in choices(kind):
        part = number.part
        for wrong in (-1, part.counts[number.index], 2**40):
            column = rollout.action[part.name].reshape(STEPS, SLOTS, -1)[:, :, number.index]
            before, column[2, 1] = column[2, 1], wrong
            with pytest.raises(WireError, match=rf"^action: a choice of '{part.name}' outside"):
                admit(received(rollout), kind.spec, STEPS, 0)
            column[2, 1] = before
    admit(received(rollout), kind.spec, STEPS, 0)


@only("masks")
def test_a_choice_that_the_mask_forbids_is_refused(kind: Kind) -> None:
    rollout = recorded(kind, (0,))
    for number in choices(kind):
        if number.mask is None:
            continue
        taken = int(rollout.action[number.part.name].reshape(STEPS, SLOTS, -1)[2, 1, number.index])
        mask = rollout.action_mask[number.part.name]
        assert mask[2, 1, number.mask.start + taken]
        mask[2, 1, number.mask.start + taken] = False
        with pytest.raises(WireError, match=rf"^action: a choice of '{number.part.name}' that its mask does not allow"):
            admit(received(rollout), kind.spec, STEPS, 0)
        mask[2, 1, number.mask.start + taken] = True
    admit(received(rollout), kind.spec, STEPS, 0)


@EVERY
def test_a_batch_joins_parts_and_masks_into_the_columns_of_their_worlds(kind: Kind) -> None:
    spec, owners = kind.spec, [(2, 0), (1,)]
    buffer = BatchBuffer(0, spec, STEPS, 3)
    rollouts = [received(recorded(kind, worlds)) for worlds in owners]
    for rollout in rollouts:
        buffer.place(rollout)
    batch = buffer.to_device(CPU)
    assert batch.action.shape == (STEPS, 3 * SLOTS, spec.action_width)
    assert (batch.action_mask is None) == (spec.mask_width == 0)
    for worlds, rollout in zip(owners, rollouts, strict=True):
        for (position, world), slot in itertools.product(enumerate(worlds), range(SLOTS)):
            here, there = position * SLOTS + slot, world * SLOTS + slot
            for number in numbers(kind):
                sent = rollout.action[number.part.name][:, here].reshape(STEPS, -1)[:, number.index]
                np.testing.assert_array_equal(batch.action[:, there, number.column].numpy(), sent)
                if number.mask is not None:
                    assert batch.action_mask is not None
                    allowed = rollout.action_mask[number.part.name][:-1, here, number.mask]
                    np.testing.assert_array_equal(batch.action_mask[:, there, number.joined_mask].numpy(), allowed)


@EVERY
def test_the_learner_finds_the_log_prob_of_a_batch_that_its_actors_found(kind: Kind) -> None:
    """Stops 2 to 8 in one line: what the first ratio of an update is 1 by."""
    buffer = BatchBuffer(0, kind.spec, STEPS, 3)
    for worlds in ((1,), (2, 0)):
        buffer.place(received(recorded(kind, worlds)))
    network, normalizer = network_of(kind)
    rows = training_batch(network, buffer.to_device(CPU), PPOConfig(), normalizer=normalizer, lagged=True)
    torch.testing.assert_close(rows.proximal_log_prob, rows.behavior_log_prob, rtol=0, atol=1e-4)


# Layout


def test_action_blocks_lay_out_a_hybrid_action_as_computed_by_hand() -> None:
    action = (
        ActionSpec("discrete", "gait", shape=(4,), counts=(3, 3, 2, 3), masked=True),
        ActionSpec("box", "push", shape=(2, 1), low=(0.0, 0.0), high=(1.0, 1.0)),
        ActionSpec("discrete", "call", counts=(5,)),
        ActionSpec("discrete", "turn", counts=(5,), masked=True),
    )
    assert action_blocks(action) == (
        ("discrete", 0, 2, 3, slice(0, 2), slice(0, 2), slice(0, 6), slice(0, 6)),
        ("discrete", 0, 1, 2, slice(2, 3), slice(2, 3), slice(6, 8), slice(6, 8)),
        ("discrete", 0, 1, 3, slice(3, 4), slice(3, 4), slice(8, 11), slice(8, 11)),
        ("box", 1, 2, 1, slice(0, 2), slice(4, 6), slice(11, 13), None),
        ("discrete", 2, 1, 5, slice(0, 1), slice(6, 7), slice(13, 18), None),
        ("discrete", 3, 1, 5, slice(0, 1), slice(7, 8), slice(18, 23), slice(11, 16)),
    )
    spec = EnvironmentSpec("test", OBSERVATION, action, SLOTS, step_s=0.1, max_episode_steps=50)
    assert (spec.action_width, spec.mask_width) == (8, 16)
    assert PolicySpec(OBSERVATION, action, (), "tanh", normalize=False).output_width == 23
    assert [part.output_width for part in action] == [11, 2, 5, 5]


@EVERY
def test_blocks_cover_every_number_output_and_mask_once(kind: Kind) -> None:
    blocks = action_blocks(kind.action)
    assert [b.column.start for b in blocks] == [0, *(b.column.stop for b in blocks)][:-1]
    assert [b.output.start for b in blocks] == [0, *(b.output.stop for b in blocks)][:-1]
    assert blocks[-1].column.stop == kind.spec.action_width
    assert blocks[-1].output.stop == kind.policy.output_width
    masked = [b.mask for b in blocks if b.mask is not None]
    assert [m.start for m in masked] == [0, *(m.stop for m in masked)][: len(masked)]
    assert sum(m.stop - m.start for m in masked) == kind.spec.mask_width


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "discrete"},
        {"kind": "discrete", "counts": (3, 3)},
        {"kind": "discrete", "shape": (2,), "counts": (3,)},
        {"kind": "discrete", "shape": (2, 2), "counts": (3, 3)},
        {"kind": "discrete", "counts": (3,), "low": (0.0,)},
        {"kind": "discrete", "counts": (3,), "low": (0.0,), "high": (1.0,)},
        {"kind": "box", "shape": (2,)},
        {"kind": "box", "shape": (2,), "low": (0.0, 0.0), "high": (1.0,)},
        {"kind": "box", "shape": (2,), "low": (0.0,), "high": (1.0, 1.0)},
        {"kind": "box", "low": (0.0,), "high": (1.0,), "counts": (2,)},
        {"kind": "box", "low": (0.0,), "high": (1.0,), "masked": True},
    ],
    ids=str,
)
def test_an_action_whose_counts_or_bounds_do_not_fit_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^action 'odd': "):
        ActionSpec(name="odd", **changes)  # type: ignore[arg-type]
    with pytest.raises(msgspec.ValidationError, match="action 'odd'"):
        msgspec.convert({"name": "odd", **changes}, ActionSpec)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-UNBOUNDED, 1.0), (0.0, UNBOUNDED), (-UNBOUNDED, UNBOUNDED), (1.0, 1.0 + 1e-9), (1.0, 1.0), (2.0, 1.0)],
)
def test_only_a_box_with_bounds_is_squashed(low: float, high: float) -> None:
    action = (ActionSpec("discrete", "call", counts=(2,)), ActionSpec("box", "push", low=(low,), high=(high,)))
    with pytest.raises(ValueError, match="needs bounds, low below high; those of action 'push'"):
        PolicySpec(OBSERVATION, action, (), "tanh", normalize=False, box="squashed")
    PolicySpec(OBSERVATION, action, (), "tanh", normalize=False, box="clipped")


@pytest.mark.parametrize("bound", [math.inf, -math.inf, math.nan])
def test_bounds_that_json_cannot_hold_are_refused_and_the_widest_ones_survive_it(bound: float) -> None:
    with pytest.raises(ValueError, match="a side without a bound is"):
        ActionSpec("box", "push", low=(bound,), high=(1.0,))
    space = gs.Box(-np.inf, np.inf, (2,), np.float32)
    part = action_parts("any", space)[0]
    assert msgspec.json.decode(msgspec.json.encode(part), type=ActionSpec) == part
    assert (np.float32(part.high) == np.finfo(np.float32).max).all()
