"""A run from start to end through real processes: what it writes, what it says, what it leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import SMALL, Cluster, rustyrl

from rustyrl import configure, perceptron, train
from rustyrl.errors import UsageError
from rustyrl.weights import read_policy

BUDGET = ("--total-steps", "2000", "--set", "run.eval_episodes=40", *SMALL)
KEEP = ("--set", "run.checkpoint_every=2", "--set", "run.checkpoints_kept=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[tuple[Cluster, dict, str]]:
    """A short run at lag 0 with three actors that has ended well: the cluster, its summary, its standard error."""
    folder = tmp_path_factory.mktemp("finished")
    run = folder / "run"
    cluster = Cluster(
        run,
        ["train", "cartpole", "--actors", "3", *BUDGET, *KEEP, "--max-policy-lag", "0", "--json", "--run", str(run)],
        folder,
    )
    code, out, err = cluster.wait()
    assert code == 0, err
    yield cluster, json.loads(out), err
    cluster.kill()


def test_train_writes_the_run_folder_and_prints_one_json_object(finished):
    cluster, summary, _ = finished
    assert {"env", "run", "steps", "seconds", "trained_sps", "policy_version", "stopped_by", "bottleneck", "eval"} <= (
        summary.keys()
    )
    assert (summary["env"], summary["stopped_by"]) == ("cartpole", "total_steps")
    assert summary["steps"] >= 2000
    assert summary["eval"]["episodes"] == 40
    assert summary["findings"] == []
    assert summary["device"] == "cpu"
    assert summary["threads"]["lanes"] in (1, 2)
    assert summary["threads"]["compiled"] == perceptron.COMPILED
    assert summary["threads"]["of"] >= 1
    assert json.loads((cluster.run / "summary.json").read_text()) == summary
    names = {path.name for path in cluster.run.iterdir()}
    assert {"config.toml", "metrics.jsonl", "checkpoints", "spec.json", "policy.safetensors", "logs"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (cluster.run / "cluster.json").stat().st_mode & 0o777 == 0o600
    cluster.assert_gone()


def test_every_recorded_name_is_documented(finished):
    names = set(re.findall(r"`([^`]+)`", (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()))
    rows = finished[0].rows()
    assert {"policy_loss", "explained_variance", "return_p90"} <= rows[-1].keys()
    groups = {name.partition("/")[0] for name in names if "/" in name}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict):
                assert name in groups
                assert name == "lag_steps" or value.keys() <= names
            else:
                assert name in names


def test_the_newest_checkpoints_are_kept(finished):
    cluster = finished[0]
    kept = sorted(int(path.name) for path in (cluster.run / "checkpoints").iterdir())
    assert len(kept) == 2
    assert kept[-1] == cluster.rows()[-1]["policy_version"]


def test_eval_repeats_itself_and_depends_on_its_seed(finished):
    first, again, other = (
        rustyrl("eval", str(finished[0].run), "--episodes", "30", "--seed", seed, "--json")[1]
        for seed in ("1", "1", "2")
    )
    assert json.loads(first)["episodes"] == 30
    assert first == again
    assert first != other


def test_every_ticket_is_accounted_for_at_exit(finished):
    tickets = finished[1]["tickets"]
    rejected = sum(tickets["rejected"].values())
    assert tickets["rejected"] == {"warm-up": 3}  # the normaliser's first batch, one answer an actor
    assert tickets["issued"] == tickets["trained"] + rejected + tickets["lost"] + tickets["outstanding"]
    assert tickets["lost"] == 0


def test_first_minibatch_is_on_policy_at_lag_0(finished):
    trained = [row for row in finished[0].rows() if "first_ratio_error" in row]
    assert len(trained) > 5
    assert max(row["first_ratio_error"] for row in trained) < 1e-4


def test_metrics_have_stable_names_and_stage_times(finished):
    row = finished[0].rows()[-1]
    assert {
        "policy_version", "steps", "seconds", "trained_sps", "return_mean", "length_mean", "policy_loss", "value_loss",
        "entropy", "approx_kl", "clip_fraction", "gradient_norm", "learning_rate", "first_ratio_error",
    } <= row.keys()  # fmt: skip
    assert {"wait", "batch", "advantages", "update", "normalize", "export", "publish"} <= row["learner_s"].keys()
    assert {"act", "step", "encode", "send", "wait"} <= row["actor_s"].keys()


def test_a_pipe_gets_plain_lines_with_progress(finished):
    shown = finished[2]  # with --json, standard output is the object's alone
    assert "trained SPS" in shown
    assert "policy version" in shown
    assert "\x1b" not in shown


def test_a_budget_is_used_up_although_the_world_has_a_goal(start):
    cluster = start(
        "train", "cartpole", "--actors", "1", "--total-steps", "1500", "--json", *SMALL,
        "--set", "run.eval_every=1", "--set", "run.eval_episodes=5",
    )  # fmt: skip
    code, out, err = cluster.wait()
    assert code == 0, err
    assert json.loads(out)["stopped_by"] == "total_steps"
    assert "evaluation" not in err.replace("evaluating", "")


def test_a_refused_resume_changes_nothing(finished, tmp_path):
    copy = shutil.copytree(finished[0].run, tmp_path / "copy")
    before = {name: (copy / name).read_bytes() for name in ("config.toml", "spec.json", "cluster.json")}
    for change, said in (
        ("env.force_n=5", "resume with the same environment"),
        ("policy.hidden=[8]", "policy.hidden was (64, 64)"),
    ):
        code, _, err = rustyrl("train", "--resume", "--run", str(copy), "--set", change)
        assert code == 2
        assert said in err
    assert before == {name: (copy / name).read_bytes() for name in before}


def test_resume_goes_on_from_the_checkpoint_without_doubles(start, finished, tmp_path):
    copy = shutil.copytree(finished[0].run, tmp_path / "copy")
    before = finished[0].rows()
    again = start("train", "--resume", "--total-steps", "3000", "--json", run=copy)
    code, out, err = again.wait()
    assert code == 0, err
    assert json.loads(out)["steps"] >= 3000
    assert "changed: run.total_steps is 3000 and was 2000" in err
    assert "with the running episodes of all worlds (4)" in err
    assert json.loads(out)["worlds_restarted"] == 0
    rows = again.rows()
    assert rows[: len(before)] == before
    versions = [row["policy_version"] for row in rows]
    assert versions == list(range(1, len(rows) + 1))
    assert rows[len(before)]["steps"] > before[-1]["steps"]


def test_a_damaged_newest_checkpoint_is_skipped_on_resume(start, finished, tmp_path):
    copy = shutil.copytree(finished[0].run, tmp_path / "copy")
    newest = max((copy / "checkpoints").iterdir())
    blob = bytearray((newest / "learner.safetensors").read_bytes())
    blob[len(blob) // 2] ^= 1
    (newest / "learner.safetensors").write_bytes(bytes(blob))
    again = start("train", "--resume", "--total-steps", "2500", run=copy)
    assert again.wait()[0] == 0
    log = (copy / "logs" / "learner.log").read_text()
    assert f"{newest.name} " in log
    assert "trying the one before" in log
    assert again.rows()[-1]["steps"] >= 2500


def test_init_takes_the_policy_and_normaliser_of_another_run(start, finished):
    policy = finished[0].run / "policy.safetensors"
    second = start(
        "train", "cartpole", "--actors", "1", "--total-steps", "1", "--init", str(policy), *SMALL,
        "--set", "run.eval_episodes=5",
        "--set", "ppo.learning_rate=1e-12", "--set", "ppo.min_learning_rate=1e-12", "--set", "ppo.schedule=constant",
    )  # fmt: skip
    assert second.wait()[0] == 0
    ours, theirs = read_policy(policy), read_policy(second.run / "policy.safetensors")
    assert abs(ours.arrays["policy.0.weight"] - theirs.arrays["policy.0.weight"]).max() < 1e-6
    assert theirs.arrays["normalizer.count"] > ours.arrays["normalizer.count"]
    assert not [row for row in second.rows() if "policy_loss" not in row]  # no warm-up batch: it was initialised


def test_a_script_trains_as_the_command_does(tmp_path):
    layers = {
        "run": {"seed": 2, "env": "cartpole", "total_steps": 500, "eval_episodes": 5},
        "env": {"slots": 4},
        "batch": {"worlds": 2, "unroll_length": 16},
        "cluster": {"actors": 1},
    }
    config, _ = configure(layers)
    summary = train(config, tmp_path / "run")
    assert summary["steps"] >= 500
    assert (tmp_path / "run" / "policy.safetensors").exists()
    with pytest.raises(UsageError, match="holds a run already"):
        train(config, tmp_path / "run")


def test_reaching_the_goal_ends_the_run_with_the_confirmed_policy(start):
    cluster = start(
        "train",
        "cartpole",
        "--actors",
        "2",
        "--stop-at",
        "return_mean>=30",
        "--json",
        "--set",
        "run.eval_every=2",
        *SMALL,
    )
    code, out, err = cluster.wait()
    assert code == 0, err
    summary = json.loads(out)
    assert summary["stopped_by"] == "goal"
    confirmed = cluster.run / "checkpoints" / f"{summary['policy_version']:09d}" / "policy.safetensors"
    assert confirmed.read_bytes() == (cluster.run / "policy.safetensors").read_bytes()
    code, out, _ = rustyrl("eval", str(cluster.run), "--episodes", "50", "--json")
    assert code == 0
    assert json.loads(out)["return_mean"] >= 25
