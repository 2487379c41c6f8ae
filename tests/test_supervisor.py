"""Actor processes: as many as are wanted, a new one for each that dies, and none left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import poll

from rustyrl import supervisor as module
from rustyrl.black_box import BlackBox
from rustyrl.processes import Child
from rustyrl.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S
from rustyrl.supervisor import LAST_WORDS_S, Death, Supervisor

WAITS = "import sys; sys.stdin.read()"  # until it is killed, or until who started it has gone
START_S = 60.0  # what an actor may take to come, by default
LEASE_S = 20.0


class Clock:
    """Stands for the module ``time``: monotonic time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    strftime = staticmethod(time.strftime)


class Crew:
    """A supervisor of real processes that run what the test says."""

    def __init__(self, folder: Path, clock: Clock, restarts: int, window_s: float) -> None:
        self.clock = clock
        self.folder = folder
        self.program = WAITS
        self.started: list[tuple[int, Child]] = []
        self.retired: list[Child] = []
        self.refuse = 0  # so many starts
        self.boxed = False  # actors that can say what they do
        self.supervisor = Supervisor(self.start, folder / "crashes", restarts, window_s, LEASE_S, seed=5)

    def start(self, index: int) -> Child:
        if self.refuse:
            self.refuse -= 1
            raise OSError(11, "Resource temporarily unavailable")
        log = self.folder / f"actor-{index}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", self.program],
                stdin=subprocess.PIPE,
                stderr=output,
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),  # it is no end of an actor
            )
        descriptor = os.pidfd_open(process.pid) if sys.platform == "linux" else -1
        box = BlackBox.create() if self.boxed else None
        child = Child(f"actor {index}", process, log, descriptor, black_box=box, incarnation=100 + len(self.started))
        self.started.append((index, child))
        return child

    def scale(self, wanted: int) -> None:
        self.supervisor.scale(wanted, self.retired.append)

    def turn(self, *, replace: bool = True) -> list[Death]:
        return self.supervisor.turn(replace=replace)

    def await_deaths(self, count: int = 1, *, replace: bool = True) -> list[Death]:
        deaths: list[Death] = []

        def died() -> bool:
            deaths.extend(self.turn(replace=replace))
            return len(deaths) >= count

        poll(died, f"{count} deaths")
        assert len(deaths) == count
        return deaths

    def running(self) -> list[int]:
        """The indices whose process runs."""
        return sorted(berth.index for berth in self.supervisor.berths if berth.running)

    def child(self, index: int) -> Child:
        """The newest process of an index."""
        return [child for other, child in self.started if other == index][-1]

    def die(self, index: int, number: int = signal.SIGKILL) -> Death:
        """End the process of an index, and see it."""
        self.child(index).process.send_signal(number)
        (death,) = self.await_deaths()
        return death

    def restart(self) -> None:
        """Let the longest pause pass, and everybody start who is due."""
        self.clock.now += LONGEST_PAUSE_S
        assert self.turn() == []

    def close(self) -> None:
        for child in self.supervisor.children:
            child.close()


