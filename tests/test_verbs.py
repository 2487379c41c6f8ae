"""The verbs that look at things, and the two roles started by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import zmq
from clusters import SMALL, poll, rustyrl
from typer.testing import CliRunner

from rustyrl.cli import app


def test_envs_lists_the_built_in_environments():
    code, out, _ = rustyrl("envs", "--json")
    assert code == 0
    rows = json.loads(out)["envs"]
    assert [row["env"] for row in rows] == ["cartpole", "cartpole-object", "drone", "drone-object", "drone-windy"]
    assert {row["env"]: row["spec"]["action"][0]["shape"] for row in rows}["drone"] == [4]
    assert "drone" in rustyrl("envs")[1]


def test_doctor_finds_nothing_wrong_here():
    code, out, err = rustyrl("doctor", "--json")
    report = json.loads(out)
    assert code == 0, (report["problems"], err)
    assert report["problems"] == []
    assert report["packages"]["pyzmq"] != "missing"
    assert report["cores"] >= 1


def test_every_verb_has_help_with_an_example_or_options():
    for verb in ("train", "learner", "actor", "status", "top", "scale", "stop", "runs", "eval", "envs", "doctor"):
        shown = CliRunner().invoke(app, [verb, "--help"])
        assert shown.exit_code == 0
        assert f"{verb} [OPTIONS]" in shown.output
        assert verb != "train" or "rustyrl train drone" in shown.output


def test_runs_lists_what_ended_and_what_goes_on(start, tmp_path):
    assert json.loads(rustyrl("runs", "--json", cwd=tmp_path)[1]) == {"runs": []}
    run = tmp_path / "runs" / "one"
    cluster = start("train", "cartpole", "--actors", "1", "--total-steps", "100000000", *SMALL, run=run)
    cluster.await_version(1)
    rows = json.loads(rustyrl("runs", "--json", cwd=tmp_path)[1])["runs"]
    assert [(row["env"], row["state"], row["live"]) for row in rows] == [("cartpole", "running", True)]
    status = json.loads(rustyrl("status", "--json", cwd=tmp_path)[1])  # the newest, without --run
    assert {"run", "state", "learner", "actors", "tickets"} <= status.keys()
    assert {"pid", "version", "steps", "trained_sps"} <= status["learner"].keys()
    assert {"index", "pid", "host", "worlds", "sps", "version"} <= status["actors"][0].keys()
    assert {"issued", "trained", "rejected", "lost", "outstanding"} == status["tickets"].keys()
    code, out, err = rustyrl("stop", "--json", cwd=tmp_path)
    assert code == 0, err
    assert '"stopped":true' in out
    assert cluster.wait()[0] == 0
    cluster.assert_gone()
    code, _, err = rustyrl("stop", "--run", str(run))
    assert code == 2
    assert "is over" in err
    rows = json.loads(rustyrl("runs", "--json", cwd=tmp_path)[1])["runs"]
    assert [(row["state"], row["live"]) for row in rows] == [("finished", False)]
    assert rows[0]["summary"]["stopped_by"] == "stop"


def test_learner_and_actors_by_hand_over_tcp(start):
    learner = start(
        "learner",
        "cartpole",
        "--listen",
        "tcp://127.0.0.1:0",
        "--expect",
        "2",
        "--total-steps",
        "2000",
        "--json",
        *SMALL,
    )
    poll(lambda: b'"running"' in _read(learner.run / "cluster.json"), "a listening learner")
    link = json.loads(_read(learner.run / "cluster.json"))["link"]
    assert link.startswith("tcp://127.0.0.1:")
    command = [sys.executable, "-c", "from rustyrl.main import main; main()", "actor", "--join", link]
    actors = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    code, out, err = learner.wait()
    assert code == 0, err
    assert json.loads(out)["steps"] >= 2000
    for actor in actors:
        _, err = actor.communicate(timeout=40)
        assert actor.returncode == 0, err
        assert "the run is over" in err


def test_an_actor_with_another_environment_is_refused(start):
    learner = start("learner", "drone", "--listen", "tcp://127.0.0.1:0", "--total-steps", "2000")
    poll(lambda: b'"running"' in _read(learner.run / "cluster.json"), "a listening learner")
    link = json.loads(_read(learner.run / "cluster.json"))["link"]
    code = (
        "import sys, rustyrl_actors.worlds.drone as drone; drone.OBSERVATION_WIDTH = 21;"
        f"sys.argv = ['x', 'run', '--join', '{link}'];"
        "from rustyrl_actors.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "fingerprint" in done.stderr


def test_garbage_beside_real_actors_is_counted_and_harms_nothing(start):
    cluster = start("train", "cartpole", "--actors", "1", "--total-steps", "100000000", "--json", *SMALL)
    cluster.await_version(1)
    link = json.loads(_read(cluster.run / "cluster.json"))["link"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(link)
        for junk in ([b"x"], [b"x", b"y"], [os.urandom(64), b""], [b""] * 5, [b"\x92\x01\x81\xa4type\xa5lease", b""]):
            stranger.send_multipart(junk)
        version = cluster.rows()[-1]["policy_version"]
        cluster.await_version(version + 3)
        status = json.loads(rustyrl("status", "--run", str(cluster.run), "--json")[1])
    refused = status["wire"]["refused_messages"]
    assert refused["frames"] == 2
    assert refused["malformed"] == 2
    cluster.process.send_signal(signal.SIGTERM)
    code, out, _ = cluster.wait()
    assert code == 143
    tickets = json.loads(out)["tickets"]
    assert tickets["issued"] == (
        tickets["trained"] + sum(tickets["rejected"].values()) + tickets["lost"] + tickets["outstanding"]
    )


def _read(path) -> bytes:
    return path.read_bytes() if path.exists() else b""
