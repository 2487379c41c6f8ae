"""`rustyrl new` makes projects that pass their own tests as they are made."""

from __future__ import annotations

import subprocess
import sys

import pytest
from clusters import rustyrl

from rustyrl.errors import UsageError
from rustyrl.new import STYLES, new_project


@pytest.mark.parametrize("style", [STYLES[0], *(pytest.param(style, marks=pytest.mark.slow) for style in STYLES[1:])])
def test_a_new_project_passes_its_tests_conforms_and_trains(tmp_path, style):
    code, out, err = rustyrl("new", f"my-{style}-hunt", "--style", style, cwd=tmp_path)
    assert code == 0, err
    folder = tmp_path / f"my-{style}-hunt"
    assert f"cd {folder.name}" in out
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.toml", f"my_{style}_hunt.py", f"test_my_{style}_hunt.py"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


@pytest.mark.parametrize("style", ["object", pytest.param("column", marks=pytest.mark.slow)])
def test_a_new_project_trains_with_its_configuration(tmp_path, style):
    folder, world = new_project(f"{style}_chase", style, tmp_path)
    code, _, err = rustyrl(
        "train", world, "--config", "config.toml", "--run", "run", "--actors", "1", "--json", "--set",
        "run.max_seconds=1", "--set", "run.eval_episodes=4", cwd=folder,
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("name", "style", "message"),
    [
        ("9lives", "object", "does not serve as the name of a module"),
        ("two words", "object", "does not serve as the name of a module"),
        ("class", "object", "does not serve as the name of a module"),
        ("json", "object", "there is a module 'json' already"),
        ("keepsake", "row", "there is no style 'row'; expected object or column"),
    ],
)
def test_a_name_or_style_that_does_not_serve_is_refused_and_nothing_is_written(tmp_path, name, style, message):
    with pytest.raises(UsageError, match=message):
        new_project(name, style, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    folder, _ = new_project("keepsake", "column", tmp_path)
    (folder / "keepsake.py").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        new_project("keepsake", "column", tmp_path)
    assert (folder / "keepsake.py").read_text() == "mine"
