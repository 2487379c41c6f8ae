"""Random numbers of slots: drawn together, and yet each slot's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rustyrl_actors.draws import SlotDraws, slot_generator

SEED = (5, 2, 9)
SLOTS = 6
DRAWS: dict[str, Callable[[SlotDraws], NDArray[Any]]] = {
    "random": lambda rng: rng.random(),
    "random-vector": lambda rng: rng.random(3),
    "random-table": lambda rng: rng.random((2, 3)),
    "uniform": lambda rng: rng.uniform(-2, 5),
    "uniform-vector": lambda rng: rng.uniform([-1, 0, 10], [1, 0.5, 20], 3),
    "uniform-table": lambda rng: rng.uniform(0, [1, 2, 3], (2, 3)),
    "normal": lambda rng: rng.normal(),
    "normal-vector": lambda rng: rng.normal([1, 2, 3], 0.5, 3),
    "normal-table": lambda rng: rng.normal(0, [[1, 2, 3], [4, 5, 6]], (2, 3)),
    "integers": lambda rng: rng.integers(7),
    "integers-vector": lambda rng: rng.integers(-3, 4, 3),
    "integers-table": lambda rng: rng.integers(2, 4, (2, 3)),
}
SHAPES = {"vector": (3,), "table": (2, 3)}
EVERY = pytest.mark.parametrize(("name", "draw"), DRAWS.items(), ids=DRAWS.keys())


def generators(slots: int = SLOTS, seed: tuple[int, ...] = SEED) -> list[np.random.Generator]:
    return [slot_generator(seed, slot) for slot in range(slots)]


@EVERY
def test_a_row_is_what_the_slots_own_generator_draws_alone(
    name: str, draw: Callable[[SlotDraws], NDArray[Any]]
) -> None:
    together = draw(SlotDraws(generators()))
    for slot, own in enumerate(generators()):
        np.testing.assert_array_equal(together[slot], draw(SlotDraws([own]))[0])


@EVERY
def test_a_draw_has_a_row_for_every_slot(name: str, draw: Callable[[SlotDraws], NDArray[Any]]) -> None:
    for slots in (1, SLOTS):
        rng = SlotDraws(generators(slots))
        drawn = draw(rng)
        assert len(rng) == slots
        assert drawn.shape == (slots, *SHAPES.get(name.partition("-")[2], ()))
        assert drawn.dtype == (np.int64 if name.startswith("integers") else np.float64)


@EVERY
def test_what_a_slot_draws_does_not_depend_on_when_others_draw(
    name: str, draw: Callable[[SlotDraws], NDArray[Any]]
) -> None:
    """Each slot draws three times, whoever draws beside it."""
    alone = [[draw(SlotDraws([own]))[0] for _ in range(3)] for own in generators()]
    shared, seen = generators(), [[] for _ in range(SLOTS)]  # type: ignore[var-annotated]
    for rows in ([0, 1, 2, 3, 4, 5], [4], [2, 0], [1, 3, 5], [5, 4, 3, 2, 1, 0]):
        for row, value in zip(rows, draw(SlotDraws([shared[row] for row in rows])), strict=True):
            seen[row].append(value)
    for slot in range(SLOTS):
        assert len(seen[slot]) == 3
        np.testing.assert_array_equal(np.array(seen[slot]), np.array(alone[slot]))


@EVERY
def test_the_same_seed_repeats_and_any_other_does_not(name: str, draw: Callable[[SlotDraws], NDArray[Any]]) -> None:
    first = draw(SlotDraws(generators(50)))
    np.testing.assert_array_equal(draw(SlotDraws(generators(50))), first)
    for seed in ((6, 2, 9), (5, 3, 9), (5, 2, 10), (5, 2)):
        assert (draw(SlotDraws(generators(50, seed))) != first).any()


def test_a_draw_is_the_one_of_numpys_generator() -> None:
    rng, plain = SlotDraws(generators(1)), slot_generator(SEED, 0)
    assert rng.random() == plain.random()
    assert rng.normal(3.0, 2.0) == 3.0 + 2.0 * plain.standard_normal()
    np.testing.assert_array_equal(rng.integers(5, 11, 4)[0], plain.integers(5, 11, 4))
    np.testing.assert_allclose(rng.uniform(-1, 3, 4)[0], plain.uniform(-1, 3, 4), rtol=1e-15)
    assert rng.generators[0].random() == plain.random()  # and what is missing is drawn from the same place


def test_slots_draw_from_streams_that_do_not_overlap() -> None:
    seeds = list(itertools.product((0, 1), (0, 1, 255), (0, 1)))
    values = np.concatenate(
        [slot_generator(seed, slot).integers(0, 2**63, 1024) for seed in seeds for slot in (0, 1, 2, 63)]
    )
    assert len(np.unique(values)) == len(values)


def test_slots_are_not_correlated() -> None:
    drawn = SlotDraws(generators(20)).random(2000)
    assert np.abs(np.corrcoef(drawn) - np.eye(20)).max() < 0.1


def test_uniform_draws_fill_their_range_and_nothing_else() -> None:
    drawn = SlotDraws(generators(4)).uniform([-2.0, 10.0], [5.0, 10.5], (2000, 2)).reshape(-1, 2)
    assert (drawn >= (-2, 10)).all()
    assert (drawn < (5, 10.5)).all()
    assert stats.kstest((drawn[:, 0] + 2) / 7, "uniform").pvalue > 0.01
    assert stats.kstest((drawn[:, 1] - 10) / 0.5, "uniform").pvalue > 0.01
    assert stats.kstest(SlotDraws(generators(4)).uniform(size=2000).ravel(), "uniform").pvalue > 0.01


def test_random_draws_are_uniform_below_one() -> None:
    drawn = SlotDraws(generators(4)).random(5000)
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 0.01


def test_normal_draws_have_their_mean_and_deviation() -> None:
    drawn = SlotDraws(generators(4)).normal([-2.0, 10.0], [0.5, 3.0], (2000, 2)).reshape(-1, 2)
    assert stats.kstest((drawn[:, 0] + 2) / 0.5, "norm").pvalue > 0.01
    assert stats.kstest((drawn[:, 1] - 10) / 3, "norm").pvalue > 0.01


def test_integers_are_drawn_evenly_and_without_the_upper_end() -> None:
    for drawn, expected in (
        (SlotDraws(generators(4)).integers(5, size=3000), range(5)),
        (SlotDraws(generators(4)).integers(-2, 3, 3000), range(-2, 3)),
    ):
        values, counts = np.unique(drawn, return_counts=True)
        assert values.tolist() == list(expected)
        assert stats.chisquare(counts).pvalue > 0.001
