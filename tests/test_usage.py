"""What processes use of the machine, as the machine says it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from rustyrl import usage as module
from rustyrl.processes import available_cores
from rustyrl.usage import FRESH_S, UNKNOWN, Usage

SPINS = "print(flush=True)\nwhile True: pass"


class Clock:
    """Stands for the module ``time``."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def spinner() -> Iterator[int]:
    """A process that wants a whole core, and has had some of it."""
    process = subprocess.Popen([sys.executable, "-S", "-E", "-c", SPINS], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.stdout.close()
    process.wait(10)


def test_of_who_was_not_looked_at_nothing_is_known(clock):
    usage = Usage()
    assert usage.of(os.getpid()) == UNKNOWN
    assert usage.machine() == {}
    assert set(UNKNOWN) == {"cpu_percent", "memory_bytes", "threads"}


def spin(pid: int) -> None:
    """Wait until a process has had a tenth of a second more of a core."""
    started = psutil.Process(pid).cpu_times().user
    while psutil.Process(pid).cpu_times().user < started + 0.1:
        pass


def test_a_process_is_measured_since_the_look_before(clock, spinner):
    usage = Usage()
    spin(spinner)
    usage.look([spinner, os.getpid()])
    assert usage.of(spinner)["cpu_percent"] > 0.0  # since it was started: there is no look before
    spin(spinner)
    clock.now += 1.0
    usage.look([spinner, os.getpid()])
    found = usage.of(spinner)
    assert found["cpu_percent"] > 0.0
    assert found["memory_bytes"] == pytest.approx(psutil.Process(spinner).memory_info().rss, rel=0.5)
    assert found["threads"] == 1
    assert usage.of(os.getpid())["memory_bytes"] > 2 * found["memory_bytes"]


def test_a_moment_later_nothing_is_measured_anew_but_for_who_is_new(clock, spinner, monkeypatch):
    looked: list[int] = []
    measure = Usage._measure
    monkeypatch.setattr(Usage, "_measure", lambda self, pid: looked.append(pid) or measure(self, pid))
    usage = Usage()
    usage.look([spinner])
    clock.now += FRESH_S - 0.01
    usage.look([spinner])
    assert looked == [spinner]
    usage.look([spinner, os.getpid()])
    assert looked == [spinner, spinner, os.getpid()]
    clock.now += FRESH_S
    usage.look([spinner])
    assert looked == [spinner, spinner, os.getpid(), spinner]


def test_who_has_ended_is_unknown_and_is_no_error(clock):
    usage = Usage()
    ended = subprocess.Popen([sys.executable, "-S", "-E", "-c", ""])
    ended.wait(60)
    usage.look([ended.pid, os.getpid()])
    assert usage.of(ended.pid) == UNKNOWN
    assert usage.of(os.getpid()) != UNKNOWN


def test_who_is_not_asked_for_any_more_is_forgotten(clock, spinner):
    usage = Usage()
    usage.look([spinner])
    clock.now += 1.0
    usage.look([])
    assert usage.of(spinner) == UNKNOWN


def test_the_machine_is_described(clock):
    usage = Usage()
    usage.look([])
    machine = usage.machine()
    assert set(machine) == {"cores", "cpu_percent", "load", "memory_bytes", "memory_total_bytes"}
    assert machine["cores"] == available_cores() >= 1
    assert 0 <= machine["cpu_percent"] <= 100
    assert 0 < machine["memory_bytes"] < machine["memory_total_bytes"] == psutil.virtual_memory().total
    assert len(machine["load"]) == 3
