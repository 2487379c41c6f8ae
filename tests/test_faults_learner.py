"""Learners that die, stand still or cannot go on: another follows, or the run ends with the cause."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from clusters import (
    COUNTING,
    ENDLESS,
    SMALL,
    assert_balanced,
    await_learner,
    await_more,
    await_status,
    contributing,
    end,
    poll,
    stopped,
    verb,
    words,
)

from rustyrl.control import ControlClient
from rustyrl.errors import UsageError

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

TWO = (*ENDLESS, "--actors", "2")


def learner(cluster) -> psutil.Process:
    return psutil.Process(verb(cluster, "status")["learner"]["pid"])


def kill_learner(cluster) -> None:
    process = learner(cluster)
    process.kill()
    process.wait(30)


def successor(cluster, incarnation: int) -> psutil.Process:
    """The process of the next learner, as soon as there is one."""
    status = await_status(cluster, lambda status: status["learner"]["incarnation"] == incarnation, "another learner")
    return psutil.Process(status["learner"]["pid"])


def checkpoints(cluster) -> list[Path]:
    return sorted((cluster.run / "checkpoints").glob("[0-9]*"))


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(checkpoint: Path) -> None:
    path = checkpoint / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forget(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def test_a_learner_that_finds_its_newest_checkpoint_damaged_begins_with_the_one_before(start):
    cluster = start(*TWO, "--set", "run.checkpoint_every_s=1000000", "--set", "run.checkpoint_every=1000000")
    cluster.await_version(1)
    for incarnation, damage in enumerate([truncate, flip, forget]):
        good = verb(cluster, "checkpoint")["version"]
        await_more(cluster, 5)
        bad = verb(cluster, "checkpoint")["version"]
        assert bad >= good + 5
        with stopped(learner(cluster)):  # so that no newer one is written
            assert checkpoints(cluster)[-1].name == f"{bad:09d}"
            damage(checkpoints(cluster)[-1])
            kill_learner(cluster)
        await_learner(cluster, incarnation + 1)
        err = cluster.said()[1]
        assert f"checkpoint {cluster.run}/checkpoints/{bad:09d} is not whole" in err.replace("\n", "")
        log = (cluster.run / "logs" / "learner.log").read_text()
        assert log.rpartition("resumed from")[2].split("version ")[1].startswith(f"{good}\n")
        assert verb(cluster, "status")["learner"]["restarts"] == incarnation + 1
    with stopped(learner(cluster)):
        found = checkpoints(cluster)
        for checkpoint in found:
            truncate(checkpoint)
        kill_learner(cluster)
    code, _, err = cluster.wait()
    assert code == 1
    assert f"error: none of the {len(found)} checkpoints in {cluster.run}/checkpoints is whole" in err
    assert "last good checkpoint" not in err
    cluster.assert_gone()


def test_checkpoints_written_after_a_damaged_one_was_passed_over_are_kept(start):
    cluster = start(*TWO, "--set", "run.checkpoints_kept=1", "--set", "run.checkpoint_every_s=1000000")
    cluster.await_version(1)
    good = verb(cluster, "checkpoint")
    kept = cluster.run / "kept"
    shutil.copytree(good["checkpoint"], kept)
    await_more(cluster, 200)
    bad = verb(cluster, "checkpoint")["version"]
    with stopped(learner(cluster)):
        truncate(checkpoints(cluster)[-1])
        kept.rename(cluster.run / "checkpoints" / f"{good['version']:09d}")
        kill_learner(cluster)
    await_learner(cluster, 1)
    written = verb(cluster, "checkpoint")
    assert written["version"] < bad
    assert (Path(written["checkpoint"]) / "manifest.json").exists()
    kill_learner(cluster)
    await_learner(cluster, 2)
    log = (cluster.run / "logs" / "learner.log").read_text()
    assert int(log.rpartition("resumed from")[2].split("version ")[1].split("\n")[0]) >= written["version"]
    end(cluster)


def test_a_learner_killed_before_its_first_checkpoint_is_followed_by_one_that_starts_anew(start, tmp_path):
    deeds = tmp_path / "deeds"
    deeds.mkdir()
    (deeds / "slow-500@all").touch()
    cluster = start(*TWO, "--set", f"env.deeds={deeds}")
    await_status(cluster, lambda status: len(status["actors"]) == 2 and status["actors"][0]["holds"], "tickets")
    assert not checkpoints(cluster)
    kill_learner(cluster)
    (deeds / "slow-500@all").unlink()
    await_learner(cluster, 1)
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    summary, err = end(cluster)
    assert "another learner starts in 0.25 s, anew: there is no checkpoint yet" in err
    assert "starting anew" in err
    assert summary["actor_restarts"] == 0
    assert cluster.rows()[0]["policy_version"] == 1


def test_a_learner_terminated_from_outside_is_followed_from_exactly_where_it_was(start):
    cluster = start(*TWO)
    known = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    before = [actor["pid"] for actor in known["actors"]]
    learner(cluster).terminate()
    status = await_learner(cluster, 1)
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    assert [actor["pid"] for actor in status["actors"]] == before
    past = status["tickets_before"][0]
    log = (cluster.run / "logs" / "learner.log").read_text()
    assert f"version {past['version']}\n" in log.rpartition("resumed from")[2]
    _, err = end(cluster)
    assert "was told to end by SIGTERM" in err


def test_a_learner_that_stood_still_for_longer_than_a_lease_loses_nobody(start):
    cluster = start(*TWO, "--set", "cluster.lease_s=2")
    before = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    with stopped(psutil.Process(before["learner"]["pid"])):
        await_status(cluster, lambda status: status["learner"]["silent_s"] > 5, "5 s of silence")
    await_more(cluster, 3)
    status = verb(cluster, "status")
    assert [actor["pid"] for actor in status["actors"]] == [actor["pid"] for actor in before["actors"]]
    assert (status["tickets"]["lost"], status["actor_restarts"], status["learner"]["restarts"]) == (0, 0, 0)
    end(cluster)


@pytest.mark.parametrize("attempt", range(3))
def test_an_actor_that_dies_while_the_learner_stands_still_is_replaced_once(start, attempt):
    cluster = start(*TWO)
    before = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    with stopped(psutil.Process(before["learner"]["pid"])):
        victim = psutil.Process(before["actors"][0]["pid"])
        victim.kill()
        log = cluster.run / "logs" / "actor-0.log"
        poll(lambda: [p for p in cluster.children("rustyrl_actors") if "--index 0" in " ".join(p.cmdline())
                      and p != victim and len(p.net_connections("unix"))], "another, that knocks")  # fmt: skip
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both again")
    await_more(cluster, 3)
    assert verb(cluster, "status")["actor_restarts"] == 1, log.read_text()
    end(cluster)


def test_a_candidate_is_judged_to_its_end_though_its_learner_dies(start):
    cluster = start(
        "train", COUNTING, "--actors", "2", "--json", *SMALL, "--stop-at", "return_mean>=-1000000",
        "--set", "run.eval_every=1", "--set", "run.eval_episodes=2000",
    )  # fmt: skip
    judged = poll(lambda: [p for p in cluster.children("rustyrl_actors") if "evaluate" in words(p)], "an evaluation")
    candidate = next(a for a in words(judged[0]) if a.endswith("policy.safetensors"))
    with stopped(judged[0]):
        content = Path(candidate).read_bytes()
        kill_learner(cluster)
        await_status(cluster, lambda s: s["state"] == "running" and s["learner"]["incarnation"] == 1, "another learner")
    code, out, err = cluster.wait()
    assert code == 0, err
    summary = json.loads(out)
    assert summary["stopped_by"] == "goal"
    assert (cluster.run / "policy.safetensors").read_bytes() == content
    assert_balanced(summary)
    assert summary["learner_restarts"] == 1
    cluster.assert_gone()


def test_a_pause_outlives_the_learner(start):
    cluster = start(*TWO)
    cluster.await_version(2)
    assert verb(cluster, "pause")["state"] == "paused"
    version = verb(cluster, "checkpoint")["version"]
    kill_learner(cluster)

    def back(status) -> bool:
        learner = status["learner"]
        return learner["incarnation"] == 1 and status["state"] == "paused" and len(status["actors"]) == 2

    await_status(cluster, back, "the next, paused")
    for _ in range(2):
        assert verb(cluster, "checkpoint")["version"] == version
    status = verb(cluster, "status")
    assert (status["state"], status["tickets"]["trained"]) == ("paused", 0)
    verb(cluster, "unpause")
    await_more(cluster, 3)
    end(cluster)


def test_verbs_are_answered_while_there_is_no_learner(start):
    cluster = start(*TWO)
    cluster.await_version(2)
    kill_learner(cluster)
    with stopped(successor(cluster, 1)):
        status = await_status(cluster, lambda status: status["state"] == "recovering", "recovering")
        assert_balanced(status)
        assert (status["actors"], status["tickets"]["issued"]) == ([], 0)  # nobody has come to it yet
        for words in (("scale", "1"), ("pause",), ("checkpoint",)):
            with pytest.raises(UsageError, match="the run is recovering; it takes that while it is running"):
                verb(cluster, *words)
    await_learner(cluster, 1)
    assert verb(cluster, "scale", "1")["actors"] == 1
    await_status(cluster, lambda status: contributing(status) == {0: 4}, "one")
    end(cluster)


def test_leavers_go_though_the_learner_dies_that_would_have_sent_them_home(start):
    cluster = start(*TWO, "--set", "cluster.lease_s=300")
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    with stopped(learner(cluster)):
        assert verb(cluster, "scale", "1")["actors"] == 1
        kill_learner(cluster)
    await_status(cluster, lambda status: status["actors_started"] == 1, "one to go")
    await_learner(cluster, 1)
    await_status(cluster, lambda status: contributing(status) == {0: 4}, "the other to have every world")
    end(cluster)


def test_an_actor_that_the_next_learner_does_not_know_yet_can_be_scaled_away(start):
    cluster = start(*TWO, "--set", "cluster.lease_s=300", "--set", "cluster.start_deadline_s=300")
    status = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    with stopped(psutil.Process(status["actors"][1]["pid"])):  # it does not come to the next learner
        kill_learner(cluster)
        await_status(
            cluster,
            lambda status: status["state"] == "running" and [a["index"] for a in status["actors"]] == [0],
            "the other one to come",
        )
        assert verb(cluster, "scale", "1")["actors"] == 1
        await_status(cluster, lambda status: status["actors_started"] == 1, "it to go")
    await_status(cluster, lambda status: contributing(status) == {0: 4}, "the other to have every world")
    end(cluster)


def test_the_next_learner_waits_for_every_actor_however_many_have_died(start):
    cluster = start(*TWO, "--set", "cluster.start_deadline_s=600", "--set", "cluster.lease_s=300")
    victims: list[int] = []

    def both(status) -> bool:  # the first of them not one that the learner has yet to miss
        return contributing(status) == {0: 2, 1: 2} and status["actors"][0]["pid"] not in victims

    for _ in range(3):
        victim = psutil.Process(await_status(cluster, both, "both")["actors"][0]["pid"])
        victims.append(victim.pid)
        victim.kill()
        victim.wait(30)
    status = await_status(cluster, both, "both")
    assert status["actor_restarts"] == 3
    with stopped(psutil.Process(status["actors"][1]["pid"])):
        kill_learner(cluster)
        ready = [True, False]
        status = await_status(
            cluster,
            lambda status: (
                status["learner"]["incarnation"] == 1 and [a["ready"] for a in status["actors"]] == ready[:1]
            ),
            "the one that can",
        )
        assert verb(cluster, "checkpoint")  # it is past the first turns of its threads
        assert verb(cluster, "status")["tickets"]["issued"] == 0
    await_status(cluster, lambda status: status["tickets"]["trained"] > 0, "a batch of both")
    summary, _ = end(cluster)
    assert summary["actor_restarts"] == 3


@pytest.mark.parametrize("kills", [1, 2])
def test_a_learner_killed_while_actors_knock_holds_nobody_up(start, kills):
    """Their hello is lost with it: who waits for the answer has to ask again."""
    cluster = start(*TWO)
    cluster.await_version(2)
    kill_learner(cluster)
    for incarnation in range(1, kills + 1):
        process = successor(cluster, incarnation)
        await_status(cluster, lambda status: status["state"] == "running", "it to listen")
        process.kill()
        process.wait(30)
    await_status(
        cluster, lambda s: s["learner"]["incarnation"] == kills + 1 and contributing(s) == {0: 2, 1: 2}, "both", 45.0
    )
    summary, _ = end(cluster)
    assert summary["actor_restarts"] == 0


@pytest.mark.parametrize(
    ("how", "expected", "when"),
    [("interrupt", 130, "down"), ("interrupt", 130, "importing"), ("stop", 0, "down"), ("stop", 0, "importing")],
)
def test_a_run_can_be_stopped_while_there_is_no_learner(start, how, expected, when):
    cluster = start(*TWO)
    cluster.await_version(2)
    await_status(cluster, lambda status: status["tickets"].get("trained"), "an update that the launcher knows of")
    kill_learner(cluster)
    if when == "importing":
        successor(cluster, 1)
    if how == "stop":
        assert verb(cluster, "stop")["stopped"]
    else:
        cluster.process.send_signal(signal.SIGINT)
    code, out, err = cluster.wait(30)
    assert code == expected, err
    summary = json.loads(out)
    assert_balanced(summary)
    assert summary["policy_version"] > 0
    accounts = [summary["tickets"], *(before["tickets"] for before in summary["tickets_before"])]
    assert sum(account["trained"] > 0 for account in accounts) == 1  # what the dead one did is told once
    cluster.assert_gone()


def test_who_asked_for_a_checkpoint_hears_that_the_learner_died(start):
    cluster = start(*TWO)
    cluster.await_version(2)
    process = learner(cluster)
    with stopped(process):
        address = json.loads((cluster.run / "cluster.json").read_text())["control"]
        with ControlClient(address) as asker:
            asker.send({"kind": "checkpoint"})
            verb(cluster, "status")  # it was taken in
            process.kill()
            assert asker.receive(30) == {"error": "the learner died before the checkpoint was written", "failed": True}
    await_learner(cluster, 1)
    with stopped(learner(cluster)):
        with ControlClient(address) as asker:
            asker.send({"kind": "checkpoint"})
            verb(cluster, "status")
            cluster.process.send_signal(signal.SIGTERM)
            answer = asker.receive(30)
            assert answer is not None
            assert "error" in answer
    assert cluster.wait()[0] == 143
    cluster.assert_gone()
