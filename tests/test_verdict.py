"""What is said of a run's limits: the words for every case, and the prediction against what happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from clusters import WORLDS

from rustyrl.verdict import Timing, judge

LEARNER = {"wait": 0.6, "batch": 0.02, "update": 0.36, "publish": 0.02}
ACTORS = {"step": 1.7, "act": 0.2, "encode": 0.05, "send": 0.01}


def timing(**changes: Any) -> Timing:
    given: dict[str, Any] = {
        "seconds": 1.0,
        "learner_s": LEARNER,
        "actor_s": ACTORS,
        "cpu_s": 1.5,
        "steps": 1000.0,
        "actors": 2,
        "worlds": 8,
        "cores": 16,
        "lag": 1,
    }
    return Timing(**{**given, **changes})


def test_more_actors_help_until_the_learner_or_the_worlds_run_out():
    verdict = judge(timing())
    assert verdict.limit == "worlds"
    assert verdict.actors == 8  # at 4 actors of two worlds each collecting still takes 0.49 s, learning 0.4 s
    assert verdict.gain == pytest.approx(1 / 0.42 - 1, abs=0.1)
    assert "the learner waits 60% of the time: world-bound (87% of the actors' work is stepping worlds)" in verdict.text
    assert "6 more actors would give about +" in verdict.text


def test_every_actor_has_a_world_at_least_so_more_of_them_need_more_worlds():
    verdict = judge(timing(worlds=2))
    assert (verdict.actors, verdict.gain) == (2, pytest.approx(0.0))
    assert "each actor has one world: more worlds (batch.worlds) with an actor each, or faster worlds" in verdict.text


@pytest.mark.parametrize(
    ("actor_s", "limit", "said"),
    [
        ({"step": 0.1, "act": 1.8}, "inference", "inference-bound (95% of the actors' work is choosing actions)"),
        ({"step": 0.5, "encode": 0.6, "send": 0.8}, "wire", "74% of the actors' work is encoding and sending"),
    ],
)
def test_what_the_actors_spend_their_time_on_is_named(actor_s, limit, said):
    verdict = judge(timing(actor_s=actor_s))
    assert verdict.limit == limit
    assert said in verdict.text


def test_a_learner_that_does_not_wait_is_the_limit():
    verdict = judge(timing(learner_s={"wait": 0.02, "update": 0.9, "advantages": 0.08}, actor_s={"step": 0.3}))
    assert verdict.limit == "learner"
    assert "the learner waits 2% of the time: learner-bound; 92% of its work is update" in verdict.text
    assert "minibatch_size" in verdict.text
    assert verdict.gain < 0.05


def test_where_all_cores_are_busy_more_actors_are_not_advised():
    verdict = judge(timing(cpu_s=1.95, cores=2, learner_s={"wait": 0.1, "update": 0.9}, actor_s={"step": 1.9}))
    assert verdict.limit == "cores"
    assert "1.9 of 2 cores are busy" in verdict.text or "2.0 of 2 cores are busy" in verdict.text
    assert "more actors here would not" in verdict.text


def test_at_lag_0_taking_turns_is_named_where_it_is_what_costs():
    turns = timing(lag=0, learner_s={"wait": 0.5, "update": 0.5}, actor_s={"step": 1.0}, worlds=2)
    verdict = judge(turns)
    assert (
        "at lag 0 collecting (50%) and learning take turns; --max-policy-lag 1 would give about +100%" in verdict.text
    )
    assert turns.predict_s(2, lag=1) == pytest.approx(0.5)


def test_what_a_batch_takes_beyond_its_parts_is_expected_to_stay():
    slow = timing(seconds=1.3)  # 0.32 s that nobody accounts for
    assert slow.predict_s(8) == pytest.approx(0.4 + 1.3 - 0.98)
    assert slow.predict_sps(2) == pytest.approx(1000 / 1.3)


def test_nothing_is_said_before_there_is_something_to_say():
    recent = {"updates": 2, "seconds": 1.0, "cpu_s": 1.0, "steps": 100, "actors": 2, "learner_s": {}, "actor_s": {}}
    assert Timing.of({}, 2, 2, 1) is None
    assert Timing.of(recent, 2, 2, 1) is None
    assert Timing.of({**recent, "updates": 8}, 2, 2, 1) is not None
    assert Timing.of({**recent, "updates": 8, "actors": 0}, 2, 2, 1) is None


@pytest.mark.parametrize(
    ("now", "then"), [(1, 2), pytest.param(1, 4, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_the_prediction_comes_true_on_worlds_that_take_a_planted_time(start, now, then):
    """4 worlds that sleep for 15 ms in every step: as many do that at once as there are actors."""
    found = []
    for actors in (now, then):
        cluster = start(
            "train", f"{WORLDS}/counting.py:Counting", "--actors", str(actors), "--total-steps", "640", "--json",
            "--set", "env.delay_ms=15", "--set", "batch.worlds=4", "--set", "env.slots=2",
            "--set", "batch.unroll_length=8", "--set", "run.eval_episodes=1",
        )  # fmt: skip
        code, out, err = cluster.wait()
        assert code == 0, err
        rows = [row for row in cluster.rows() if "policy_loss" in row][4:]
        sps = (rows[-1]["steps"] - rows[0]["steps"]) / (rows[-1]["seconds"] - rows[0]["seconds"])
        found.append((sps, json.loads(out)))
    measured, summary = found[1][0], found[0][1]
    assert summary["timing"]["actors"] == now
    predicted = summary["timing"]["sps_by_actors"][str(then)]
    assert predicted == pytest.approx(measured, rel=0.15)
    if now == 1:
        assert "world-bound" in summary["bottleneck"]
        assert "3 more actors would give about +" in summary["bottleneck"]
