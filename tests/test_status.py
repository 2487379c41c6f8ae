"""How a cluster stands, gathered from what its parts say."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rustyrl import configure
from rustyrl import status as module
from rustyrl.config import build_config
from rustyrl.goal import goal_conditions
from rustyrl.judge import Judge
from rustyrl.learner_keeper import LearnerKeeper
from rustyrl.restarts import Restarts
from rustyrl.status import CRASHES_SHOWN, CURVE_POINTS, StatusBoard
from rustyrl.supervisor import Berth, Death, Supervisor

HERE = socket.gethostname()
_, SPEC = configure({"run": {"env": "cartpole"}})
LIMITS = {"run": {"env": "cartpole", "total_steps": 100_000, "max_seconds": 60.0}}


class Clock:
    """Stands for the module ``time``: monotonic time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Board:
    """A board of a run whose processes the test makes up."""

    def __init__(self, folder: Path, clock: Clock, layers: dict[str, Any]) -> None:
        config, spec = build_config(layers), SPEC
        self.clock = clock
        self.keeper = LearnerKeeper(lambda _: None, lambda: "", folder, 5, 60.0, 3)
        self.supervisor = Supervisor(lambda _: None, folder, 5, 60.0)
        self.judge = Judge(config, goal_conditions(config.run, spec), folder / "evaluate.log")
        self.board = StatusBoard(folder, config, spec, self.keeper, self.supervisor, self.judge)

    def report(self, passed_s: float, version: int, wait_s: float, incarnation: int = 3, **more: Any) -> None:
        """The learner reports after a time; a version is a second of training and 100 steps."""
        self.clock.now += passed_s
        report = {
            "incarnation": incarnation,
            "version": version,
            "steps": 100 * version,
            "received_bytes": 1000 * version,
            "sent_bytes": 10 * version,
            "stages_s": {"wait": wait_s, "update": 1.0 * version} if version else {},
            "trained_sps": 50.0,
            "actors": [],
            **more,
        }
        self.keeper.report, self.keeper.reported_at = report, self.clock.now
        self.board.take_report(report)

    def status(self) -> dict[str, Any]:
        return self.board.status("running", None)


@pytest.fixture
def board(tmp_path, monkeypatch) -> Iterator[Board]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    board = Board(tmp_path, clock, LIMITS)
    yield board
    board.judge.close()


def actor(index: int, **more: Any) -> dict[str, Any]:
    row = {"index": index, "incarnation": 50 + index, "pid": os.getpid(), "host": HERE, "ready": True}
    counted = {"sps": 10.0, "env_steps": 0, "holds": False, "relieved": False}
    return {**row, **counted, "version": 7, "worlds": 2, **more}


def test_before_the_first_report_nothing_is_known(board):
    assert board.board.wait_share() is None
    assert board.board.sps() == 0.0
    status = board.status()
    assert (status["state"], status["env"], status["curve"], status["actors"]) == ("running", "cartpole", [], [])
    assert status["learner"]["running"] is False
    assert (status["learner"]["pid"], status["learner"]["silent_s"], status["learner"]["wait_share"]) == (None,) * 3
    assert board.board.view("starting").learner == {}


def test_the_time_of_a_resumed_run_goes_on(board, tmp_path):
    other = StatusBoard(
        tmp_path, build_config(LIMITS), SPEC, board.keeper, board.supervisor, board.judge, before_s=50.0
    )
    board.clock.now += 4.0
    assert (board.board.seconds, other.seconds) == (4.0, 54.0)
    assert (board.board.view("running").left, other.view("running").left) == ("56 s", "6 s")


def test_the_share_of_waiting_is_that_of_recent_updates(board):
    board.report(1.0, 0, 0.0)
    board.report(1.0, 1, 9.0)  # it waited for the actors to start
    assert board.board.wait_share() == pytest.approx(0.9)
    for version in range(2, 20):
        board.report(1.0, version, 9.0 + (version - 1))
    assert board.board.wait_share() == pytest.approx(0.5)
    assert board.status()["learner"]["wait_share"] == 0.5


