"""A running cluster grows, shrinks and loses actors, and every ticket is accounted for."""

from __future__ import annotations

import psutil
import pytest
from clusters import (
    COUNTING,
    ENDLESS,
    SMALL,
    Cluster,
    await_more,
    await_status,
    contributing,
    end,
    rustyrl,
    verb,
)

from rustyrl.errors import UsageError


def lost(cluster: Cluster) -> int:
    return verb(cluster, "status")["tickets"]["lost"]


def test_a_cluster_is_scaled_while_it_trains_and_loses_nothing(start):
    cluster = start(*ENDLESS, "--actors", "1")
    cluster.await_version(1)
    learner = verb(cluster, "status")["learner"]

    code, out, err = rustyrl("scale", "+2", "--run", str(cluster.run))
    assert (code, out) == (0, "from 1 to 3 actors for 4 worlds\n"), err
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 1, 2: 1}, "three that contribute")

    answer = verb(cluster, "scale", "5")  # more than there are worlds
    assert (answer["before"], answer["actors"], answer["worlds"]) == (3, 5, 4)
    assert (
        answer["note"]
        == "1 of 5 actors will idle: the run has 4 worlds; a run with --set batch.worlds=5 feeds them all"
    )
    status = await_status(cluster, lambda status: sum(actor["ready"] for actor in status["actors"]) == 5, "all five")
    status = await_status(cluster, lambda status: len(contributing(status)) >= 4, "four that contribute")
    assert sum(actor["worlds"] for actor in status["actors"]) == 4
    assert (status["actors_started"], status["actors_alive"], status["actors_wanted"]) == (5, 5, 5)

    for nonsense, said in [
        ("many", "takes a number of actors, or a change like +2 or -1, got 'many'"),
        ("+", "takes a number of actors"),
        ("-99", "-94 actors cannot be had; expected 0 to"),
        ("99999", "99999 actors cannot be had; expected 0 to"),
    ]:
        with pytest.raises(UsageError, match=said.replace("+", r"\+")) as error:
            verb(cluster, "scale", nonsense)
        assert error.value.exit_code == 2
    code, _, err = rustyrl("scale", "many", "--run", str(cluster.run))
    assert code == 2
    assert "error: scale takes a number of actors" in err
    assert "Traceback" not in err

    assert verb(cluster, "scale", "-4")["note"] == ""
    status = await_status(cluster, lambda status: status["actors_started"] == 1, "one that is left")
    assert status["actors_wanted"] == 1
    await_more(cluster, 3)
    status = await_status(cluster, lambda status: contributing(status) == {0: 4}, "it to have every world")

    assert "waits for actors that join by hand, or for scale N" in verb(cluster, "scale", "0")["note"]
    status = await_status(cluster, lambda status: not status["actors_started"] and not status["actors"], "nobody")
    trained = status["learner"]["version"]
    answer = verb(cluster, "scale", "1")
    assert (answer["before"], answer["actors"]) == (0, 1)
    cluster.await_version(trained + 5)

    status = verb(cluster, "status")
    assert status["learner"]["pid"] == learner["pid"]
    assert status["tickets"]["lost"] == 0
    assert status["tickets"]["rejected"].keys() <= {"warm-up"}
    versions = [row["policy_version"] for row in cluster.rows()]
    assert versions == list(range(1, len(versions) + 1))  # one learner, that never went back
    _, err = end(cluster)
    assert "scaled from 3 to 5 actors: 1 of 5 actors will idle" in err
    assert "ended with" not in err
    assert not (cluster.run / "logs" / "crashes").exists()


