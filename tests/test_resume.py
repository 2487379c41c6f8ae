"""A run that was interrupted goes on as if it had not been; what cannot be so is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from clusters import SMALL
from resumes import STATEFUL, assert_same_end, interrupt_at

from rustyrl.config import Config, build_config
from rustyrl.errors import UsageError
from rustyrl.resume import RULES, check_resume, resume_config, seconds_before
from rustyrl.spec import read_spec

OF_FORMAT_1 = Path(__file__).parent / "data" / "run-of-format-1"
PAGE = Path(__file__).parents[1] / "docs" / "resume.md"


def test_a_run_that_is_killed_and_stopped_ends_in_the_bits_of_one_that_is_not(start):
    arguments = ("train", "cartpole", "--actors", "2", "--total-steps", "6000", *SMALL, *STATEFUL)
    arguments += ("--set", "run.checkpoint_every=5")
    straight = start(*arguments)
    again = interrupt_at(start, arguments, [8, 12], seed=1)
    code, _, err = straight.wait()
    assert code == 0, err
    assert_same_end(straight, again)
    out, err = again.said()
    assert "with the running episodes of all worlds (4)" in err
    assert json.loads(out)["worlds_restarted"] == 0
    seconds = [row["seconds"] for row in again.rows()]
    assert seconds == sorted(seconds)
    assert json.loads(out)["seconds"] > seconds[-1]


# Changed settings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(OF_FORMAT_1, tmp_path / "run")


def checked(run: Path, changes: dict[str, Any] | None = None) -> list[str]:
    """What is said of a resume with these settings."""
    spec = read_spec((run / "spec.json").read_bytes())
    return check_resume(run, build_config(resume_config(run), changes or {}), spec)


def test_every_setting_has_a_rule() -> None:
    keys = {
        f"{section}.{key}"
        for section in Config.__struct_fields__
        if section != "env"
        for key in getattr(Config(), section).__struct_fields__
    }
    assert keys | {"env"} == RULES.keys()


def test_the_page_has_every_rule() -> None:
    text = PAGE.read_text().partition("## Changed settings")[2].partition("\n## ")[0]
    for key, rule in RULES.items():
        kind = f"{rule.kind} if {rule.condition}" if rule.condition else rule.kind
        assert f"| `{key}` | {kind} | {rule.why} |" in text, f"docs/resume.md lacks {key}, or says something else of it"
    assert text.count("\n| `") == len(RULES)


def test_nothing_is_said_of_settings_that_are_the_same(run: Path) -> None:
    assert checked(run) == []


def test_what_is_honoured_and_what_is_risky_is_said(run: Path) -> None:
    said = checked(
        run,
        {"run": {"checkpoint_every": 7, "total_steps": 900}, "ppo": {"gamma": 0.9}, "batch": {"worlds": 3}},
    )
    assert said[:2] == [
        "changed: run.total_steps is 900 and was 300",
        "changed: run.checkpoint_every is 7 and was 100",
    ]
    assert said[2].startswith("warning: batch.worlds is 3 and was 2: worlds that are new begin their episodes")
    assert said[3].startswith(
        "warning: ppo.gamma is 0.9 and was 0.99: the critic has learned values by the setting bef"
    )
    assert len(said) == 4


def test_some_are_risky_under_a_condition(run: Path) -> None:
    (said, _) = checked(run, {"run": {"total_steps": 900}, "ppo": {"schedule": "linear"}})
    assert said.startswith("warning: run.total_steps is 900 and was 300: what schedules change jumps")
    (rate,) = checked(run, {"ppo": {"learning_rate": 0.5}})
    assert "without effect: the rate follows the KL" in rate
    (rate, _) = checked(run, {"ppo": {"learning_rate": 0.5, "schedule": "constant"}})
    assert rate.startswith("changed: ppo.learning_rate")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"policy": {"trunk": "shared"}},
            "policy.trunk was 'separate' and is now 'shared'; a resumed run keeps its net",
        ),
        ({"policy": {"initial_log_std": -1.0}}, "a resumed run keeps the deviation that it has"),
        ({"run": {"init": "other.safetensors"}}, "leave out --resume to start from a policy"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_with_is_refused(run: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        checked(run, changes)


def test_a_configuration_of_another_version_is_refused_with_what_to_do(run: Path) -> None:
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("gae_lambda", "gae_lamda"))
    with pytest.raises(UsageError, match=r"not of this version.*ppo\.gae_lamda.*take that key out"):
        resume_config(run)


def test_the_time_of_a_run_goes_on(run: Path) -> None:
    spent_s = seconds_before(run)
    assert 0.2 < spent_s < 0.4
    with pytest.raises(UsageError, match=r"run\.max_seconds is 0\.1, and the run has taken 0\.3 s already: raise it"):
        checked(run, {"run": {"max_seconds": 0.1}})
    assert checked(run, {"run": {"max_seconds": 100.0}}) == ["changed: run.max_seconds is 100.0 and was 0.0"]
    (run / "checkpoints" / "000000009").mkdir()
    (run / "checkpoints" / "000000009" / "manifest.json").write_bytes(b'{"counters":{"seconds"')
    assert seconds_before(run) == spent_s
    assert seconds_before(run / "nowhere") == 0.0


def test_the_time_counts_from_where_a_resume_goes_on(run: Path) -> None:
    """Which is the newest exact checkpoint, if one that is incomplete is not much newer."""

    def stands(version: int, seconds: float, **fields: Any) -> None:
        path = run / "checkpoints" / f"{version:09d}"
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps({"counters": {"seconds": seconds}, **fields}))

    stands(5, 10.0, worlds={0: 0})
    stands(6, 20.0, worlds={0: 0}, incomplete=True)
    stands(7, 70.0, incomplete=True)
    assert seconds_before(run) == 10.0
    stands(8, 71.0, incomplete=True)
    assert seconds_before(run) == 71.0
