"""Observation statistics: what they are, and that both sides of the wire apply them alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl.spec import UNBOUNDED, ActionSpec, ArraySpec
from rustyrl.weights import PolicySpec, Weights
from rustyrl_actors.inference import Policy
from rustyrl_learner.normalizer import ObservationNormalizer

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def folded(parts: list[Tensor], clip: float = 10.0) -> ObservationNormalizer:
    normalizer = ObservationNormalizer(parts[0].shape[1], clip, CPU)
    for part in parts:
        normalizer.fold(part)
    return normalizer


def assert_two_pass(normalizer: ObservationNormalizer, rows: Tensor, rel: float = 1e-6) -> None:
    """The statistics are those of all rows, as float64 computes them with the mean known first."""
    exact = rows.double().numpy()
    np.testing.assert_allclose(normalizer.statistics.mean.numpy(), exact.mean(0), rtol=rel, atol=rel * exact.std())
    np.testing.assert_allclose(normalizer.statistics.variance.numpy(), exact.var(0), rtol=rel, atol=1e-12)
    assert normalizer.statistics.count == len(rows)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [0.03, 1.0, 50.0])
def test_statistics_equal_the_two_pass_values_after_many_folds(offset: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    parts = [
        torch.from_numpy((offset + spread * rng.standard_normal((int(rng.integers(1, 80)), 3))).astype(np.float32))
        for _ in range(200)
    ]
    assert_two_pass(folded(parts), torch.cat(parts))


@pytest.mark.parametrize("spread", [0.003, 0.03, 1.0])
def test_the_first_fold_far_from_the_origin_is_exact(spread: float) -> None:
    rng = np.random.default_rng(1)
    rows = torch.from_numpy((1e4 + spread * rng.standard_normal((500, 4))).astype(np.float32))
    assert_two_pass(folded([rows]), rows)


def test_statistics_follow_observations_that_drift() -> None:
    rng = np.random.default_rng(2)
    parts = [torch.from_numpy((100.0 * k + rng.standard_normal((64, 2))).astype(np.float32)) for k in range(50)]
    assert_two_pass(folded(parts), torch.cat(parts))


def test_how_rows_are_cut_into_folds_does_not_matter() -> None:
    rows = 5 + 3 * torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    once, rowwise = folded([rows]), folded(list(rows.split(1)))
    torch.testing.assert_close(rowwise.statistics.mean, once.statistics.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(rowwise.statistics.variance, once.statistics.variance, rtol=1e-6, atol=0)


def test_a_constant_observation_has_variance_zero_and_stays_finite() -> None:
    rows = torch.full((100, 2), 10000.1)
    normalizer = folded([rows[:30], rows[30:]])
    assert normalizer.statistics.variance.tolist() == [0.0, 0.0]
    assert torch.isfinite(normalizer.apply(rows)).all()


def test_an_empty_fold_changes_nothing() -> None:
    normalizer = folded([torch.empty(0, 3)])
    assert normalizer.statistics.count == 0
    assert normalizer.statistics.mean.tolist() == [0.0] * 3
    assert normalizer.statistics.variance.tolist() == [1.0] * 3


def test_the_first_rows_replace_the_initial_statistics() -> None:
    normalizer = folded([torch.tensor([[2.0], [4.0]])])
    assert normalizer.statistics.mean.tolist() == [3.0]
    assert normalizer.statistics.variance.tolist() == [1.0]


def test_normalized_rows_have_mean_0_and_deviation_1() -> None:
    rows = 20 + 4 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    result = folded([rows]).apply(rows)
    torch.testing.assert_close(result.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.std(0, correction=0), torch.ones(2), rtol=1e-4, atol=0)


def test_apply_clips_and_leaves_its_argument_as_it_is() -> None:
    normalizer = folded([torch.tensor([[-1.0], [1.0]])], clip=2.5)
    rows = torch.tensor([[0.0], [100.0], [-100.0]])
    assert normalizer.apply(rows)[:, 0].tolist() == pytest.approx([0.0, 2.5, -2.5])
    assert rows[:, 0].tolist() == [0.0, 100.0, -100.0]


def test_apply_takes_time_first_batches() -> None:
    rows = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    normalizer = folded([rows.reshape(-1, 3)])
    assert torch.equal(normalizer.apply(rows).reshape(-1, 3), normalizer.apply(rows.reshape(-1, 3)))


def what_the_policy_sees(normalizer: ObservationNormalizer, rows: NDArray[np.float32], clip: float) -> Tensor:
    """The actor's own normalisation, read off an identity layer, one half of the numbers in each array."""
    width = rows.shape[1]
    half = width // 2
    observation = (ArraySpec("near", (half,), "float32"), ArraySpec("far", (width - half,), "float32"))
    action = ActionSpec("box", shape=(width,), low=(-UNBOUNDED,) * width, high=(UNBOUNDED,) * width)
    spec = PolicySpec(observation, (action,), (), "tanh", normalize=True, observation_clip=clip)
    arrays = {
        "policy.0.weight": np.eye(width, dtype=np.float32),
        "policy.0.bias": np.zeros(width, np.float32),
        "log_std": np.zeros(width, np.float32),
        **normalizer.arrays(),
    }
    policy = Policy(Weights(spec, arrays), len(rows))
    return torch.from_numpy(policy.forward({"near": rows[:, :half], "far": rows[:, half:]}).copy())


