"""Running statistics are those that two passes over all rows would find, and those of a window follow it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rustyrl_learner.statistics import RunningStatistics

CPU = torch.device("cpu")
CHUNK = 1 << 20

pytestmark = pytest.mark.usefixtures("one_thread")


def chunks(samples: int, offset: float) -> Iterator[NDArray[np.float32]]:
    """The same rows each time they are asked for; those of a few at a time lie elsewhere than the rest."""
    rng = np.random.Generator(np.random.SFC64(1))
    while samples:
        rows = rng.random((min(CHUNK, samples), 1), np.float32)
        rows *= np.float32(12**0.5)
        rows += np.float32(offset + rng.standard_normal())
        yield rows
        samples -= len(rows)


@pytest.mark.parametrize(
    ("samples", "offset"),
    [(10**6, -3e4), (10**8, 1e4)],
    ids=["1e6 at -3e4", "1e8 at 1e4"],
)
def test_statistics_of_many_samples_far_from_the_origin_equal_the_two_pass_values(samples: int, offset: float) -> None:
    statistics = RunningStatistics(1, CPU)
    total = 0.0
    for rows in chunks(samples, offset):
        statistics.fold(torch.from_numpy(rows))
        total += float(rows.sum(dtype=np.float64))
    mean = total / samples
    squares = sum(float(np.square(rows.astype(np.float64) - mean).sum()) for rows in chunks(samples, offset))
    assert statistics.count == samples
    assert statistics.mean.item() == pytest.approx(mean, rel=1e-6 / abs(offset))  # 1e-6 of a deviation
    assert statistics.variance.item() == pytest.approx(squares / samples, rel=1e-6)


def test_a_window_that_is_not_full_forgets_nothing() -> None:
    rows = 5 + 3 * torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    everything, newest = RunningStatistics(2, CPU), RunningStatistics(2, CPU, window=90)
    for part in rows.split(30):
        everything.fold(part)
        newest.fold(part)
    for name, tensor in everything.tensors("x").items():
        assert torch.equal(newest.tensors("x")[name], tensor)


def test_rows_of_a_full_window_count_less_with_each_fold() -> None:
    """What was there keeps the share of the window that is not new; by hand for three folds of one number each."""
    statistics = RunningStatistics(1, CPU, window=40)
    for value in (0.0, 100.0):
        statistics.fold(torch.full((20, 1), value))
    assert (statistics.mean.item(), statistics.variance.item()) == (50.0, 2500.0)
    statistics.fold(torch.full((10, 1), 10.0))
    mean = (30 * 50 + 10 * 10) / 40
    second_moment = (30 * (2500 + 50**2) + 10 * 10**2) / 40
    assert statistics.count == 40
    assert statistics.mean.item() == pytest.approx(mean)
    assert statistics.variance.item() == pytest.approx(second_moment - mean**2)


@pytest.mark.parametrize("size", [40, 41, 400])
def test_a_fold_of_a_whole_window_leaves_nothing_of_before(size: int) -> None:
    rows = 5 + 3 * torch.randn(size, 2, generator=torch.Generator().manual_seed(0))
    old, new = RunningStatistics(2, CPU, window=40), RunningStatistics(2, CPU, window=40)
    old.fold(torch.full((30, 2), 100.0))
    old.fold(rows)
    new.fold(rows)
    torch.testing.assert_close(old.mean, new.mean, rtol=0, atol=100 * 6e-8)  # what float32 loses in such a leap
    torch.testing.assert_close(old.variance, new.variance, rtol=1e-6, atol=0)
    assert old.count == new.count == size


def test_a_window_follows_what_drifts_and_all_rows_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    everything, newest = RunningStatistics(1, CPU), RunningStatistics(1, CPU, window=640)
    for k in range(100):
        rows = k + torch.randn(64, 1, generator=generator)
        everything.fold(rows)
        newest.fold(rows)
    assert everything.mean.item() == pytest.approx(49.5, abs=0.1)
    assert newest.mean.item() == pytest.approx(99 - 9, abs=0.5)  # shares 1/10, 9/100, ... are 9 folds old on average
