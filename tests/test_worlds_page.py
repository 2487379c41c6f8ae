"""docs/worlds.md keeps its word: its code runs as printed, in under 40 added lines, and the game still runs alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import rustyrl

PAGE = Path(__file__).parent.parent / "docs" / "worlds.md"


@pytest.fixture(scope="module")
def game(tmp_path_factory) -> Path:
    """A folder with the files that the page shows."""
    folder = tmp_path_factory.mktemp("harvest")
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in files] == ["harvest.py", "harvest_world.py", "harvest_autopilot.py"]
    for name, content in files:
        (folder / name).write_text(content)
    return folder


def play(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_under_forty_lines_are_added(game):
    lines = [line for line in (game / "harvest_world.py").read_text().splitlines() if line.strip()]
    assert len(lines) < 40


def test_the_game_runs_on_its_own_and_knows_nothing_of_learning(game):
    assert "apples in" in play(game, "harvest.py")
    assert "rustyrl" not in (game / "harvest.py").read_text()


def test_the_world_conforms_trains_and_flies_the_game(game):
    code, out, err = rustyrl("check", "harvest_world.py:HarvestWorld", "--json", cwd=game)
    report = json.loads(out)
    assert code == 0, [finding for finding in report["findings"] if finding["passed"] is False]
    assert report["passed"]
    code, out, err = rustyrl(
        "train", "harvest_world.py:HarvestWorld", "--run", "run", "--actors", "1", "--total-steps", "4096", "--json",
        "--set", "run.eval_episodes=8", "--set", "batch.worlds=16", cwd=game,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["eval"]["apples_mean"] >= 0
    assert "apples" in play(game, "harvest_autopilot.py", "run/policy.safetensors")
