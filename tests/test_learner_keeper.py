"""A learner that dies is followed by another, unless that leads nowhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import poll

from rustyrl import learner_keeper as module
from rustyrl.learner_keeper import LearnerDeath, LearnerKeeper
from rustyrl.processes import Child
from rustyrl.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S

WAITS = "import sys; sys.stdin.read()"


class Clock:
    """Stands for the module ``time``: monotonic time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Post:
    """A keeper of real processes that run what the test says."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder, self.clock = folder, clock
        self.program = WAITS
        self.checkpoint = ""
        self.refuse = False
        self.started: list[tuple[int, Child]] = []
        self.keeper = LearnerKeeper(self.start, lambda: self.checkpoint, folder / "crashes", 3, 60.0, 7)

    def start(self, incarnation: int) -> Child:
        if self.refuse:
            raise OSError(11, "Resource temporarily unavailable")
        log = self.folder / "learner.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", self.program], stdin=subprocess.PIPE, stderr=output
            )
        child = Child("learner", process, log, -1, incarnation=incarnation)
        self.started.append((incarnation, child))
        return child

    @property
    def child(self) -> Child:
        return self.started[-1][1]

    def turn(self, *, replace: bool = True) -> LearnerDeath | None:
        return self.keeper.turn(replace=replace)

    def await_death(self, *, replace: bool = True) -> LearnerDeath:
        death = poll(lambda: self.turn(replace=replace), "a death")
        assert self.turn(replace=replace) is None  # it is told once
        return death

    def report(self, version: int, outstanding: int = 1) -> None:
        tickets = {"issued": 9, "trained": 5, "rejected": {"shape": 1}, "lost": 2, "outstanding": outstanding}
        self.keeper.take_report(
            {"version": version, "incarnation": self.keeper.incarnation, "tickets": tickets, "actors": []}
        )

    def kill(self) -> None:
        self.child.process.kill()

    def restart(self) -> None:
        """Wait until another has started."""
        count = len(self.started)
        self.clock.now += LONGEST_PAUSE_S
        assert self.turn() is None
        assert len(self.started) == count + 1


@pytest.fixture
def post(tmp_path, monkeypatch) -> Iterator[Post]:
    """Up to 3 deaths within 60 s; the first incarnation is 7."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    post = Post(tmp_path, clock)
    try:
        yield post
    finally:
        for _, child in post.started:
            child.close()
            child.process.stdin.close()


def test_before_it_is_started_there_is_no_learner(post):
    assert not post.keeper.running
    assert not post.keeper.done
    assert post.turn() is None
    assert post.started == []


def test_who_dies_is_followed_after_a_pause_by_the_next_incarnation(post):
    post.keeper.start()
    post.keeper.peer, post.keeper.listening = b"peer", True
    assert post.keeper.running
    assert post.turn() is None
    first = post.child
    post.kill()
    death = post.await_death()
    assert (death.restart_in_s, death.loop) == (FIRST_PAUSE_S, "")
    assert death.cause.startswith(f"the learner (process {first.pid}) ended with signal 9 (SIGKILL); see ")
    assert not post.keeper.running
    post.clock.now += FIRST_PAUSE_S - 0.001
    assert post.turn() is None
    assert len(post.started) == 1
    assert post.keeper.incarnation == 7
    post.clock.now += 0.002
    assert post.turn() is None
    assert [incarnation for incarnation, _ in post.started] == [7, 8]
    assert post.keeper.incarnation == 8
    assert (post.keeper.peer, post.keeper.listening, post.keeper.ended) == (None, False, "")
    assert post.keeper.running
    assert post.turn() is None
    assert len(post.started) == 2


def test_a_crash_is_recorded_with_the_incarnation_and_the_end_of_the_log(post):
    post.program = "1 / 0"
    post.keeper.start()
    death = post.await_death()
    (record,) = (post.folder / "crashes").iterdir()
    text = record.read_text()
    assert text.startswith(f"learner, process {post.child.pid}, ended with code 1\nincarnation 7\n\n")
    assert "ZeroDivisionError" in text
    assert str(record) in death.cause
    assert "ZeroDivisionError" in death.cause


def test_dying_too_often_within_the_window_is_a_loop(post):
    """Checkpoints do not help who dies of itself."""
    post.program = "1 / 0"
    post.keeper.start()
    pauses = []
    for count in range(3):
        post.checkpoint = f"checkpoint {count}"
        post.report(version=count + 1)
        death = post.await_death()
        assert death.loop == ""
        pauses.append(death.restart_in_s)
        post.restart()
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    post.checkpoint = "another"
    death = post.await_death()
    assert (death.restart_in_s, death.loop) == (None, "the learner died 4 times within 60 s")
    post.clock.now += 100.0
    assert post.turn() is None
    assert len(post.started) == 4


def test_deaths_outside_the_window_are_forgotten(post):
    post.program = "1 / 0"
    post.keeper.start()
    for count in range(6):
        post.checkpoint = f"checkpoint {count}"
        assert post.await_death().restart_in_s == FIRST_PAUSE_S
        post.clock.now += 61.0
        post.restart()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_trained_on_and_was_ended_from_outside_may_be_so_as_often_as_one_likes(post, number):
    post.keeper.start()
    for count in range(5):
        post.checkpoint = f"checkpoint {count}"
        post.report(version=10 * count)
        post.report(version=10 * (count + 1))
        post.child.process.send_signal(number)
        death = post.await_death()
        assert (death.restart_in_s, death.loop) == (FIRST_PAUSE_S, "")
        post.restart()


