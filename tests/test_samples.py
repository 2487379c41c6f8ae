"""What actors draw, how likely they say it was, and what the learner makes of it: as scipy, numpy and torch have it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import distributions as td

from rustyrl.spec import ActionSpec, ArraySpec, action_blocks
from rustyrl.weights import PolicySpec
from rustyrl_actors.sampling import BoxSampler, ChoiceSampler
from rustyrl_learner.distribution import ActionDistribution

COUNT = 40_000
MEAN, LOG_STD = np.array([0.4, -2.0, 0.0], np.float32), np.array([-0.4, 0.7, -2.0], np.float32)
STD = np.exp(LOG_STD.astype(np.float64))
LOW, HIGH = (-0.5, -3.0, -0.1), (2.5, -1.0, 0.2)
BOX = ActionSpec("box", shape=(3,), low=LOW, high=HIGH)
HALF, MIDDLE = (np.array(HIGH) - LOW) / 2, (np.array(HIGH) + LOW) / 2
LOGITS = np.array([[0.3, -1.2, 2.0, 0.0], [-0.7, 1.5, -3.0, 0.4]], np.float32)
ALLOWED = np.array([[True, False, True, True], [True, True, False, False]])
LEAST = 1e-3  # of a p-value; seeds are fixed

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = NDArray[np.float64]


def draw_box(*, squashed: bool, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Raw samples, what the environment is given, and log-probabilities."""
    (block,) = action_blocks((BOX,))
    sampler = BoxSampler(BOX, block, COUNT, squashed=squashed)
    sampler.load(LOG_STD)
    noise = np.random.default_rng(seed).standard_normal((COUNT, 3), np.float32)
    raw, given = np.empty((COUNT, 3), np.float32), np.empty((COUNT, 3), np.float32)
    sampler.draw(np.broadcast_to(MEAN, (COUNT, 3)), noise, None, raw)
    sampler.bound(raw, given)
    return raw.astype(np.float64), given.astype(np.float64), sampler.log_prob.astype(np.float64)


def learned(action: ActionSpec, box: str = "clipped") -> ActionDistribution:
    observation = (ArraySpec("main", (1,), "float32"),)
    return ActionDistribution(PolicySpec(observation, (action,), (), "tanh", normalize=False, box=box))  # type: ignore[arg-type]


def as_rows(outputs: NDArray[np.float32], rows: int) -> torch.Tensor:
    return torch.from_numpy(outputs.reshape(1, -1).astype(np.float64)).expand(rows, -1)


def squashed_in_torch() -> td.Distribution:
    base = td.Normal(torch.from_numpy(MEAN).double(), torch.from_numpy(STD))
    to_bounds = td.AffineTransform(torch.from_numpy(MIDDLE), torch.from_numpy(HALF))
    return td.Independent(td.TransformedDistribution(base, [td.TanhTransform(), to_bounds]), 1)


# Boxes


def test_samples_of_a_box_are_those_of_a_gaussian() -> None:
    raw, _, _ = draw_box(squashed=False)
    torch.manual_seed(1)
    theirs = {
        "numpy": np.random.default_rng(1).normal(MEAN, STD, (COUNT, 3)),
        "torch": td.Normal(torch.from_numpy(MEAN), torch.from_numpy(STD)).sample((COUNT,)).numpy(),
    }
    for column in range(3):
        ours, normal = raw[:, column], stats.norm(MEAN[column], STD[column])
        assert stats.kstest(ours, normal.cdf).pvalue > LEAST
        for name, others in theirs.items():
            assert stats.ks_2samp(ours, others[:, column]).pvalue > LEAST, name
        assert ours.mean() == pytest.approx(normal.mean(), abs=4 * STD[column] / math.sqrt(COUNT))
        assert ours.var() == pytest.approx(normal.var(), rel=4 * math.sqrt(2 / COUNT))
    assert np.abs(np.corrcoef(raw.T) - np.eye(3)).max() < 4 / math.sqrt(COUNT)