def test_while_no_update_ends_the_share_of_waiting_is_not_known(board):
    board.report(1.0, 4, 3.0)
    assert board.board.wait_share() is None
    board.report(1.0, 4, 3.0)
    assert board.board.wait_share() is None
    board.report(1.0, 5, 3.5)
    assert board.board.wait_share() == pytest.approx(1 / 3)


def test_speeds_are_over_five_seconds_or_four_versions(board):
    """So that a slow learner has a speed, and a fast one's is of now."""
    for second in range(1, 31):
        board.report(1.0, 10 * second, 0.0)
    assert board.board.sps() == 1000.0
    for second in range(1, 7):
        board.report(1.0, 300 + second, 0.0)
    assert board.board.sps() == 100.0
    assert board.status()["wire"]["received_bytes_s"] == 1000.0
    assert board.status()["wire"]["sent_bytes_s"] == 10.0
    for count in range(1, 5):
        board.report(20.0, 306 + count, 0.0)
    assert board.board.sps() == 5.0


def test_the_counts_of_another_learner_are_not_mixed_with_those_before(board):
    for version in range(40, 50):
        board.report(1.0, version, 0.0)
    board.report(1.0, 30, 0.0, incarnation=4)  # it begins further back
    assert board.board.sps() == 0.0
    assert board.board.wait_share() is None
    board.report(1.0, 31, 0.0, incarnation=4)
    assert board.board.sps() == 100.0


def curve(board: Board) -> list[tuple[int, float]]:
    return board.status()["curve"]


def test_the_curve_has_a_point_for_each_update_that_knows_a_return(board):
    board.report(1.0, 1, 0.0)
    board.report(1.0, 2, 0.0, training={})
    board.report(1.0, 3, 0.0, training={"return_mean": 1.5})
    board.report(0.2, 3, 0.0, training={"return_mean": 1.5})
    board.report(1.0, 4, 0.0, training={"return_mean": 2.5})
    assert curve(board) == [(300, 1.5), (400, 2.5)]


def test_the_curve_of_a_long_run_is_thinned_out_evenly(board):
    for version in range(1, 5 * CURVE_POINTS):
        board.report(0.0, version, 0.0, training={"return_mean": float(version)})
    points = curve(board)
    assert CURVE_POINTS / 2 <= len(points) <= CURVE_POINTS
    assert all(steps == 100 * mean for steps, mean in points)
    assert points[0][0] == 100
    gaps = {after[0] - before[0] for before, after in itertools.pairwise(points)}
    assert len(gaps) == 1
    assert points[-1][0] >= 100 * (5 * CURVE_POINTS - 16)


def test_the_curve_goes_back_with_the_learner(board):
    for version in range(1, 11):
        board.report(1.0, version, 0.0, training={"return_mean": 1.0})
    for version in (6, 7):
        board.report(1.0, version, 0.0, incarnation=4, training={"return_mean": 2.0})
    assert curve(board) == [(100 * n, 1.0) for n in range(1, 7)] + [(700, 2.0)]


def test_the_last_crashes_are_shown_with_where_they_are_recorded(board):
    board.clock.now += 12.34
    for number in range(CRASHES_SHOWN + 2):
        board.board.take_crash(f"actor {number} died\nTraceback", Path(f"crash-{number}.txt") if number else None)
    board.board.take_crash("", None)
    crashes = board.status()["crashes"]
    assert len(crashes) == CRASHES_SHOWN
    assert crashes[0] == {"what": "actor 3 died", "record": "crash-3.txt", "at_s": 12.3}
    assert crashes[-1] == {"what": "", "record": "", "at_s": 12.3}


def test_only_deaths_that_were_not_expected_count_as_restarts(board):
    def death(expected: bool, restart_in_s: float | None) -> Death:
        return Death(0, None, "it died", expected, restart_in_s, "", None)

    for each in (death(True, None), death(False, None), death(False, 0.5), death(False, 1.0)):
        board.board.take_death(each)
    assert board.status()["actor_restarts"] == 2
    assert len(board.status()["crashes"]) == 3


