"""What training goes on from can be taken out, put back, and survives an update that is abandoned."""

from __future__ import annotations

import pytest
import torch

from rustyrl.config import build_config
from rustyrl.errors import UsageError
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec
from rustyrl_learner.ppo import TrainingBatch, ppo_update
from rustyrl_learner.training import Training

SPEC = EnvironmentSpec(
    env="test",
    observation=(ArraySpec("main", (3,), "float32"),),
    action=(ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),),
    slots=1,
    step_s=0.1,
    max_episode_steps=10,
)
CONFIG = build_config({"policy": {"hidden": [8]}, "ppo": {"epochs": 3, "minibatch_size": 16}})


def batch() -> TrainingBatch:
    torch.manual_seed(1)
    columns = {name: torch.randn(64) for name in ("behavior_log_prob", "advantage", "value", "value_target")}
    return TrainingBatch(torch.randn(64, 3), torch.randn(64, 2), None, proximal_log_prob=torch.zeros(64), **columns)


def update(training: Training, ask=lambda: None) -> None:
    ppo_update(training.network, training.optimizer, batch(), CONFIG.ppo, 1e-2, training.shuffle, ask)


def bits(training: Training) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in training.state().items()}


def test_an_update_that_is_abandoned_leaves_no_trace():
    training = Training(CONFIG, SPEC, torch.device("cpu"))
    training.normalizer.fold(torch.randn(10, 3))
    update(training)
    before = bits(training)
    calls = []

    def stop_half_way() -> None:
        calls.append(None)
        if len(calls) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError), training.whole_or_undone():
        update(training, stop_half_way)
    assert bits(training) == before
    twin = Training(CONFIG, SPEC, torch.device("cpu"))
    twin.set_state(training.state())
    update(training)
    update(twin)
    assert bits(training) == bits(twin) != before


def test_a_finished_update_stays():
    training = Training(CONFIG, SPEC, torch.device("cpu"))
    before = bits(training)
    with training.whole_or_undone():
        update(training)
    assert bits(training) != before


def test_start_from_takes_the_policy_and_leaves_the_critic(tmp_path):
    source, target = (
        Training(build_config({"policy": {"hidden": [8]}, "run": {"seed": seed}}), SPEC, torch.device("cpu"))
        for seed in (1, 2)
    )
    source.normalizer.fold(torch.randn(10, 3))
    critic = target.network.critic.weights[0].clone()
    (tmp_path / "policy.safetensors").write_bytes(source.weights())
    target.start_from(tmp_path / "policy.safetensors")
    assert target.weights() == source.weights()
    assert torch.equal(target.network.critic.weights[0], critic)
    other = Training(build_config({"policy": {"hidden": [9]}}), SPEC, torch.device("cpu"))
    with pytest.raises(UsageError, match="another kind"):
        other.start_from(tmp_path / "policy.safetensors")
