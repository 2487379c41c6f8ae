"""What is recommended by spaces and scale, and who wins over it."""

from __future__ import annotations

from typing import Any

import pytest

from rustyrl import configure
from rustyrl.config import build_config
from rustyrl.defaults import recommend
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec

CHOICE = ActionSpec("discrete", counts=(3,))
BOX = ActionSpec("box", "stick", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0))


def recommended(slots: int, *action: ActionSpec, worlds: int = 4, unroll_length: int = 32) -> dict[str, Any]:
    seen = (ArraySpec("main", (4,), "float32"),)
    spec = EnvironmentSpec("game", seen, action, slots=slots, step_s=0.0, max_episode_steps=100)
    batch = {"worlds": worlds, "unroll_length": unroll_length}
    layer = recommend(spec, build_config({"batch": batch}))
    build_config(layer)
    assert layer.keys() == {"ppo"}
    return layer["ppo"]


@pytest.mark.parametrize(("slots", "minibatch"), [(1, 256), (8, 256), (16, 256), (24, 384), (32, 512)])
def test_few_steps_are_learned_from_more_often_in_smaller_minibatches(slots: int, minibatch: int) -> None:
    ppo = recommended(slots, BOX)
    assert (ppo["epochs"], ppo["minibatch_size"], ppo["learning_rate"]) == (10, minibatch, 3e-4)
    assert ppo["max_learning_rate"] == 1e-3


def test_many_steps_are_left_to_the_defaults() -> None:
    assert recommended(33, BOX) == {"normalize_value": True}
    assert recommended(16, BOX, worlds=9) == recommended(16, BOX, unroll_length=65) == {"normalize_value": True}


def test_entropy_is_for_choices_alone() -> None:
    assert recommended(64, CHOICE)["entropy"] == 0.01
    assert "entropy" not in recommended(64, BOX)
    assert "entropy" not in recommended(64, CHOICE, BOX)


def test_author_and_user_win_and_the_batch_that_they_ask_for_counts() -> None:
    plain = configure({"run": {"env": "cartpole-object"}})[0].ppo
    assert (plain.epochs, plain.entropy, plain.normalize_value) == (10, 0.01, True)
    asked = {"run": {"env": "cartpole-object"}, "batch": {"worlds": 1024}, "ppo": {"entropy": 0.0}}
    assert (configure(asked)[0].ppo.epochs, configure(asked)[0].ppo.entropy) == (4, 0.0)
    drone = configure({"run": {"env": "drone"}})[0].ppo
    assert (drone.epochs, drone.normalize_value, drone.target_kl) == (4, False, 0.02)