def test_a_clipped_box_gives_its_bounds_as_often_as_a_gaussian_is_beyond_them() -> None:
    raw, given, _ = draw_box(squashed=False)
    for column in range(3):
        low, high = np.float32(LOW[column]), np.float32(HIGH[column])
        normal, value = stats.norm(MEAN[column], STD[column]), given[:, column]
        for count, chance in (((value == low).sum(), normal.cdf(low)), ((value == high).sum(), normal.sf(high))):
            assert stats.binomtest(int(count), COUNT, chance).pvalue > LEAST
        inside = (value > low) & (value < high)
        np.testing.assert_array_equal(value[inside], raw[inside, column])
        ends = (low - MEAN[column]) / STD[column], (high - MEAN[column]) / STD[column]
        between = stats.truncnorm(*ends, loc=MEAN[column], scale=STD[column])
        assert stats.kstest(value[inside], between.cdf).pvalue > LEAST


def test_samples_of_a_squashed_box_are_those_of_a_gaussian_through_a_tanh() -> None:
    _, given, _ = draw_box(squashed=True)
    torch.manual_seed(2)
    torchs = squashed_in_torch().sample((COUNT,)).numpy()
    numpys = MIDDLE + HALF * np.tanh(np.random.default_rng(2).normal(MEAN, STD, (COUNT, 3)))
    for column in range(3):
        ours = given[:, column]
        normal = stats.norm(MEAN[column], STD[column])
        unit = np.clip((ours - MIDDLE[column]) / HALF[column], -1 + 1e-9, 1 - 1e-9)
        assert stats.kstest(np.arctanh(unit), normal.cdf).pvalue > LEAST
        for others in (torchs, numpys):
            assert stats.ks_2samp(ours, others[:, column]).pvalue > LEAST