@pytest.mark.parametrize("version", [None, 10])
def test_who_is_ended_from_outside_before_it_trained_is_counted(post, version):
    """As the kernel does for want of memory: another would fare no better."""
    post.keeper.start()
    if version is not None:
        post.report(0)
        post.report(version)
        post.kill()
        post.checkpoint = "checkpoint 10"
        assert post.await_death().loop == ""  # it had trained
        post.restart()
    for count in range(3):
        post.checkpoint = f"other {count}"
        if version is not None:
            post.report(version)  # where it began
        post.kill()
        assert post.await_death().loop == ""
        post.restart()
    post.kill()
    assert post.await_death().loop == "the learner died 4 times within 60 s"


@pytest.mark.parametrize(("before", "since"), [("", ""), ("the one that was resumed", ""), ("", "a new one")])
def test_dying_again_and_again_before_another_checkpoint_leads_nowhere(post, before, since):
    """However long each of them lived."""
    post.checkpoint = before
    post.keeper.start()
    if since:
        post.checkpoint = since
        post.report(1)
        post.kill()
        assert post.await_death().loop == ""
        post.clock.now += 600.0
        post.restart()
    for version in range(2, 5):
        post.report(version)
        post.kill()
        death = post.await_death()
        assert death.loop == ""
        post.clock.now += 600.0
        post.restart()
    post.report(9)
    post.kill()
    death = post.await_death()
    assert death.restart_in_s is None
    assert "without coming to another checkpoint, for the 4. time" in death.loop


def test_another_checkpoint_is_progress(post):
    post.keeper.start()
    for version in range(1, 9):
        if version % 3 == 0:
            post.checkpoint = f"checkpoint {version}"
        post.report(version)
        post.kill()
        assert post.await_death().loop == ""
        post.clock.now += 600.0
        post.restart()


@pytest.mark.parametrize(("ended", "done"), [("", False), ("signal", False), ("goal", True), ("total_steps", True)])
def test_it_is_done_when_it_says_so_and_no_signal_told_it_to(post, ended, done):
    post.keeper.start()
    post.keeper.ended = ended
    assert post.keeper.done == done


def test_who_obeyed_a_signal_is_followed_and_said_to_have_obeyed(post):
    post.program = ""
    post.keeper.start()
    post.keeper.ended = "signal"
    post.report(3)
    death = post.await_death()
    assert death.restart_in_s == FIRST_PAUSE_S
    assert "was told to end by SIGTERM" in death.cause
    post.restart()
    assert post.keeper.ended == ""


def test_nobody_follows_while_the_run_is_being_ended(post):
    post.keeper.start()
    post.kill()
    post.child.process.wait(60)
    assert post.turn(replace=False) is None
    assert post.child.ended_seen
    post.clock.now += LONGEST_PAUSE_S
    assert post.turn() is None
    assert len(post.started) == 1
    assert not (post.folder / "crashes").exists()


def test_who_is_due_is_not_started_while_the_run_is_being_ended(post):
    post.keeper.start()
    post.kill()
    post.await_death()
    post.clock.now += LONGEST_PAUSE_S
    assert post.turn(replace=False) is None
    assert len(post.started) == 1


def test_a_start_that_fails_is_told_and_tried_again_but_not_for_ever(post):
    post.keeper.start()
    post.kill()
    post.await_death()
    post.refuse = True
    told = []
    for _ in range(3):
        post.clock.now += LONGEST_PAUSE_S
        death = post.turn()
        assert death is not None
        told.append((death.restart_in_s is None, death.loop))
        assert death.cause == "the learner could not be started: [Errno 11] Resource temporarily unavailable"
        assert post.turn() is None
    assert told == [(False, ""), (False, ""), (True, "the learner died 4 times within 60 s")]
    assert len(post.started) == 1
    assert not post.keeper.running


def test_after_a_start_that_failed_the_next_one_is_one_incarnation_on(post):
    post.keeper.start()
    post.kill()
    post.await_death()
    post.refuse = True
    post.clock.now += LONGEST_PAUSE_S
    assert post.turn() is not None
    post.refuse = False
    post.restart()
    assert post.started[-1][0] > 7
    assert post.keeper.incarnation == post.started[-1][0]
    assert post.turn() is None


def test_what_a_dead_learner_had_out_is_lost_in_its_closed_account(post):
    post.keeper.start()
    post.report(version=4, outstanding=3)
    post.kill()
    post.await_death()
    closed = {"issued": 9, "trained": 5, "rejected": {"shape": 1}, "lost": 5, "outstanding": 0}
    assert post.keeper.past == [{"incarnation": 7, "version": 4, "tickets": closed}]
    post.restart()
    post.kill()  # before it said anything: the report is of the one before
    post.await_death()
    assert len(post.keeper.past) == 1
    post.restart()
    post.report(version=6, outstanding=0)
    post.kill()
    post.await_death()
    assert [(account["incarnation"], account["version"]) for account in post.keeper.past] == [(7, 4), (9, 6)]
    assert post.keeper.past[0]["tickets"] == closed


def test_a_report_is_kept_with_its_time(post):
    report: dict[str, Any] = {"version": 3}
    post.clock.now = 1234.5
    post.keeper.take_report(report)
    assert post.keeper.report is report
    assert post.keeper.reported_at == 1234.5
    assert time.monotonic() != 1234.5
