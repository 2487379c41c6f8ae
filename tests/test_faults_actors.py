"""Actors that are killed, stopped, stuck, slow or ended by their world: training goes on, or ends with the cause."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from clusters import (
    ENDLESS,
    await_learner,
    await_more,
    await_status,
    contributing,
    end,
    poll,
    stopped,
    verb,
)

from rustyrl.control import ControlClient

TWO = (*ENDLESS, "--actors", "2")
AGAIN = ("--set", "cluster.restarts=100")


@pytest.fixture
def deeds(tmp_path) -> Path:
    """A folder: a file in it has a world do what it is named for, see worlds/counting.py."""
    folder = tmp_path / "deeds"
    folder.mkdir()
    return folder


def records(cluster) -> list[str]:
    """What was kept of every death."""
    return [path.read_text() for path in sorted((cluster.run / "logs" / "crashes").glob("*"))]


def newest_record(cluster) -> str:
    return max((cluster.run / "logs" / "crashes").iterdir(), key=lambda path: path.stat().st_mtime_ns).read_text()


def actors(cluster) -> list[psutil.Process]:
    """The actor processes that run."""
    return [p for p in cluster.children("rustyrl_actors") if p.status() != psutil.STATUS_ZOMBIE]


def pids(status) -> dict[int, int]:
    return {actor["index"]: actor["pid"] for actor in status["actors"]}


def both(status) -> bool:
    """Two actors contribute, and have the worlds between them."""
    return contributing(status) == {0: 2, 1: 2}


LONG = (pytest.mark.faults, pytest.mark.timeout(900))


@pytest.mark.parametrize(
    ("actor_deaths", "learner_deaths", "seed"),
    [
        pytest.param(3, 1, 1, id="short"),
        pytest.param(50, 0, 2, id="50 actors", marks=LONG),
        pytest.param(12, 5, 3, id="12 actors and 5 learners", marks=LONG),
    ],
)
def test_training_goes_on_however_often_its_processes_are_killed(start, actor_deaths, learner_deaths, seed):
    cluster = start(*TWO, *AGAIN)
    cluster.await_version(1)
    await_status(cluster, both, "both actors")
    before = cluster.descriptors()
    chance = random.Random(seed)
    kinds = ["actor"] * actor_deaths + ["learner"] * learner_deaths
    chance.shuffle(kinds)
    learners = 0
    for kind in kinds:
        if kind == "learner":
            status = await_learner(cluster, learners)
            psutil.Process(status["learner"]["pid"]).kill()
            learners += 1
            await_status(cluster, lambda status, n=learners: status["learner"]["incarnation"] == n, "another learner")
        else:
            victim = poll(lambda: actors(cluster), "an actor")[0]  # it may still be starting
            victim.kill()
            victim.wait(60)
        threading.Event().wait(chance.random())  # the moments of the next are random
    await_learner(cluster, learners)
    await_status(cluster, both, "both actors again")
    await_more(cluster, 3)
    poll(lambda: cluster.descriptors() <= before, f"no more than {before} descriptors")
    status = verb(cluster, "status")
    assert status["actor_restarts"] == actor_deaths
    assert status["learner"]["restarts"] == learner_deaths
    summary, err = end(cluster)
    assert [before["incarnation"] for before in summary["tickets_before"]] == list(range(learner_deaths))
    assert summary["learner_restarts"] == learner_deaths
    assert len([text for text in records(cluster) if text.startswith("actor ")]) == actor_deaths
    assert len([text for text in records(cluster) if text.startswith("learner")]) == learner_deaths
    versions = [row["policy_version"] for row in cluster.rows()]
    assert versions == list(range(1, len(versions) + 1))  # no update is missing, none stands there twice
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "stuck", [{"spin": "in spin_for_ever"}, pytest.param({"sleep": "in do\n", "spin": "in spin_for_ever"}, marks=LONG)]
)
def test_a_world_that_is_stuck_is_found_explained_and_replaced_but_a_slow_one_is_left_alone(start, deeds, stuck):
    (deeds / "slow-1600@w3").touch()  # each step takes longer than half a lease
    cluster = start(*TWO, "--set", f"env.deeds={deeds}", "--set", "cluster.lease_s=3", "--set", "batch.unroll_length=3")
    status = await_status(cluster, both, "both actors")
    assert [actor["restarts"] for actor in status["actors"]] == [0, 0]
    (deeds / "slow-1600@w3").unlink()
    for restarts, (deed, frame) in enumerate(stuck.items(), 1):
        (deeds / deed).touch()
        poll(lambda restarts=restarts: len(records(cluster)) == restarts, "a record")
        status = await_status(cluster, both, "both to contribute")
        assert sum(actor["restarts"] for actor in status["actors"]) == restarts
        text = newest_record(cluster)
        assert "was killed: it had given no sign of life for 3 s" in text
        found = re.search(
            r"world (\d) was in env step (\d) of the unroll for batch \d+\nits seed: \(1, (\d), \d+\)", text
        )
        assert found is not None
        assert found[1] == found[3]
        assert int(found[2]) < 3
        assert "last action, part 'main', slots 0 to 3:\n[" in text
        assert frame in text  # the stack, to where it stands
    await_more(cluster, 3)
    _, err = end(cluster)
    assert "was killed: it had given no sign of life for 3 s" in err
    assert len(records(cluster)) == len(stuck)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("exit-7", "ended with code 7"),
        ("exit-0", "ended with code 0"),
        ("leave-0", "ended with code 0"),
        ("segfault", "ended with signal 11 (SIGSEGV)"),
        ("raise", "ended with code 1"),
    ],
)
def test_whatever_way_a_world_ends_its_process_another_takes_its_place(start, deeds, deed, how):
    cluster = start(*TWO, "--set", f"env.deeds={deeds}")
    await_status(cluster, both, "both actors")
    (deeds / deed).touch()
    poll(lambda: not list(deeds.iterdir()), "the deed")
    poll(lambda: records(cluster), "a record")
    await_status(cluster, lambda status: both(status) and status["actor_restarts"] == 1, "another in its place")
    await_more(cluster, 3)
    (text,) = records(cluster)
    assert how in text
    assert "was in env step" in text
    assert ("in do" in text) == (deed in ("segfault", "raise"))
    _, err = end(cluster)
    assert how in err


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, 3])
def test_a_world_that_always_raises_ends_the_run_with_its_traceback(start, deeds, count):
    cluster = start(*ENDLESS, "--actors", str(count), "--set", f"env.deeds={deeds}")
    await_status(cluster, lambda status: len(contributing(status)) == count, "every actor")
    (deeds / "raise@w2").touch()
    code, _, err = cluster.wait()
    assert code == 1
    who = "actor 0" if count == 1 else "the actor that had world 2"
    assert f"error: {who} died 6 times within 60 s; at last, " in err
    assert "ZeroDivisionError: the world of the test fell over" in err.partition("at last, ")[2]
    assert len(records(cluster)) == 6
    cluster.assert_gone()


@pytest.mark.faults
def test_a_stopped_actor_holds_training_up_and_nothing_is_lost(start):
    cluster = start(*TWO, "--set", "cluster.lease_s=60")
    status = await_status(cluster, both, "both actors")
    before = pids(status)
    with stopped(psutil.Process(before[1])):
        held = await_status(
            cluster, lambda status: [a["owes_s"] > 5 and a["holds"] for a in status["actors"]] == [False, True], "5 s"
        )
        again = verb(cluster, "status")
        assert again["learner"]["version"] == held["learner"]["version"]
    await_more(cluster, 3)
    status = verb(cluster, "status")
    assert pids(status) == before
    assert (status["tickets"]["lost"], status["actor_restarts"]) == (0, 0)
    end(cluster)


@pytest.mark.faults
def test_an_actor_a_hundred_times_slower_is_named_and_can_be_relieved(start, deeds):
    cluster = start(*TWO, "--set", f"env.deeds={deeds}", "--set", "env.sleep_ms=2")
    status = await_status(cluster, both, "both actors")
    slow = pids(status)[1]
    (deeds / f"slow-200@p{slow}").touch()
    status = await_status(
        cluster, lambda status: [a["holds"] and a["owes_s"] > 2 for a in status["actors"]] == [False, True], "its name"
    )
    assert not status["actors"][0]["holds"]
    answer = ask(cluster, {"kind": "relieve", "index": 1})
    assert answer == {"index": 1, "worlds": 2}
    status = await_status(cluster, lambda status: contributing(status).get(0) == 4, "the other to have every world")
    assert (status["actors"][1]["worlds"], status["actors"][1]["relieved"]) == (0, True)
    lost = status["tickets"]["lost"]
    assert 1 <= lost <= 2  # what it had not answered
    await_more(cluster, 20)
    status = verb(cluster, "status")
    assert pids(status)[1] == slow
    assert status["tickets"]["lost"] == lost
    assert "error" in ask(cluster, {"kind": "relieve", "index": 0})  # nobody else is left
    assert "error" in ask(cluster, {"kind": "relieve", "index": 7})
    end(cluster)


def ask(cluster, request):
    """What the launcher answers to a request that has no verb yet."""
    address = json.loads((cluster.run / "cluster.json").read_text())["control"]
    with ControlClient(address) as control:
        return control.request(request, 30.0)


@pytest.mark.faults
def test_an_actor_that_joined_by_hand_outlives_the_learner_and_its_end_is_noticed(start):
    cluster = start(*ENDLESS, "--actors", "1", "--listen", "tcp://127.0.0.1:0", "--set", "cluster.lease_s=300")
    cluster.await_version(1)
    link = json.loads((cluster.run / "cluster.json").read_text())["link"]
    command = [sys.executable, "-c", "from rustyrl.main import main; main()", "actor", "--join", link]
    guest = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        shared = {0: 2, 1000: 2}
        status = await_status(cluster, lambda status: contributing(status) == shared, "the guest")
        psutil.Process(status["learner"]["pid"]).kill()
        await_learner(cluster, 1)
        await_status(cluster, lambda status: contributing(status) == shared, "the guest to come back")
        verb(cluster, "scale", "3")
        status = await_status(cluster, lambda status: len(contributing(status)) == 4, "four")
        assert pids(status)[1000] == guest.pid
        verb(cluster, "scale", "0")
        await_status(cluster, lambda status: contributing(status) == {1000: 4}, "the guest to have every world")
        verb(cluster, "scale", "1")
        await_status(cluster, lambda status: sorted(contributing(status).values()) == [2, 2], "two")
        verb(cluster, "pause")  # so that no ticket for it finds out
        guest.send_signal(signal.SIGKILL)
        guest.wait(10)
        await_status(cluster, lambda status: 1000 not in contributing(status), "its end to be noticed", 30.0)
        verb(cluster, "unpause")
        await_more(cluster, 3)
        assert verb(cluster, "status")["tickets"]["lost"] <= 2
        end(cluster)
    finally:
        guest.kill()
        guest.wait(10)


@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="limits of memory as Linux has them")
def test_an_actor_that_runs_into_its_limit_of_memory_is_replaced(start, deeds):
    cluster = start(*TWO, "--set", f"env.deeds={deeds}")
    status = await_status(cluster, both, "both actors")
    process = psutil.Process(pids(status)[0])
    room = process.memory_info().vms + (64 << 20)
    process.rlimit(psutil.RLIMIT_AS, (room, room))
    (deeds / f"hoard-16@p{process.pid}").touch()
    await_status(cluster, lambda status: both(status) and status["actor_restarts"] == 1, "another in its place")
    await_more(cluster, 3)
    (text,) = records(cluster)
    assert "MemoryError" in text or "memory" in text
    end(cluster)