def test_log_probs_of_a_clipped_box_are_those_of_scipy_numpy_and_torch() -> None:
    raw, _, ours = draw_box(squashed=False)
    by_numpy = (-0.5 * ((raw - MEAN) / STD) ** 2 - np.log(STD * math.sqrt(2 * math.pi))).sum(1)
    normal = td.Independent(td.Normal(torch.from_numpy(MEAN), torch.from_numpy(STD)), 1)
    log_std = torch.from_numpy(LOG_STD).double()
    by_learner = learned(BOX).log_prob(as_rows(MEAN, COUNT), log_std, torch.from_numpy(raw), None)
    for theirs in (
        stats.multivariate_normal.logpdf(raw, MEAN, np.diag(STD**2)),
        by_numpy,
        normal.log_prob(torch.from_numpy(raw)).numpy(),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
        np.testing.assert_allclose(by_learner, theirs, rtol=1e-9, atol=1e-7)


def test_log_probs_of_a_squashed_box_are_those_of_scipy_numpy_and_torch() -> None:
    """Density of what the environment is given, by the change of variables."""
    raw, _, ours = draw_box(squashed=True)
    at = torch.from_numpy(raw)
    transformed = squashed_in_torch()
    value = torch.from_numpy(MIDDLE) + torch.from_numpy(HALF) * torch.tanh(at)
    slope = HALF / np.cosh(raw) ** 2
    by_numpy = (-0.5 * ((raw - MEAN) / STD) ** 2 - np.log(STD * math.sqrt(2 * math.pi)) - np.log(slope)).sum(1)
    by_learner = learned(BOX, "squashed").log_prob(
        as_rows(MEAN, COUNT), torch.from_numpy(LOG_STD).double(), at, None
    )  # fmt: skip
    near = np.abs(raw).max(1) < 3  # beyond, torch's own inverse of the tanh loses digits
    assert near.mean() > 0.5
    by_torch = transformed.log_prob(value).numpy()
    by_scipy = (stats.norm.logpdf(raw, MEAN, STD) - np.log(slope)).sum(1)
    for theirs, rows in ((by_scipy, slice(None)), (by_numpy, slice(None)), (by_torch, near)):
        np.testing.assert_allclose(ours[rows], theirs[rows], rtol=1e-5, atol=5e-5)
        np.testing.assert_allclose(by_learner[rows], theirs[rows], rtol=1e-6, atol=1e-6)


def test_the_entropy_of_a_clipped_box_is_that_of_scipy_numpy_and_torch() -> None:
    log_std = torch.from_numpy(LOG_STD).double()
    ours = learned(BOX).entropy(as_rows(MEAN, 2), log_std, None).item()
    assert ours == pytest.approx(stats.multivariate_normal.entropy(MEAN, np.diag(STD**2)), rel=1e-7)
    assert ours == pytest.approx(np.log(STD * math.sqrt(2 * math.pi * math.e)).sum(), rel=1e-7)
    assert ours == pytest.approx(td.Normal(torch.from_numpy(MEAN), log_std.exp()).entropy().sum().item(), rel=1e-7)


def test_the_entropy_of_a_squashed_box_is_that_of_scipy_numpy_and_torch() -> None:
    """By integration in scipy; numpy and torch draw, as torch has no formula either."""
    log_std = torch.from_numpy(LOG_STD).double()
    ours = learned(BOX, "squashed").entropy(as_rows(MEAN, 1), log_std, None).item()
    by_scipy = 0.0
    for mean, std, half in zip(MEAN, STD, HALF, strict=True):

        def surprise(u: float, mean: float = mean, std: float = std, half: float = half) -> float:
            density = stats.norm.pdf(u, mean, std)
            return float(density * (-stats.norm.logpdf(u, mean, std) + math.log(half / math.cosh(u) ** 2)))

        by_scipy += integrate.quad(surprise, mean - 9 * std, mean + 9 * std)[0]
    assert ours == pytest.approx(by_scipy, abs=5e-3)
    raw, _, surprise_of_actor = draw_box(squashed=True)
    assert ours == pytest.approx(-surprise_of_actor.mean(), abs=0.05)
    value = torch.from_numpy(MIDDLE + HALF * np.tanh(np.clip(raw, -8, 8)))
    assert ours == pytest.approx(-squashed_in_torch().log_prob(value).mean().item(), abs=0.05)


# Choices


def draw_choices(allowed: NDArray[np.bool_] | None, seed: int = 0) -> tuple[NDArray[np.int64], Floats, ActionSpec]:
    part = ActionSpec("discrete", shape=(2,), counts=(4, 4), masked=allowed is not None)
    (block,) = action_blocks((part,))
    sampler = ChoiceSampler(part, block, COUNT)
    noise = np.random.default_rng(seed).random((COUNT, 2), np.float32)
    mask = None if allowed is None else np.broadcast_to(allowed.reshape(1, 8), (COUNT, 8))
    choice = np.empty((COUNT, 2), np.int64)
    sampler.draw(np.broadcast_to(LOGITS.reshape(1, 8), (COUNT, 8)), noise, mask, choice)
    return choice, sampler.log_prob.astype(np.float64), part


MASKS = pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["free", "masked"])


def probabilities(allowed: NDArray[np.bool_] | None) -> Floats:
    odds = np.exp(LOGITS.astype(np.float64)) * (1 if allowed is None else allowed)
    return odds / odds.sum(1, keepdims=True)


