"""Who holds the batch is named, and nobody who does not; speeds of the present."""

from __future__ import annotations

from rustyrl.holdups import HoldUps
from rustyrl.rates import Rates


def rows(holding: list[bool]) -> list[dict]:
    return [
        {"incarnation": 100 + index, "index": index, "ready": True, "worlds": 1, "holds": holds, "relieved": False}
        for index, holds in enumerate(holding)
    ]


def after(reports: list[list[bool]], wait_share: float | None = 0.9) -> list[int]:
    """Who is named after reports that came every 0.2 s."""
    holdups = HoldUps()
    for number, holding in enumerate(reports):
        holdups.take({"incarnation": 0, "actors": rows(holding)}, number * 0.2)
    actors = [{**row, "held_share": holdups.share(row["incarnation"])} for row in rows(reports[-1])]
    return holdups.holders(actors, wait_share)


def test_one_that_all_others_wait_for_is_named():
    assert after([[False, False, True, False]] * 30) == [2]
    assert after([[True] * 4, [False, False, True, False]] * 15) == [2]  # half of the time
    assert after([[False, True]] * 30) == [1]


def test_a_minority_is_named_the_worst_first():
    slow, slower = [False, True, True] + [False] * 6, [False, False, True] + [False] * 6
    assert after([slow, slow, slower] * 10) == [2, 1]


def test_actors_that_take_turns_or_a_busy_learner_hold_nothing():
    assert after([[True, False, False], [False, True, False], [False, False, True]] * 10) == []
    assert after([[True] * 4] * 30) == []
    assert after([[True]] * 30) == []  # alone
    assert after([[False, False, True, False]] * 30, wait_share=0.1) == []
    assert after([[False, False, True, False]] * 30, wait_share=None) == []


def test_it_is_forgotten_with_time_and_with_another_learner():
    assert after([[False, True, False, False]] * 30 + [[False] * 4] * 20) == []
    holdups = HoldUps()
    for number in range(10):
        holdups.take({"incarnation": 0, "actors": rows([True, False])}, number * 0.2)
    assert holdups.share(100) == 1.0
    holdups.take({"incarnation": 1, "actors": rows([True, False])}, 2.0)
    assert holdups.share(100) == 0.0


def report(version: int, waited: float = 0.0) -> dict:
    return {
        "incarnation": 0,
        "version": version,
        "steps": version * 1000,
        "received_bytes": 0,
        "sent_bytes": 0,
        "stages_s": {"wait": waited, "update": version * 0.1},
        "actors": [{"incarnation": 7, "env_steps": version * 500, "sps": 1.0}],
    }


def test_rates_are_those_of_the_present():
    rates = Rates()
    for number in range(100):
        rates.take(report(number), number * 0.5)
    assert rates.per_s("steps") == 2000.0
    assert rates.actor_sps({"incarnation": 7, "sps": 1.0}) == 1000.0
    assert rates.actor_sps({"incarnation": 8, "sps": 3.5}) == 3.5  # unknown so far
    for number in range(100):
        rates.take(report(100 + number), 50 + number * 0.1)
    assert rates.per_s("steps") == 10000.0
    assert rates.wait_share() == 0.0


def test_a_long_pause_takes_no_memory():
    rates = Rates()
    for number in range(10_000):
        rates.take(report(3), number * 0.2)
    assert len(rates._recent) == 2
    assert rates.per_s("steps") == 0.0