@pytest.fixture
def crew(tmp_path, monkeypatch) -> Iterator[Crew]:
    """Up to 5 deaths within 60 s; whatever the test did, closing leaves no process and no descriptor."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    crew = Crew(tmp_path, clock, 5, 60.0)
    try:
        yield crew
        crew.close()
        assert [child.pid for _, child in crew.started if child.running] == []
        assert [child.descriptor for _, child in crew.started if child.descriptor >= 0] == []
        assert [child.pid for _, child in crew.started if child.black_box and child.black_box.descriptor >= 0] == []
    finally:
        for _, child in crew.started:
            child.close()
            child.process.stdin.close()


def test_as_many_are_started_as_are_wanted_with_the_lowest_free_indices(crew):
    crew.scale(3)
    assert [index for index, _ in crew.started] == [0, 1, 2]
    assert crew.running() == [0, 1, 2]
    crew.scale(3)
    assert crew.turn() == []
    assert len(crew.started) == 3
    crew.scale(5)
    assert [index for index, _ in crew.started] == [0, 1, 2, 3, 4]
    assert crew.supervisor.wanted == 5
    assert crew.retired == []
    assert len(crew.supervisor.children) == 5


def test_who_died_is_replaced_after_a_pause_that_doubles_up_to_a_limit(crew):
    crew.scale(2)
    pauses = []
    for count in range(1, 6):
        victim = crew.child(1)
        victim.process.kill()
        (death,) = crew.await_deaths()
        assert (death.index, death.child.pid, death.child.process.returncode) == (1, victim.pid, -signal.SIGKILL)
        assert (death.expected, death.loop) == (False, "")
        pauses.append(death.restart_in_s)
        assert crew.running() == [0]
        assert crew.supervisor.any_running
        crew.clock.now += death.restart_in_s - 0.001
        assert crew.turn() == []
        assert crew.running() == [0]
        crew.clock.now += 0.002
        assert crew.turn() == []
        assert crew.running() == [0, 1]
        assert crew.child(1).pid != victim.pid
        assert victim.descriptor == -1  # given back
        assert [berth.replaced for berth in crew.supervisor.berths] == [0, count]
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


@pytest.mark.parametrize("code", [0, 3])
def test_who_was_sent_home_or_has_a_broken_world_is_not_replaced(crew, code):
    crew.program = f"raise SystemExit({code})"
    crew.scale(1)
    (death,) = crew.await_deaths()
    assert (death.child.process.returncode, death.restart_in_s, death.loop) == (code, None, "")
    assert death.expected == (code == 0)
    assert (death.record is None) == (code == 0)
    crew.clock.now += 10 * LONGEST_PAUSE_S
    assert crew.turn() == []
    assert len(crew.started) == 1
    assert not crew.supervisor.any_running
    assert [berth.index for berth in crew.supervisor.berths] == [0]  # what its log said can still be asked


def test_an_error_is_no_way_to_go(crew):
    crew.program = "raise SystemExit(1)"
    crew.scale(1)
    assert crew.await_deaths()[0].restart_in_s == FIRST_PAUSE_S


def test_dying_too_often_within_the_window_is_a_loop(crew):
    crew.program = "1 / 0"
    crew.scale(2)
    died = crew.await_deaths(2)  # each counts its own
    for _ in range(5):
        assert [death.loop for death in died] == [""] * len(died)
        crew.clock.now += LONGEST_PAUSE_S
        assert crew.turn() == []
        died = crew.await_deaths(2)
    assert sorted((death.index, death.loop, death.restart_in_s) for death in died) == [
        (0, "actor 0", None),
        (1, "actor 1", None),
    ]
    assert "ZeroDivisionError" in died[0].cause
    assert not crew.supervisor.any_running
    crew.clock.now += LONGEST_PAUSE_S
    assert crew.turn() == []
    assert len(crew.started) == 2 * 6


def test_deaths_outside_the_window_are_forgotten(crew):
    crew.scale(1)
    for _ in range(8):  # more than five, but never more than two within a minute
        crew.child(0).process.kill()
        (death,) = crew.await_deaths()
        assert not death.loop
        assert death.restart_in_s in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S)
        crew.clock.now += 31.0
        crew.turn()
    assert crew.supervisor.berths[0].replaced == 8


def test_scaling_down_retires_the_highest_indices_and_does_not_replace_them(crew):
    crew.scale(4)
    crew.scale(2)
    assert crew.retired == [crew.child(2), crew.child(3)]
    assert crew.running() == [0, 1, 2, 3]  # they are asked, and take their time
    assert crew.turn() == []
    crew.scale(2)
    assert len(crew.retired) == 2  # each is asked once
    for index in (2, 3):
        crew.child(index).process.terminate()
    deaths = crew.await_deaths(2)
    assert sorted(death.index for death in deaths) == [2, 3]
    assert {(d.expected, d.restart_in_s, d.loop, d.record) for d in deaths} == {(True, None, "", None)}
    crew.clock.now += LONGEST_PAUSE_S
    assert crew.turn() == []
    assert [berth.index for berth in crew.supervisor.berths] == [0, 1]
    assert len(crew.started) == 4
    assert not (crew.folder / "crashes").exists()


def test_who_waits_for_its_restart_can_be_scaled_away(crew):
    crew.scale(2)
    crew.child(1).process.kill()
    crew.await_deaths()
    crew.scale(1)
    assert crew.retired == []  # there is no process to ask
    crew.clock.now += LONGEST_PAUSE_S
    assert crew.turn() == []
    assert [berth.index for berth in crew.supervisor.berths] == [0]
    assert len(crew.started) == 2


def test_scaling_up_while_one_is_leaving_starts_another_beside_it(crew):
    crew.scale(2)
    crew.scale(1)
    crew.scale(3)
    assert [index for index, _ in crew.started] == [0, 1, 2, 3]  # index 1 is taken as long as the leaver has it
    crew.child(1).process.kill()
    (death,) = crew.await_deaths()
    assert death.expected
    assert crew.running() == [0, 2, 3]
    crew.scale(4)
    assert crew.running() == [0, 1, 2, 3]  # now it is free
    assert crew.retired == [crew.started[1][1]]


def test_to_zero_and_back(crew):
    crew.scale(1)
    crew.scale(0)
    crew.child(0).process.kill()
    crew.await_deaths()
    assert crew.supervisor.berths == []
    crew.scale(1)
    assert crew.running() == [0]


def test_a_leaver_that_ends_in_the_middle_of_a_turn_is_still_reported(crew, monkeypatch):
    """Or its tickets would wait for its lease: the launcher tells the learner of every death it hears of."""
    crew.scale(1)
    crew.scale(0)
    child = crew.child(0)
    ended = child.process.poll
    child.process.kill()
    child.process.wait(60)
    looks = [None]  # what the first look of the turn sees: it still runs
    monkeypatch.setattr(child.process, "poll", lambda: looks.pop() if looks else ended())
    deaths = [*crew.turn(), *crew.turn()]
    assert [death.child.pid for death in deaths] == [child.pid]
    assert crew.supervisor.berths == []


def test_nobody_is_replaced_while_the_run_is_being_ended(crew):
    crew.scale(2)
    crew.child(0).process.kill()
    crew.await_deaths()
    crew.child(1).process.kill()
    (death,) = crew.await_deaths(replace=False)
    assert death.restart_in_s is None
    crew.clock.now += LONGEST_PAUSE_S
    assert crew.turn(replace=False) == []
    assert len(crew.started) == 2


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9 (SIGKILL)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 1)", "signal 35 (unnamed)"),
        ("raise SystemExit(7)", "code 7"),
        ("[][1]", "code 1"),
    ],
    ids=["killed", "a signal without a name", "exit", "traceback"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="ends by signals as Linux numbers them")
def test_a_crash_is_recorded_with_what_ended_it_and_the_end_of_the_log(crew, program, how):
    said = "import sys; [print('line', n, file=sys.stderr, flush=True) for n in range(9)]; "
    crew.program = said + program
    crew.scale(1)
    (death,) = crew.await_deaths()
    text = death.record.read_text()
    assert death.record.parent == crew.folder / "crashes"
    assert f"actor 0, process {death.child.pid}, ended with {how}\n" in text
    assert ("IndexError" in text) if how == "code 1" else text.endswith("line 8\n")
    crew.clock.now += FIRST_PAUSE_S
    crew.turn()
    assert crew.await_deaths()[0].record != death.record  # one each
    assert len(list(death.record.parent.iterdir())) == 2


def test_a_start_that_fails_is_told_and_tried_again(crew):
    crew.refuse = 2
    crew.scale(2)
    assert crew.started == []
    assert crew.supervisor.any_running  # they are to come
    deaths = crew.turn()
    assert [(death.index, death.child, death.restart_in_s, death.loop) for death in deaths] == [
        (0, None, FIRST_PAUSE_S, ""),
        (1, None, FIRST_PAUSE_S, ""),
    ]
    assert deaths[0].cause == "actor 0 could not be started: [Errno 11] Resource temporarily unavailable"
    assert {(death.expected, death.record) for death in deaths} == {(False, None)}
    assert crew.turn() == []
    crew.clock.now += FIRST_PAUSE_S
    assert crew.turn() == []
    assert crew.running() == [0, 1]
    assert [berth.replaced for berth in crew.supervisor.berths] == [0, 0]  # they are the first


def test_a_start_that_fails_again_and_again_is_a_loop(crew):
    crew.refuse = 100
    crew.scale(1)
    told = crew.turn()
    while told[-1].restart_in_s is not None:
        crew.clock.now += told[-1].restart_in_s
        told += crew.turn()
        assert len(told) <= 6
    assert [death.loop for death in told] == [""] * 5 + ["actor 0"]
    assert not crew.supervisor.any_running
    crew.clock.now += LONGEST_PAUSE_S
    assert crew.turn() == []


def test_a_successor_that_cannot_be_started_is_tried_again(crew):
    crew.scale(1)
    crew.die(0)
    crew.refuse = 1
    crew.clock.now += LONGEST_PAUSE_S
    (failed,) = crew.turn()
    assert (failed.restart_in_s, failed.loop) == (2 * FIRST_PAUSE_S, "")
    crew.restart()
    assert crew.running() == [0]
    assert crew.supervisor.berths[0].replaced == 1


def test_who_could_not_be_started_can_be_scaled_away(crew):
    crew.refuse = 1
    crew.scale(1)
    crew.scale(0)
    crew.turn()
    assert crew.supervisor.berths == []
    crew.clock.now += LONGEST_PAUSE_S
    crew.turn()
    assert crew.started == []


def ask(crew: Crew, *, present: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
    """Say which indices the learner hears, and which it gave up."""
    crew.supervisor.hear(
        {crew.child(index).incarnation for index in present}, {crew.child(index).incarnation for index in silent}
    )


def test_who_is_given_up_by_the_learner_says_where_it_is_and_is_killed_and_replaced(crew):
    crew.program = (
        "import faulthandler, signal, sys; faulthandler.register(signal.SIGUSR1); "
        "print('ready', file=sys.stderr, flush=True); sys.stdin.read()"
    )
    crew.scale(2)
    log = crew.folder / "actor-1.log"
    poll(lambda: log.exists() and "ready" in log.read_text(), "a program that runs")
    ask(crew, present=(0, 1))
    ask(crew, present=(0,), silent=(1,))
    poll(lambda: "most recent call first" in log.read_text(), "its last words")
    assert crew.turn() == []
    crew.clock.now += LAST_WORDS_S - 0.01
    assert crew.turn() == []
    assert crew.running() == [0, 1]  # it has the time to say them
    crew.clock.now += 0.02
    (death,) = crew.await_deaths()
    assert (death.index, death.expected, death.restart_in_s) == (1, False, FIRST_PAUSE_S)
    assert "was killed: it had given no sign of life for 20 s" in death.cause
    assert "was killed" in death.record.read_text()
    crew.restart()
    ask(crew, present=(0, 1), silent=())
    crew.clock.now += 1.0
    assert crew.turn() == []
    assert crew.running() == [0, 1]  # its successor is not taken for it


def test_it_is_given_its_time_and_no_more_however_often_it_is_named(crew, monkeypatch):
    """The learner reports five times a second."""
    crew.scale(1)
    killed: list[Child] = []
    signaled: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Child, "kill", lambda child: killed.append(child))
        patch.setattr(Child, "signal", lambda _, number: signaled.append(number))
        found_at = crew.clock.now
        while crew.clock.now < found_at + LAST_WORDS_S:
            ask(crew, silent=(0,))
            assert crew.turn() == []
            assert killed == []
            crew.clock.now += 0.1
        ask(crew, silent=(0,))
        crew.clock.now += 0.1
        crew.turn()
    assert killed == [crew.child(0)]
    assert signaled == [signal.SIGUSR1]


def test_a_stopped_process_is_killed_all_the_same(crew):
    crew.scale(1)
    crew.child(0).process.send_signal(signal.SIGSTOP)
    ask(crew, silent=(0,))
    crew.clock.now += 1.0
    (death,) = crew.await_deaths()
    assert "no sign of life" in death.cause


def test_who_does_not_come_to_the_learner_in_the_time_of_a_start_is_ended(crew):
    crew.scale(2)
    while crew.supervisor.berths[1].silent_at is None:
        assert crew.clock.now <= 1000.0 + START_S
        assert crew.running() == [0, 1]
        crew.clock.now += LEASE_S / 2 - 0.1
        ask(crew, present=(0,))
        crew.turn()
    assert crew.clock.now > 1000.0 + START_S
    crew.clock.now += 1.0
    (death,) = crew.await_deaths()
    assert death.index == 1
    assert crew.running() == [0]


def test_one_that_was_heard_has_the_time_of_a_lease_from_then_on(crew):
    crew.scale(1)
    crew.clock.now += LEASE_S - 1
    ask(crew, present=(0,))
    crew.clock.now += LEASE_S
    ask(crew)
    assert crew.supervisor.berths[0].silent_at is None
    crew.clock.now += 0.1
    ask(crew)
    assert crew.supervisor.berths[0].silent_at == crew.clock.now


def test_another_learner_is_given_the_time_of_a_lease_to_be_found(crew):
    crew.scale(2)
    crew.clock.now += 5 * LEASE_S  # there was none
    crew.supervisor.await_hello()
    ask(crew)
    crew.clock.now += LEASE_S - 0.1
    ask(crew)
    crew.clock.now += 1.0
    crew.supervisor.await_hello()
    ask(crew)
    crew.turn()
    assert [berth.silent_at for berth in crew.supervisor.berths] == [None, None]
    assert crew.running() == [0, 1]


def test_who_waits_for_its_restart_is_not_silent(crew):
    crew.scale(1)
    dead = crew.die(0)
    crew.clock.now += 5 * LEASE_S
    crew.supervisor.hear(set(), {dead.child.incarnation})  # the learner gave it up, too
    assert crew.turn() == []
    assert crew.running() == [0]
    ask(crew)
    assert crew.supervisor.berths[0].silent_at is None  # the time counts from its start


def test_a_leaver_that_is_silent_is_ended_and_not_replaced(crew):
    crew.scale(1)
    crew.scale(0)
    ask(crew, silent=(0,))
    crew.clock.now += 1.0
    (death,) = crew.await_deaths()
    assert (death.expected, death.restart_in_s) == (True, None)
    assert crew.supervisor.berths == []


def test_a_standstill_counts_as_if_it_had_died_at_once(crew):
    """With a lease of 20 s and a window of 60 s it would come to no more than four deaths, and go on for ever."""
    crew.scale(1)
    for count in range(1, 7):
        ask(crew, present=(0,))
        crew.clock.now += LEASE_S + 0.1
        ask(crew)
        crew.clock.now += 1.0
        (death,) = crew.await_deaths()
        assert death.loop == ("actor 0" if count == 6 else "")
        if not death.loop:
            crew.restart()


@pytest.fixture
def boxed(crew) -> Crew:
    """Actors that say what they do."""
    crew.boxed = True
    return crew


def note(crew: Crew, index: int, world: int, answered: int = 0) -> None:
    """What an actor would say of itself."""
    box = crew.child(index).black_box
    box.rest(answered)
    if world >= 0:
        box.note(world, 30, 28, 4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_did_well_and_was_ended_from_outside_may_be_so_as_often_as_one_likes(boxed, number):
    boxed.scale(1)
    for count in range(8):
        note(boxed, 0, world=count % 2, answered=1)
        death = boxed.die(0, number)
        assert (death.loop, death.restart_in_s) == ("", FIRST_PAUSE_S)
        boxed.restart()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_who_is_killed_before_it_answered_anything_or_of_itself_is_counted(boxed, number):
    boxed.scale(1)
    for _ in range(5):
        note(boxed, 0, world=-1, answered=int(number == signal.SIGSEGV))
        assert boxed.die(0, number).loop == ""
        boxed.restart()
    assert boxed.die(0, number).loop == "actor 0"


def test_a_world_that_kills_whoever_has_it_is_a_loop(boxed):
    """It moves on to another actor each time, so that none of them dies often."""
    boxed.scale(3)
    for count in range(5):
        note(boxed, count % 3, world=7, answered=9)
        death = boxed.die(count % 3, signal.SIGSEGV)
        assert death.loop == ""
        boxed.restart()
    note(boxed, 2, world=7, answered=9)
    death = boxed.die(2, signal.SIGSEGV)
    assert (death.loop, death.restart_in_s) == ("the actor that had world 7", None)


@pytest.mark.parametrize(("actors", "loop"), [(1, "actor 0"), (3, "the actor that had world 7")])
def test_a_world_in_which_whoever_has_it_stands_still_is_a_loop(boxed, actors, loop):
    """Though it is we who kill it, and it had answered before."""
    boxed.scale(actors)
    everybody = set(range(actors))
    for count in range(6):
        index = count % actors
        note(boxed, index, world=7, answered=9)
        boxed.clock.now += LEASE_S
        ask(boxed, present=tuple(everybody - {index}), silent=(index,))
        boxed.clock.now += 1.0
        (death,) = boxed.await_deaths()
        assert death.index == index
        assert death.loop == (loop if count == 5 else "")
        if not death.loop:
            boxed.restart()


def test_deaths_with_different_worlds_are_no_loop(boxed):
    boxed.scale(4)
    for count in range(12):
        note(boxed, count % 4, world=count % 4 + 10 * (count // 4), answered=9)
        assert boxed.die(count % 4, signal.SIGSEGV).loop == ""
        boxed.restart()


def test_who_waited_for_tickets_had_no_world(boxed):
    boxed.scale(3)
    for count in range(9):
        note(boxed, count % 3, world=-1, answered=9)
        assert boxed.die(count % 3, signal.SIGSEGV).loop == ""
        boxed.restart()


def test_a_record_says_world_and_seed(boxed):
    boxed.scale(1)
    note(boxed, 0, world=7)
    death = boxed.die(0, signal.SIGSEGV)
    text = death.record.read_text()
    assert "world 7 was in env step 4 of the unroll for batch 30\nits seed: (5, 7, 28)" in text
    assert "world 7 was in env step 4" in death.cause
    assert "its seed" not in death.cause  # which is for the record
