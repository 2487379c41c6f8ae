"""Runs that are interrupted again and again, and stops that come too late for a batch edge."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from clusters import COUNTING, SMALL, await_status, poll, verb
from clusters import WORLDS as WORLDS_FOLDER
from resumes import STATEFUL, assert_same_end, interrupt_at, kill_everything, newest, terminate

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

POINTS = 20
WORLDS = {
    "cartpole": (("cartpole", *SMALL), 256, 0),
    "drone-windy": (("drone-windy", *SMALL), 256, 0),
    "drone-object": (("drone-object", "--set", "batch.worlds=4", "--set", "batch.unroll_length=16",
                      "--set", "env.slots=2"), 128, 0),
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_interrupted_at_20_random_points_a_run_ends_in_the_bits_of_one_that_was_not(start, world):
    arguments, batch, seed = WORLDS[world]
    points = sorted(random.Random(seed).sample(range(2, 200), POINTS))
    steps = str(batch * 250)
    arguments = ("train", *arguments, "--actors", "2", "--total-steps", steps, *STATEFUL, "--set", "ppo.epochs=40")
    arguments += ("--set", "run.checkpoint_every=7", "--set", "run.checkpoints_kept=2")
    straight = start(*arguments)
    code, _, err = straight.wait(240)
    assert code == 0, err
    assert_same_end(straight, interrupt_at(start, arguments, points, seed))


def test_a_stop_too_short_for_the_batch_leaves_the_newest_exact_checkpoint_the_newest(start):
    arguments = ("train", "cartpole", "--actors", "1", "--total-steps", "1000000", *SMALL, *STATEFUL)
    arguments += ("--set", "cluster.stop_s=2", "--set", "run.checkpoint_every_s=1000")
    arguments += ("--set", "ppo.epochs=1000", "--set", "ppo.minibatch_size=1")  # minutes for an update
    cluster = start(*arguments)
    cluster.await_version(1)
    poll((cluster.run / "checkpoints" / "000000001").exists, "the first checkpoint")
    started = time.monotonic()
    terminate(cluster)
    assert time.monotonic() - started < 2 + 3  # the grace, and what it does not cover
    name, files = newest(cluster.run)
    assert (name, "worlds.safetensors" in files) == ("000000001", True)
    assert cluster.rows()[-1]["policy_version"] == 1


def test_a_stop_that_cuts_copies_short_leaves_the_exact_checkpoint_to_go_on_from(start):
    """Some of the four worlds come in time for it, which makes no state that the run was ever in."""
    world = f"{WORLDS_FOLDER}/slow_copies.py:SlowCopies"
    arguments = ("train", world, "--actors", "1", "--total-steps", "1000000000", *SMALL, *STATEFUL)
    cluster = start(*arguments, "--set", "cluster.stop_s=4")
    cluster.await_version(30)
    cluster.process.send_signal(signal.SIGTERM)
    code, _, err = cluster.wait()
    assert code == 143, err
    said = err.replace("\n", " ")
    assert "copying the worlds for a checkpoint is slow" in said
    assert "a resumed run goes on from version 1, the newest exact checkpoint" in said
    name, files = newest(cluster.run)
    assert (name, "worlds.safetensors" in files) == ("000000001", True)
    again = start("train", "--resume", "--json", run=cluster.run)
    poll(lambda: "going on from version 1 with the running episodes of all worlds (4)" in again.said()[1], "the resume")
    terminate(again)


def test_the_end_of_the_budget_is_written_though_copies_take_too_long(start):
    world = f"{WORLDS_FOLDER}/slow_copies.py:SlowFromThenOn"
    arguments = ("train", world, "--actors", "1", "--total-steps", "5000", *SMALL, *STATEFUL)
    cluster = start(*arguments, "--set", "run.checkpoint_every_s=1000", "--set", "run.checkpoint_every=1000000")
    code, out, err = cluster.wait()
    assert code == 0, err
    last = cluster.rows()[-1]["policy_version"]
    name, files = newest(cluster.run)
    assert (int(name), "worlds.safetensors" in files) == (last, False)
    assert json.loads(out)["policy_version"] == last
    assert f"the checkpoint of version {last} lacks worlds" in err.replace("\n", " ")


def test_a_resume_passes_over_the_checkpoint_of_a_paused_run(start):
    arguments = ("train", "cartpole", "--actors", "1", "--total-steps", "1000000000", *SMALL, *STATEFUL)
    arguments += ("--set", "run.checkpoint_every_s=1000", "--set", "run.checkpoint_every=1000000")
    cluster = start(*arguments, "--set", "run.checkpoints_kept=1")
    cluster.await_version(5)
    verb(cluster, "pause")
    await_status(cluster, lambda status: status["state"] == "paused", "the pause")
    paused = verb(cluster, "checkpoint")["version"]
    assert paused > 1
    kill_everything(cluster)
    assert f"the checkpoint of version {paused} lacks worlds" in cluster.said()[1].replace("\n", " ")
    assert int(newest(cluster.run)[0]) == paused
    again = start("train", "--resume", "--json", run=cluster.run)
    poll(lambda: "going on from version 1 with the running episodes of all worlds (4)" in again.said()[1], "the resume")
    again.await_version(paused + 1)
    terminate(again)
    assert "worlds.safetensors" in newest(cluster.run)[1]
    assert [row["policy_version"] for row in again.rows()] == list(range(1, len(again.rows()) + 1))


def test_a_stop_that_gives_up_updates_says_so(start):
    """The actors stand still, so that no batch edge comes; what was trained since is done again on resuming."""
    arguments = ("train", "cartpole", "--actors", "1", "--total-steps", "1000000", *SMALL, *STATEFUL)
    cluster = start(*arguments, "--set", "run.checkpoint_every_s=1000", "--set", "run.checkpoint_every=1000000")
    cluster.await_version(5)
    (actor,) = cluster.children("rustyrl_actors")
    actor.suspend()
    cluster.process.send_signal(signal.SIGTERM)
    code, _, err = cluster.wait()
    assert code == 143, err
    again = cluster.rows()[-1]["policy_version"] - 1
    assert "a resumed run goes on from version 1, the newest exact checkpoint" in err.replace("\n", " ")
    assert f"does {again} updates again, to the same bits" in err.replace("\n", " ")
    assert json.loads((cluster.run / "summary.json").read_text())["policy_version"] == 1
    cluster.assert_gone()


def test_at_lag_1_and_with_worlds_that_cannot_save_everything_else_goes_on(start):
    for env, lag, why in (("cartpole", "1", "at a policy lag of 1"), (COUNTING, "0", "have no save_state")):
        arguments = ("train", env, "--actors", "2", "--json", "--total-steps", "20000", *SMALL)
        cluster = start(*arguments, "--max-policy-lag", lag, "--set", "run.eval_episodes=1")
        cluster.await_version(10)
        kill_everything(cluster)
        before = newest(cluster.run)[0]
        again = start("train", "--resume", "--json", run=cluster.run)
        code, out, err = again.wait()
        assert code == 0, err
        assert f"going on from version {int(before)}; 4 of 4 worlds begin new episodes: " in err
        assert why in err.replace("\n", " ")
        assert json.loads(out)["worlds_restarted"] == 4
        rows = again.rows()
        assert [row["policy_version"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_run_whose_learner_dies_again_and_again_ends_in_the_bits_of_one_whose_did_not(start):
    """The actors live on with worlds that are further than the checkpoint."""
    arguments = ("train", "cartpole", "--actors", "2", "--total-steps", "40000", *SMALL, *STATEFUL)
    arguments += ("--set", "run.checkpoint_every=7")
    straight, cluster = start(*arguments), start(*arguments)
    for version in (5, 40, 90):
        cluster.await_version(version)
        (learner,) = cluster.children("rustyrl_learner")
        learner.kill()
        learner.wait(10)
    for one in (straight, cluster):
        code, out, err = one.wait()
        assert code == 0, err
    assert json.loads(out)["learner_restarts"] == 3
    assert_same_end(straight, cluster)


def test_a_candidate_whose_evaluation_was_killed_with_the_run_is_judged_when_that_goes_on(start):
    cluster = start(
        "train", "cartpole", "--actors", "2", "--json", *SMALL, "--max-policy-lag", "0",
        "--stop-at", "return_mean>=10", "--set", "run.eval_every=1", "--set", "run.eval_episodes=2000",
    )  # fmt: skip
    (judged,) = poll(
        lambda: [p for p in cluster.children("rustyrl_actors") if "evaluate" in p.cmdline()], "an evaluation"
    )
    judged.suspend()
    candidate = Path(next(a for a in judged.cmdline() if a.endswith("policy.safetensors")))
    content = candidate.read_bytes()
    kill_everything(cluster)
    again = start("train", "--resume", "--json", run=cluster.run)
    code, out, err = again.wait()
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["stopped_by"], summary["policy_version"]) == ("goal", int(candidate.parent.name))
    assert (cluster.run / "policy.safetensors").read_bytes() == content


SLOW_DISK = """
import os, time
sync = os.fsync
def slow_sync(descriptor):
    if "/checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(3)
    sync(descriptor)