def test_an_actor_is_shown_with_its_lag_and_what_it_uses(board):
    rows = [actor(0), actor(1, version=-1), actor(1000, host="elsewhere")]  # of the same number there
    board.report(1.0, 9, 0.0, actors=rows)
    status = board.status()
    shown = {row["index"]: row for row in status["actors"]}
    assert [shown[index]["lag"] for index in (0, 1, 1000)] == [2, None, 2]
    assert [shown[index]["started"] for index in (0, 1, 1000)] == [False] * 3  # none has a berth here
    assert shown[0]["memory_bytes"] > 0
    assert shown[1000]["memory_bytes"] is None  # the number of a process elsewhere says nothing here
    assert status["machine"]["cores"] >= 1
    assert status["learner"]["silent_s"] == 0.0
    board.clock.now += 2.5
    assert board.status()["learner"]["silent_s"] == 2.5


def test_what_has_a_place_of_its_own_is_not_told_twice(board):
    more = {
        "tickets": {"issued": 1},
        "worlds_moved": 3,
        "refused_messages": {"x": 1},
        "refused_handshakes": 7,
        "gpu": None,
        "silent": [],
        "kind": 1,
    }
    board.report(1.0, 9, 0.0, **more)
    status = board.status()
    assert not {*more, "actors", "received_bytes", "sent_bytes"} & set(status["learner"])
    assert (status["tickets"], status["worlds_moved"]) == ({"issued": 1}, 3)
    assert status["wire"] == {
        "received_bytes": 9000,
        "sent_bytes": 90,
        "received_bytes_s": 0.0,
        "sent_bytes_s": 0.0,
        "refused_messages": {"x": 1},
        "refused_handshakes": 7,
    }
    assert status["learner"]["steps"] == 900


def test_what_is_left_is_the_nearer_of_the_limits(board):
    board.report(1.0, 990, 0.0)  # 1,000 of 100,000 steps left, 50 a second
    assert board.board.view("running").left == "20 s"
    board.clock.now += 54.0
    assert board.board.view("running").left == "5 s"
    board.clock.now += 54.0
    assert board.board.view("running").left == "0 s"


@pytest.mark.parametrize(
    ("run", "left"),
    [
        ({"total_steps": 5000}, "5,000 steps"),
        ({"stop_at": ["return_mean>=400"]}, "until return_mean>=400"),
        ({}, "until"),
    ],
)
def test_what_is_left_before_a_speed_is_known(tmp_path, monkeypatch, run, left):
    board = Board(tmp_path, Clock(), {"run": {"env": "cartpole", "total_steps": 0, **run}})
    assert board.board.view("starting").left.startswith(left)


def test_the_display_counts_actors_that_are_ready(board):
    board.supervisor.wanted = 2
    board.report(1.0, 1, 0.0, actors=[actor(0), actor(1, ready=False)])
    view = board.board.view("running")
    assert (view.actors_alive, view.actors_started) == (1, 2)
    board.report(1.0, 2, 0.0, actors=[actor(0), actor(1), actor(1000)])
    view = board.board.view("running")
    assert (view.actors_alive, view.actors_started) == (3, 3)


def test_the_speed_of_an_actor_is_that_of_now(board):
    board.report(1.0, 1, 0.0, actors=[actor(0), actor(1)])
    board.report(2.0, 2, 0.0, actors=[actor(0, env_steps=500), actor(1, env_steps=100), actor(2)])
    rows = board.status()["actors"]
    assert [row["sps"] for row in rows] == [250.0, 50.0, 10.0]  # of one that has just come, since then
    assert [row["mean_sps"] for row in rows] == [10.0] * 3


def test_who_holds_the_batch_is_named_while_it_runs(board):
    for version in range(20):
        board.report(1.0, version, 0.9 * version, actors=[actor(0), actor(1, holds=True)])
    assert board.board.wait_share() == pytest.approx(0.9 / 1.9)
    status = board.status()
    assert [row["held_share"] for row in status["actors"]] == [0.0, 1.0]
    assert status["held_by"] == [1]
    assert board.board.status("paused", None)["held_by"] == []


def test_actors_that_the_learner_does_not_know_are_listed_apart(board):
    board.supervisor.berths.append(Berth(4, Restarts(5, 60.0), replaced=2, restart_at=board.clock.now + 1.5))
    (absent,) = board.status()["actors_absent"]
    assert absent == {"index": 4, "pid": None, "restarts": 2, "restart_in_s": 1.5, "leaving": False}
