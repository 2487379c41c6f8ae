"""Presets hold what was published, verdicts follow from scores, and `rustyrl verify` trains for real."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import psutil
import pytest
from clusters import COUNTING, poll
from rich.console import Console
from typer.testing import CliRunner

from rustyrl.cli import app
from rustyrl.config import ActorConfig, BatchConfig, PolicyConfig, PPOConfig
from rustyrl.errors import UsageError
from rustyrl.presets import PRESETS, choose_presets
from rustyrl.trials import Outcome, Trial, plan, read_score, run_trials, trial_config
from rustyrl.verify import check_packages, judge, result_rows
from rustyrl.verify_verb import print_rows

OF_THE_KL_SCHEDULE = {"target_kl", "min_learning_rate", "max_learning_rate"}  # which no preset has
DONE = Outcome(490.0, 500_000, 60.0)


def scored(*scores: float | None) -> dict[int, Outcome]:
    return {
        seed: Outcome(score, 100, 1.0, "" if score is not None else "it died") for seed, score in enumerate(scores, 1)
    }


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_preset_is_a_whole_configuration(preset):
    for lag in (0, 1):
        config = trial_config(Trial(preset, lag, 7), preset.total_steps)
        assert (config.run.env, config.run.seed, config.run.total_steps) == (preset.env, 7, preset.total_steps)
        assert config.batch.max_policy_lag == lag
        assert config.ppo.schedule != "kl"
        assert not config.run.stop_at
    for section, kind, free in (
        ("ppo", PPOConfig, OF_THE_KL_SCHEDULE),
        ("policy", PolicyConfig, set()),
        ("batch", BatchConfig, {"max_policy_lag"}),
        ("actor", ActorConfig, {"poison"}),
    ):
        left = set(kind.__struct_fields__) - set(preset.layer[section]) - free
        assert not left, f"{section}: a published result must not depend on a default of ours"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_preset_says_what_was_published_and_where(preset):
    assert preset.kind in ("training return", "greedy evaluation")
    assert preset.source.startswith(("CleanRL, ", "RL Zoo, "))
    assert (preset.kind == "training return") == preset.source.startswith("CleanRL")
    assert preset.published - preset.published_std <= preset.required or preset.least is not None
    assert preset.required <= preset.published
    assert preset.note


def test_presets_have_the_published_batches():
    def batch(name):
        config = trial_config(Trial(PRESETS[name], 0, 1), 1)
        environments = config.batch.worlds * config.env["slots"]
        return environments, config.batch.unroll_length, config.ppo.minibatch_size, config.ppo.epochs

    assert {name: batch(name) for name in PRESETS} == {
        "cartpole": (4, 128, 128, 4),
        "cartpole-zoo": (8, 32, 256, 20),
        "acrobot": (4, 128, 128, 4),
        "pendulum": (4, 1024, 64, 10),
        "mountaincar": (16, 16, 64, 4),
        "lunarlander": (16, 1024, 64, 4),
        "hopper": (1, 2048, 64, 10),
    }
    versions = {"lunarlander": "v2", "hopper": "v4"}
    assert all(version in PRESETS[name].note for name, version in versions.items())


def test_all_is_every_preset_and_an_unknown_one_is_told_the_nearest():
    assert choose_presets(["all"]) == list(PRESETS.values())
    assert [preset.name for preset in choose_presets(["acrobot", "cartpole", "acrobot"])] == ["cartpole", "acrobot"]
    with pytest.raises(UsageError, match="unknown preset 'cartpol'; did you mean 'cartpole'"):
        choose_presets(["acrobot", "cartpol"])


def test_the_mean_passes_down_to_one_published_deviation_below_the_published_one():
    cartpole = PRESETS["cartpole"]  # 490.0 +- 6.1
    row = judge(cartpole, 1, scored(480.0, 484.0, 488.0))
    assert (row["passed"], row["mean"], row["std"]) == (True, 484.0, 4.0)
    assert row["margin"] == pytest.approx(0.1)
    assert (row["preset"], row["lag"], row["seeds"], row["published"]) == ("cartpole", 1, [1, 2, 3], 490.0)
    assert (row["scores"], row["steps"], row["seconds"]) == ([480.0, 484.0, 488.0], [100] * 3, [1.0] * 3)
    row = judge(cartpole, 1, scored(480.0, 484.0, 487.0))
    assert not row["passed"]
    assert row["margin"] == pytest.approx(-0.2333, abs=1e-3)
    assert judge(cartpole, 1, scored(490.0))["std"] == 0.0
    zoo = PRESETS["cartpole-zoo"]  # published without deviation
    assert judge(zoo, 0, scored(490.0, 500.0))["passed"]
    assert not judge(zoo, 0, scored(489.8, 500.0))["passed"]
    assert judge(PRESETS["acrobot"], 0, scored(-87.6))["passed"]
    assert not judge(PRESETS["acrobot"], 0, scored(-87.8))["passed"]


def test_nothing_passes_with_a_seed_missing_or_fewer_steps_than_published():
    cartpole = PRESETS["cartpole"]
    row = judge(cartpole, 0, scored(500.0, None, 500.0))
    assert (row["passed"], row["mean"]) == (False, 500.0)
    assert row["failures"] == [{"seed": 2, "cause": "it died"}]
    row = judge(cartpole, 0, {1: DONE, 2: None})
    assert (row["passed"], row["failures"]) == (False, [{"seed": 2, "cause": "not finished"}])
    row = judge(cartpole, 0, scored(None))
    assert (row["passed"], row["mean"], row["std"], row["margin"]) == (False, None, None, None)
    row = judge(cartpole, 0, scored(500.0), steps_limit=499_999)
    assert (row["passed"], row["shortened"], row["total_steps"]) == (False, True, 499_999)
    row = judge(cartpole, 0, scored(500.0), steps_limit=600_000)
    assert (row["passed"], row["shortened"], row["total_steps"]) == (True, False, 500_000)


def test_rows_of_an_interrupted_verification_are_those_that_were_begun():
    trials = plan([PRESETS["cartpole"], PRESETS["acrobot"]], [0, 1], [1, 2])
    assert [trial.name for trial in trials[:3]] == ["cartpole-lag0-seed1", "cartpole-lag0-seed2", "cartpole-lag1-seed1"]
    outcomes = {("cartpole", 0, 1): DONE, ("cartpole", 0, 2): DONE, ("cartpole", 1, 1): DONE}
    rows = result_rows(trials, outcomes, None, whole=False)
    assert [(row["preset"], row["lag"], row["passed"]) for row in rows] == [
        ("cartpole", 0, True),
        ("cartpole", 1, False),
    ]
    assert len(result_rows(trials, outcomes, None, whole=True)) == 4


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_says_everything(width):
    rows = [
        judge(PRESETS["mountaincar"], 0, scored(-101.25, -110.5, -99.0)),
        judge(PRESETS["hopper"], 1, {1: Outcome(1200.0, 1_000_000, 5000.0), 2: Outcome(None, cause="Traceback [x]")}),
        judge(PRESETS["cartpole-zoo"], 0, scored(500.0), steps_limit=4096),
        judge(PRESETS["acrobot"], 0, scored(-90.0, -89.0)),
    ]
    output = io.StringIO()
    print_rows(Console(file=output, width=width, emoji=False, highlight=False), rows)
    said = output.getvalue()
    assert all(len(line.rstrip()) <= width for line in said.splitlines())
    assert "…" not in said
    for part in (
        "-103.6",
        "+- 6.1",
        "2: -110.5, 1.0 s",
        "RL Zoo",
        "+- 20.0",
        "Hopper-v4",
        "1 of 2 failed",
        "shortened",
    ):
        assert part in said, part
    assert "Traceback [x]" in said
    words = [line.split() for line in said.splitlines()]
    assert any("mountaincar" in line and line[-1] == "yes" for line in words)
    assert any("acrobot" in line and line[-1] == "no" for line in words)
    assert any("by" in line and "1.8" in line for line in words)  # acrobot falls short of -87.7 by that


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("Box2D", "mujoco") else real(name))
    check_packages([PRESETS["cartpole"], PRESETS["mountaincar"]])
    with pytest.raises(UsageError, match=r"lunarlander: box2d; hopper: mujoco.*pip install 'rustyrl\[verify\]'"):
        check_packages(choose_presets(["all"]))
    done = CliRunner().invoke(app, ["verify", "all", "--runs", str(tmp_path / "runs")])
    assert isinstance(done.exception, UsageError)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there are cartpole, cartpole-zoo, acrobot"),
        (["pendlum"], "did you mean 'pendulum'"),
        (["cartpole", "--out", "nowhere/result.json"], "there is no folder nowhere"),
        (["cartpole", "--runs", "{full}"], "is not empty"),
    ],
)
def test_bad_use_is_refused_before_anything_is_trained(arguments, said, tmp_path):
    (tmp_path / "something").touch()
    done = CliRunner().invoke(app, ["verify", *(word.format(full=tmp_path) for word in arguments)])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


@pytest.mark.slow
def test_verify_trains_with_real_actors_and_says_that_it_did_not_pass(tmp_path):
    arguments = ["cartpole-zoo", "--seeds", "1", "--lag", "1", "--total-steps", "1024", "--json"]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "result.json")]
    done = CliRunner().invoke(app, ["verify", *arguments, *where])
    assert done.exit_code == 1, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "rustyrl verify cartpole-zoo --seeds 1 --lag 1 --total-steps 1024"
    assert {"cores", "processor", "python", "torch", "gymnasium"} <= result["machine"].keys()
    (row,) = result["rows"]
    assert {"preset", "lag", "seeds", "mean", "std", "published", "passed"} <= row.keys()
    assert (row["preset"], row["lag"], row["seeds"], row["published"]) == ("cartpole-zoo", 1, [1], 500.0)
    assert (row["passed"], row["shortened"], row["failures"]) == (False, True, [])
    run = tmp_path / "runs" / "cartpole-zoo-lag1-seed1"
    summary = json.loads((run / "summary.json").read_text())
    assert row["mean"] == row["scores"][0] == summary["eval"]["return_mean"]
    assert summary["eval"]["episodes"] == 100
    assert 1024 <= row["steps"][0] < 1024 + 256
    assert summary["tickets"]["trained"] == 2 * len((run / "metrics.jsonl").read_text().splitlines())  # two actors
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert read_score(PRESETS["cartpole"], run).score == last["return_mean"] != row["mean"]
    assert "1 of 1: cartpole-zoo, lag 1, seed 1" in done.stderr


def test_runs_that_fail_are_outcomes_with_their_causes(tmp_path):
    layer = {**PRESETS["cartpole"].layer, "env": {"slots": 2, "raise_at": 20}}
    falls = msgspec.structs.replace(PRESETS["cartpole"], name="falls", env=COUNTING, layer=layer)
    nowhere = msgspec.structs.replace(PRESETS["cartpole"], name="nowhere", env="gym:NoSuchWorld-v0")
    heard = []
    outcomes, cut_short = run_trials(
        plan([falls, nowhere], [0], [1]), tmp_path, jobs=2, on_outcome=lambda trial, _: heard.append(trial.preset.name)
    )
    assert cut_short == ""
    assert sorted(heard) == ["falls", "nowhere"]
    assert [outcome.score for outcome in outcomes.values()] == [None, None]
    assert "the world of the test fell over" in outcomes["falls", 0, 1].cause
    assert "NoSuchWorld" in outcomes["nowhere", 0, 1].cause


def test_a_run_that_somebody_stopped_has_no_score(tmp_path):
    summary = {"steps": 5000, "seconds": 9.0, "stopped_by": "stop", "eval": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert read_score(PRESETS["cartpole"], tmp_path) == Outcome(None, 5000, 9.0, "stopped by stop")
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "stopped_by": "total_steps"}))
    (tmp_path / "metrics.jsonl").write_text('{"steps": 5000}\n')
    assert read_score(PRESETS["cartpole"], tmp_path) == Outcome(None, 5000, 9.0, "no episode ended")


def test_an_interrupt_prints_what_is_done_ends_every_process_and_exits_130(tmp_path):
    runs = tmp_path / "runs"
    arguments = ["verify", "cartpole", "--seeds", "2", "--lag", "0", "--json", "--runs", str(runs)]
    command = [sys.executable, "-c", "from rustyrl.main import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        poll(lambda: list(runs.glob("*/metrics.jsonl")), "a run that trains")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 4  # a launcher, a learner and two actors
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert json.loads(out)["rows"] == []
    summary = json.loads((runs / "cartpole-lag0-seed1" / "summary.json").read_text())
    assert summary["stopped_by"] == "interrupt"  # it was asked to end, not killed
    assert "0 of 2 runs finished before the interrupt" in err
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_the_extra_brings_the_packages_of_presets():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (extra,) = project["optional-dependencies"]["verify"]
    wanted = {name for preset in PRESETS.values() for name in preset.packages.values()}
    assert wanted == {"box2d", "mujoco"}
    assert all(name in extra.partition("]")[0] for name in wanted)


def test_the_page_lists_the_presets_as_they_are():
    text = (Path(__file__).parent.parent / "docs" / "verify.md").read_text().partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [[*row[:2], *row[3:]] for row in rows] == [
        [
            f"`{preset.name}`",
            preset.env.removeprefix("gym:"),
            f"{preset.published:.1f} +- {preset.published_std:.1f}",
            f"{preset.required:.1f}",
            preset.source.partition(",")[0],
            f"a {preset.kind}",
        ]
        for preset in PRESETS.values()
    ]
    letters = {"K": 1000, "M": 1_000_000}
    steps = [int(number) * letters[letter] for number, letter in (row[2].split() for row in rows)]
    assert steps == [preset.total_steps for preset in PRESETS.values()]