os.fsync = slow_sync
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are named in /proc")
def test_a_slow_disk_is_said_once_and_training_goes_on(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    arguments = ("train", "cartpole", "--actors", "1", "--total-steps", "1000000000", *SMALL, *STATEFUL)
    cluster = start(*arguments, "--set", "run.checkpoint_every=5", environment={**os.environ, "PYTHONPATH": path})
    poll(lambda: (cluster.run / "checkpoints" / "000000001").exists(), "the first checkpoint")
    cluster.await_version(50)
    poll(lambda: len(list((cluster.run / "checkpoints").glob("[0-9]*"))) == 2, "the second")
    assert cluster.rows()[-1]["policy_version"] > 100
    kill_everything(cluster)
    assert cluster.said()[1].count("the disk is slow: a checkpoint has been written for") == 1
    again = start("train", "--resume", "--json", run=cluster.run)
    poll(lambda: "with the running episodes of all worlds" in again.said()[1], "the resume")
    terminate(again)


def test_a_checkpoint_asked_for_holds_every_world_and_one_of_a_paused_run_none(start):
    arguments = ("train", "cartpole", "--actors", "2", "--total-steps", "1000000000", *SMALL, *STATEFUL)
    cluster = start(*arguments)
    cluster.await_version(3)
    asked = verb(cluster, "checkpoint")["version"]
    held = newest(cluster.run)
    assert (int(held[0]), "worlds.safetensors" in held[1]) == (asked, True)
    verb(cluster, "pause")
    await_status(cluster, lambda status: status["state"] == "paused", "the pause")
    assert verb(cluster, "checkpoint")["version"] >= asked
    terminate(cluster)  # one more update, to an edge
    assert "worlds.safetensors" in newest(cluster.run)[1]