@pytest.mark.parametrize("clip", [10.0, 1.5])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("seed", range(3))
def test_learner_and_actor_normalize_alike(seed: int, offset: float, clip: float) -> None:
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 3, 6)
    rows = (offset + scale * rng.standard_normal((200, 6))).astype(np.float32)
    normalizer = folded([torch.from_numpy(rows[:120]), torch.from_numpy(rows[120:])], clip)
    ours = normalizer.apply(torch.from_numpy(rows))
    torch.testing.assert_close(what_the_policy_sees(normalizer, rows, clip), ours, rtol=1e-5, atol=1e-5)
    assert ours.abs().max() <= clip


def test_learner_and_actor_agree_on_an_observation_that_never_changes() -> None:
    rows = np.full((10, 2), 0.25, np.float32)
    normalizer = folded([torch.from_numpy(rows)])
    moved = rows + np.float32(1e-4)  # what a variance of 0 divides by decides the result
    ours = normalizer.apply(torch.from_numpy(moved))
    torch.testing.assert_close(what_the_policy_sees(normalizer, moved, 10.0), ours, rtol=1e-5, atol=1e-5)
    assert 0.9 < ours[0, 0] < 1.1


def test_arrays_round_trip() -> None:
    rows = 7 + torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    normalizer = folded([rows])
    arrays = normalizer.arrays()
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "normalizer.mean": ((3,), "float32"),
        "normalizer.variance": ((3,), "float32"),
        "normalizer.count": ((1,), "float32"),
    }
    other = ObservationNormalizer(3, 10.0, CPU)
    other.set_arrays(arrays)
    assert other.statistics.count == 300
    assert other.statistics.mean.dtype == other.statistics.variance.dtype == torch.float64
    for name, array in other.arrays().items():
        np.testing.assert_array_equal(array, arrays[name])
    assert torch.equal(other.apply(rows), normalizer.apply(rows))


def test_float64_arrays_of_a_checkpoint_lose_nothing() -> None:
    normalizer = folded([7 + torch.randn(300, 3, generator=torch.Generator().manual_seed(0))])
    other = ObservationNormalizer(3, 10.0, CPU)
    other.set_arrays(
        {
            "normalizer.mean": normalizer.statistics.mean.numpy(),
            "normalizer.variance": normalizer.statistics.variance.numpy(),
            "normalizer.count": np.array([normalizer.statistics.count]),
        }
    )
    assert torch.equal(other.statistics.mean, normalizer.statistics.mean)
    assert torch.equal(other.statistics.variance, normalizer.statistics.variance)
    other.fold(torch.ones(10, 3))  # has statistics of its own
    assert not torch.equal(other.statistics.mean, normalizer.statistics.mean)


def test_arrays_do_not_follow_later_folds() -> None:
    normalizer = folded([torch.ones(3, 2)])
    arrays = normalizer.arrays()
    normalizer.fold(torch.full((3, 2), 9.0))
    assert arrays["normalizer.mean"].tolist() == [1.0, 1.0]
    assert arrays["normalizer.count"].tolist() == [3.0]
