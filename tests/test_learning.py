"""Small worlds whose optimum needs what they are named for are learned, through real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import rustyrl

from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import allocate_rows

EXAMPLES = Path(__file__).parent.parent / "examples"
DOORS, CATAPULT = f"{EXAMPLES}/doors.py:Doors", f"{EXAMPLES}/catapult.py:Catapult"

pytestmark = pytest.mark.learning


def train(folder: Path, env: str, *arguments: str) -> dict[str, Any]:
    code, out, err = rustyrl("train", env, "--run", str(folder), "--actors", "1", "--json", *arguments)
    assert code == 0, err
    summary: dict[str, Any] = json.loads(out)
    return summary


def test_the_doors_are_learned_with_the_mask(tmp_path):
    masked = train(tmp_path / "masked", DOORS)
    assert masked["stopped_by"] == "goal"
    assert masked["eval"]["share_of_best_mean"] >= 0.98
    assert masked["findings"] == []


@pytest.mark.slow
def test_the_doors_cannot_be_learned_without_the_mask(tmp_path):
    blind = train(tmp_path / "blind", DOORS, "--set", "env.masked=false", "--total-steps", "200000")
    assert blind["eval"]["share_of_best_mean"] < 0.7


def test_the_catapult_is_learned_with_sling_and_force_together(tmp_path):
    summary = train(tmp_path / "run", CATAPULT, "--stop-at", "hit_rate>=0.8")
    assert summary["stopped_by"] == "goal"
    assert summary["eval"]["hit_rate"] >= 0.75
    assert summary["findings"] == []


@pytest.mark.parametrize("sling", [0, 1, 2])
def test_no_single_sling_hits_half_of_the_targets_even_with_the_best_force(sling):
    environment = find_environment(CATAPULT, {"slots": 256}).make()
    rows = allocate_rows(environment.spec)
    action = {"force": np.zeros((256, 1), np.float32), "sling": np.full(256, sling)}
    try:
        environment.reset((1,), rows)
        episodes = None
        while episodes is None:
            share = rows.observation["share_of_reach"][:, sling]  # the force that hits, where this sling reaches
            action["force"][:, 0] = np.clip(2 * (share - 0.4) / 0.6 - 1, -1, 1)
            episodes = environment.step(action, rows).episodes
    finally:
        environment.close()
    assert episodes.metrics["hits"].mean() < 0.5
