"""However a run ends, everything is down in time, nothing is left, and the exit code says how."""

from __future__ import annotations

import signal
import time

import pytest
from clusters import SMALL, poll, verb

ENDLESS = ("train", "cartpole", "--actors", "2", "--total-steps", "1000000000", *SMALL)
GRACE_S = 5.0
SLACK_S = 3.0  # for this machine to schedule what the grace does not cover: interpreter start and exit


@pytest.mark.parametrize(
    ("number", "expected", "settings", "version"),
    [
        (signal.SIGINT, 130, (), 3),
        (signal.SIGTERM, 143, ("--set", "ppo.epochs=1000", "--set", "ppo.minibatch_size=1"), 1),
    ],
    ids=["interrupt", "terminate in a long update"],
)
def test_a_signal_ends_the_run_after_a_last_checkpoint(start, number, expected, settings, version):
    cluster = start(*ENDLESS, *settings)
    cluster.await_version(version)
    cluster.process.send_signal(number)
    started = time.monotonic()
    code, _, err = cluster.wait()
    assert code == expected, err
    assert time.monotonic() - started < GRACE_S + SLACK_S
    cluster.assert_gone()
    last = cluster.rows()[-1]["policy_version"]
    assert (cluster.run / "checkpoints" / f"{last:09d}").exists()
    assert (cluster.run / "policy.safetensors").exists()


def test_a_second_interrupt_ends_the_run_at_once(start):
    cluster = start(*ENDLESS, "--set", "batch.unroll_length=4096", "--set", "cluster.stop_s=60")
    poll(lambda: cluster.children("rustyrl_learner") and (cluster.run / "cluster.json").exists(), "a learner")
    poll(lambda: b'"running"' in (cluster.run / "cluster.json").read_bytes(), "running")
    (learner,) = cluster.children("rustyrl_learner")
    learner.suspend()  # the first interrupt asks it to save what it has, and waits for that

    def insist() -> bool:  # two signals of a kind that are sent together may arrive as one
        cluster.process.send_signal(signal.SIGINT)
        return cluster.process.poll() is not None

    poll(insist, "the end")
    assert cluster.wait()[0] in (130, -signal.SIGINT)  # the latter if one hits the interpreter on its way out
    assert not list(cluster.run.glob("checkpoints/*"))  # nobody was asked to save anything
    cluster.assert_gone()


def test_stopping_before_the_learner_is_up_leaves_nothing(start):
    cluster = start(*ENDLESS)
    poll(lambda: cluster.children("rustyrl_learner"), "a learner process")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.wait()[0] == 130
    cluster.assert_gone()


def test_nothing_survives_a_killed_launcher(start):
    cluster = start(*ENDLESS)
    cluster.await_version(2)
    poll(lambda: list(cluster.run.glob("checkpoints/[0-9]*")), "a checkpoint")
    cluster.process.kill()
    cluster.process.wait(10)
    poll(lambda: not cluster.orphans(), "no orphans", 10.0)
    again = start("train", "--resume", "--set", "run.eval_episodes=5", "--total-steps", "1", run=cluster.run)
    code, out, err = again.wait()  # the folder is free again, its stale sockets are no obstacle
    assert code == 0, err
    assert "4 of 4 worlds begin new episodes: at a policy lag of 1 worlds run ahead of checkpoints" in out


@pytest.mark.faults
def test_a_learner_that_keeps_dying_ends_the_run_with_the_cause(start):
    cluster = start(*ENDLESS, "--set", "cluster.restarts=1")
    cluster.await_version(2)
    for incarnation in range(2):  # of a cause of its own: who is killed from outside may be so more often
        poll(lambda n=incarnation: verb(cluster, "status")["learner"]["incarnation"] == n, "the next learner")
        poll(lambda: verb(cluster, "status")["state"] == "running", "it to listen")
        cluster.children("rustyrl_learner")[0].send_signal(signal.SIGSEGV)
    code, _, err = cluster.wait()
    assert code == 1
    assert "the learner died 2 times within 60 s; at last, " in err
    assert "ended with signal 11 (SIGSEGV)" in err
    cluster.assert_gone()
