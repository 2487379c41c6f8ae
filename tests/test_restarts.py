"""A process that died is followed by another after a pause that grows, and not for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rustyrl.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S, Restarts


def test_the_pause_doubles_up_to_a_limit_and_then_there_is_none():
    restarts = Restarts(6, 60.0)
    assert [restarts.died(float(now)) for now in range(8)] == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0, None, None]
    assert (FIRST_PAUSE_S, LONGEST_PAUSE_S) == (0.25, 2.0)


def test_without_restarts_the_first_death_is_the_last():
    assert Restarts(0, 60.0).died(5.0) is None


def test_a_death_counts_until_the_window_is_over():
    restarts = Restarts(1, 60.0)
    assert restarts.died(0.0) == FIRST_PAUSE_S
    assert restarts.died(60.5) == FIRST_PAUSE_S
    assert restarts.died(120.5) is None  # to the very end of it


def test_a_standstill_before_a_death_is_no_time_that_went_well():
    """Who stands still until its lease is over, each time, dies as often as who dies at once."""
    restarts = Restarts(3, 60.0)
    at = 0.0
    for _ in range(3):
        at += 100.0
        assert restarts.died(at, standstill_s=95.0) is not None
    assert restarts.died(at + 100.0, standstill_s=95.0) is None
    patient = Restarts(3, 60.0)
    assert all(patient.died(100.0 * n) == FIRST_PAUSE_S for n in range(8))


@given(
    deaths=st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1)), max_size=30),
    limit=st.integers(0, 6),
    window_s=st.floats(1, 100),
)
def test_it_counts_as_a_list_of_all_deaths_would(deaths, limit, window_s):
    """The slow twin forgets nothing, and looks how many were within the window."""
    restarts, now = Restarts(limit, window_s), 0.0
    past: list[float] = []
    for passed_s, still in deaths:
        now += passed_s
        past = [death + passed_s * still for death in past] + [now]
        count = sum(death >= now - window_s for death in past)
        expected = None if count > limit else min(0.25 * 2 ** (count - 1), 2.0)
        assert restarts.died(now, passed_s * still) == expected