@pytest.mark.faults
def test_dead_actors_are_replaced_and_only_their_tickets_are_lost(start):
    cluster = start(*ENDLESS, "--actors", "2", "--set", "env.sleep_ms=4", "--max-policy-lag", "1")
    cluster.await_version(2)
    victims = []
    for deaths in range(1, 4):
        status = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both to contribute")
        if deaths == 2:
            assert status["worlds_moved"] == 4  # those of the dead one, to the other and back
        victims.append(status["actors"][0]["pid"])
        psutil.Process(victims[-1]).kill()
        status = await_status(
            cluster,
            lambda status, deaths=deaths: [a["restarts"] for a in status["actors"] if a["ready"]] == [deaths, 0],
            "another in its place",
        )
        assert status["actors"][0]["pid"] not in victims
        assert status["actors_wanted"] == status["actors_alive"] == 2
        assert 0 < status["tickets"]["lost"] <= 2 * deaths  # of each the tickets that were out: lag + 1
    await_more(cluster, 5)
    records = sorted((cluster.run / "logs" / "crashes").iterdir())
    assert len(records) == 3
    for victim in victims:
        (record,) = [path.read_text() for path in records if f"-{victim}." in path.name]
        assert f"actor 0, process {victim}, ended with signal 9 (SIGKILL)" in record
        assert "joined as actor 0" in record  # the end of its log

    before = lost(cluster)
    assert verb(cluster, "scale", "4")["actors"] == 4
    await_status(cluster, lambda status: contributing(status) == {0: 1, 1: 1, 2: 1, 3: 1}, "four that contribute")
    assert lost(cluster) == before
    answer = verb(cluster, "scale", "-2", "--now")
    assert (answer["before"], answer["actors"]) == (4, 2)
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "two that contribute")
    assert lost(cluster) - before <= 2 * 2
    await_more(cluster, 5)
    summary, err = end(cluster)
    assert err.count("ended with signal 9 (SIGKILL)") == 3
    assert "a new one starts in 0.25 s" in err
    assert "ended with signal 15" not in err  # who was sent away is not mourned
    assert len(list((cluster.run / "logs" / "crashes").iterdir())) == 3
    assert summary["stopped_by"] == "terminate"


@pytest.mark.slow
def test_leavers_that_do_not_answer_hold_the_run_up_until_their_lease_is_over(start):
    cluster = start(*ENDLESS, "--actors", "3", "--set", "cluster.lease_s=4", "--set", "env.sleep_ms=4")
    cluster.await_version(1)
    status = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 1, 2: 1}, "all to contribute")
    late, stuck = (psutil.Process(actor["pid"]) for actor in status["actors"][1:])
    late.suspend()
    stuck.suspend()
    assert verb(cluster, "scale", "1")["actors"] == 1
    await_status(cluster, lambda status: contributing(status) == {0: 4}, "the other to have every world")
    await_more(cluster, 5)
    status = verb(cluster, "status")
    assert status["tickets"]["lost"] <= 2 * 2
    assert (status["actors_wanted"], status["actors_started"]) == (1, 3)  # they do not know yet that they are to go
    late.resume()
    await_status(cluster, lambda status: status["actors_started"] == 2, "the late one to be told, and to go")
    assert verb(cluster, "scale", "2")["actors"] == 2
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "another in its place")
    assert stuck.status() == psutil.STATUS_STOPPED
    _, err = end(cluster)  # which kills it
    assert not stuck.is_running()
    assert "ended with" not in err


def test_a_pause_holds_training_and_a_checkpoint_is_written_on_request(start):
    cluster = start("train", COUNTING, "--actors", "1", "--total-steps", "100000000", *SMALL)
    cluster.await_version(2)
    assert verb(cluster, "pause")["state"] == "paused"
    held = verb(cluster, "checkpoint")
    assert (cluster.run / "checkpoints" / f"{held['version']:09d}" / "policy.safetensors").exists()
    assert verb(cluster, "checkpoint")["version"] == held["version"]
    assert verb(cluster, "status")["state"] == "paused"
    assert verb(cluster, "unpause")["state"] == "running"
    cluster.await_version(held["version"] + 2)
    assert verb(cluster, "stop")["stopped"]
    code, _, err = rustyrl("pause", "--run", str(cluster.run))
    assert code == 2
    assert "is over" in err