@MASKS
def test_samples_of_choices_are_those_of_a_categorical(allowed: NDArray[np.bool_] | None) -> None:
    choice, _, _ = draw_choices(allowed)
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    for group, chance in enumerate(probabilities(allowed)):
        possible = chance > 0
        counts = np.bincount(choice[:, group], minlength=4)
        assert counts[~possible].sum() == 0
        assert stats.chisquare(counts[possible], COUNT * chance[possible]).pvalue > LEAST
        by_scipy = stats.rv_discrete(values=(np.arange(4), chance)).rvs(size=COUNT, random_state=4)
        by_numpy = rng.choice(4, COUNT, p=chance)
        by_torch = td.Categorical(probs=torch.from_numpy(chance)).sample((COUNT,)).numpy()
        for others in (by_scipy, by_numpy, by_torch):
            table = np.stack([counts, np.bincount(others, minlength=4)])[:, possible]
            assert stats.chi2_contingency(table).pvalue > LEAST
    assert abs(np.corrcoef(choice.T)[0, 1]) < 4 / math.sqrt(COUNT)


@MASKS
def test_log_probs_and_entropies_of_choices_are_those_of_scipy_numpy_and_torch(
    allowed: NDArray[np.bool_] | None,
) -> None:
    choice, ours, part = draw_choices(allowed)
    chance, rows = probabilities(allowed), learned(part)
    mask = None if allowed is None else torch.from_numpy(allowed.reshape(1, 8)).expand(COUNT, -1)
    outputs = as_rows(LOGITS, COUNT)
    by_learner = rows.log_prob(outputs, None, torch.from_numpy(choice).double(), mask).numpy()
    scipys = [stats.rv_discrete(values=(np.arange(4), p)) for p in chance]
    categorical = td.Independent(td.Categorical(probs=torch.from_numpy(chance)), 1)
    for theirs in (
        sum(d.logpmf(choice[:, group]) for group, d in enumerate(scipys)),
        np.log(chance[np.arange(2), choice]).sum(1),
        categorical.log_prob(torch.from_numpy(choice)).numpy(),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)
        np.testing.assert_allclose(by_learner, theirs, rtol=1e-9, atol=1e-12)
    entropy = rows.entropy(outputs[:1], None, None if mask is None else mask[:1]).item()
    surprise = -chance * np.log(chance, where=chance > 0, out=np.zeros_like(chance))
    assert entropy == pytest.approx(float(sum(d.entropy() for d in scipys)), rel=1e-9)
    assert entropy == pytest.approx(surprise.sum(), rel=1e-9)
    assert entropy == pytest.approx(categorical.entropy().item(), rel=1e-6)  # torch keeps a floor below its logs


def test_a_choice_of_two_is_a_bernoulli() -> None:
    """MultiBinary: three switches, each with a logit of its own for off and on."""
    part = ActionSpec("discrete", shape=(3,), counts=(2, 2, 2))
    (block,) = action_blocks((part,))
    logits = np.array([0.4, -0.3, -2.0, 1.0, 0.0, 0.0], np.float32)
    chance = 1 / (1 + np.exp(np.diff(logits.reshape(3, 2).astype(np.float64)[:, ::-1], axis=1)[:, 0]))
    sampler, switch = ChoiceSampler(part, block, COUNT), np.empty((COUNT, 3), np.int64)
    noise = np.random.default_rng(5).random((COUNT, 3), np.float32)
    sampler.draw(np.broadcast_to(logits, (COUNT, 6)), noise, None, switch)
    for column, p in enumerate(chance):
        assert stats.binomtest(int(switch[:, column].sum()), COUNT, p).pvalue > LEAST
    bernoulli = td.Independent(td.Bernoulli(torch.from_numpy(chance)), 1)
    by_scipy = stats.bernoulli.logpmf(switch, chance).sum(1)
    np.testing.assert_allclose(sampler.log_prob, by_scipy, rtol=0, atol=5e-6)
    np.testing.assert_allclose(
        sampler.log_prob, bernoulli.log_prob(torch.from_numpy(switch).double()).numpy(), rtol=0, atol=5e-6
    )
    entropy = learned(part).entropy(as_rows(logits, 1), None, None).item()
    assert entropy == pytest.approx(stats.bernoulli.entropy(chance).sum(), rel=1e-7)
    assert entropy == pytest.approx(bernoulli.entropy().item(), rel=1e-6)
