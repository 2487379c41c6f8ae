"""Log-probabilities and entropies against scipy and torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rustyrl_learner.distribution import (
    box_entropy,
    box_log_prob,
    choice_entropy,
    choice_log_prob,
    squash_entropy,
    squash_log_derivative,
)

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [1, 4])
def test_box_log_prob_is_the_density_of_a_diagonal_gaussian(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    mean, action = rng.normal(0, 2, (2, 50, width))
    log_std = rng.uniform(-3, 1, width)
    ours = box_log_prob(torch.from_numpy(mean), torch.from_numpy(log_std), torch.from_numpy(action))
    assert ours.shape == (50,)
    expected = stats.norm.logpdf(action, mean, np.exp(log_std)).sum(1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-11)
    normal = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(log_std)))
    torch.testing.assert_close(ours, normal.log_prob(torch.from_numpy(action)).sum(-1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_box_entropy_is_that_of_a_diagonal_gaussian(seed: int) -> None:
    log_std = np.random.default_rng(seed).uniform(-3, 1, 4)
    ours = box_entropy(torch.from_numpy(log_std))
    assert ours.shape == ()
    assert ours.item() == pytest.approx(stats.norm.entropy(scale=np.exp(log_std)).sum(), rel=1e-12)
    covariance = np.diag(np.exp(2 * log_std))
    assert ours.item() == pytest.approx(stats.multivariate_normal.entropy(np.zeros(4), covariance), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_discrete_log_prob_and_entropy_are_those_of_a_softmax(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, action = rng.normal(0, 3, (50, 6)), rng.integers(0, 6, 50)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    log_prob = choice_log_prob(torch.from_numpy(logits)[:, None], torch.from_numpy(action)[:, None])
    entropy = choice_entropy(torch.from_numpy(logits)[:, None])
    assert log_prob.shape == entropy.shape == (50,)
    np.testing.assert_allclose(log_prob.numpy(), np.log(probability[np.arange(50), action]), rtol=1e-11)
    np.testing.assert_allclose(entropy.numpy(), stats.entropy(probability, axis=1), rtol=1e-11)
    categorical = torch.distributions.Categorical(logits=torch.from_numpy(logits))
    torch.testing.assert_close(log_prob, categorical.log_prob(torch.from_numpy(action)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(entropy, categorical.entropy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_several_choices_are_independent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, action = torch.from_numpy(rng.normal(0, 3, (50, 4, 6))), torch.from_numpy(rng.integers(0, 6, (50, 4)))
    categorical = torch.distributions.Independent(torch.distributions.Categorical(logits=logits), 1)
    log_prob, entropy = choice_log_prob(logits, action), choice_entropy(logits)
    assert log_prob.shape == entropy.shape == (50,)
    torch.testing.assert_close(log_prob, categorical.log_prob(action), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(entropy, categorical.entropy(), rtol=1e-11, atol=1e-11)


def test_the_log_derivative_of_a_tanh_keeps_small_numbers() -> None:
    raw = torch.tensor([0.0, 1.0, -1.0, 3.0, 40.0, -40.0, 1e4])
    expected = torch.log1p(-(torch.tanh(raw[:4].double()) ** 2)).float()
    torch.testing.assert_close(squash_log_derivative(raw)[:4], expected, rtol=1e-5, atol=1e-6)
    far = [2 * (math.log(2) - 40), 2 * (math.log(2) - 40), 2 * (math.log(2) - 1e4)]
    assert squash_log_derivative(raw)[4:].tolist() == pytest.approx(far, rel=1e-6)


def test_equal_logits_have_the_entropy_of_a_fair_choice() -> None:
    for shift in (0.0, 1e4, -1e4):
        logits = torch.full((3, 5), shift)
        assert choice_entropy(logits[:, None]).tolist() == pytest.approx([math.log(5)] * 3, rel=1e-6)
        chosen = choice_log_prob(logits[:, None], torch.tensor([[0], [2], [4]]))
        assert chosen.tolist() == pytest.approx([-math.log(5)] * 3, rel=1e-6)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[[300.0, -300.0, 0.0]]])
    assert choice_log_prob(logits, torch.tensor([[1]])).item() == pytest.approx(-600.0)
    assert choice_entropy(logits).item() == pytest.approx(0.0, abs=1e-6)


def test_log_prob_peaks_at_the_mean_with_no_gradient() -> None:
    mean = torch.tensor([[0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
    box_log_prob(mean, log_std, mean.detach()).sum().backward()
    assert mean.grad is not None
    assert log_std.grad is not None
    assert mean.grad.tolist() == [[0.0, 0.0]]
    assert log_std.grad.tolist() == [-1.0, -1.0]


def test_gradients_of_log_prob_and_entropy_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    log_std = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    action = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    logits = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    choice = torch.tensor([[0, 1], [2, 2], [1, 0], [2, 1]])
    assert torch.autograd.gradcheck(lambda m, s: box_log_prob(m, s, action), (mean, log_std))
    assert torch.autograd.gradcheck(box_entropy, (log_std,))
    assert torch.autograd.gradcheck(lambda x: choice_log_prob(x, choice), (logits,))
    assert torch.autograd.gradcheck(choice_entropy, (logits,))
    assert torch.autograd.gradcheck(squash_log_derivative, (mean,))
    assert torch.autograd.gradcheck(squash_entropy, (mean, log_std))
