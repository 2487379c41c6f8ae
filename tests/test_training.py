"""What training goes on from can be taken out, put back, and survives an update that is abandoned."""

from __future__ import annotations

import pytest
import torch

from rustyrl.config import build_config
from rustyrl.errors import UsageError
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec
from rustyrl_learner import ppo
from rustyrl_learner.ppo import ppo_update
from rustyrl_learner.rows import TrainingBatch
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


def test_an_update_that_is_abandoned_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(ppo, "AT_ONCE", 1)  # compiled code asks after each minibatch, too
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


# Statistics of rewards and values


SCALED = {"normalize_reward": True, "normalize_value": True}


def with_ppo(worlds: int = 4, **ppo) -> Training:
    config = build_config(
        {
            "policy": {"hidden": [8]},
            "batch": {"worlds": worlds, "unroll_length": 16},
            "ppo": {"epochs": 3, "minibatch_size": 16, **ppo},
        }
    )
    return Training(config, SPEC, torch.device("cpu"))


def fold(training: Training, seed: int = 0, slots: int = 4) -> None:
    """What preparing an update does to the statistics and to the critic's last layer."""
    generator = torch.Generator().manual_seed(seed)
    no = torch.zeros(16, slots, dtype=torch.bool)
    if training.rewards is not None:
        training.rewards.fold(5 + torch.randn(16, slots, generator=generator), no, ~no, no[0], 0.9)
    if training.values is not None:
        training.values.fold(300 + 20 * torch.randn(64, generator=generator), *training.network.value_head)


def said(training: Training) -> torch.Tensor:
    """Values in the units of the rewards."""
    with torch.no_grad():
        value = training.network.value(torch.linspace(-2, 2, 30).reshape(10, 3))
    return value if training.values is None else training.values.to_reward_units(value)


def test_statistics_of_rewards_and_values_survive_a_checkpoint():
    source, target = with_ppo(**SCALED), with_ppo(**SCALED)
    fold(source)
    update(source)
    assert {"rewards.mean", "rewards.carried", "values.mean", "values.variance"} <= source.state().keys()
    kept = {name: tensor.clone() for name, tensor in source.state().items()}
    target.set_state(kept)
    assert bits(target) == bits(source)
    for training in (source, target):
        fold(training, seed=1)
    assert bits(target) == bits(source)
    assert (source.state()["rewards.carried"] != kept["rewards.carried"]).all()


def test_an_update_that_is_abandoned_leaves_no_trace_in_the_statistics_of_rewards_and_values():
    training = with_ppo(**SCALED)
    fold(training)
    before, values = bits(training), said(training)

    def fold_and_stop() -> None:
        fold(training, seed=1)
        assert bits(training) != before
        raise InterruptedError

    with pytest.raises(InterruptedError), training.whole_or_undone():
        fold_and_stop()
    assert bits(training) == before
    assert torch.equal(said(training), values)


def test_normalized_values_that_are_switched_off_leave_a_critic_that_says_the_same():
    source = with_ppo(**SCALED)
    fold(source)
    update(source)
    fold(source, seed=1)
    target = with_ppo()
    target.set_state(source.state())
    torch.testing.assert_close(said(target), said(source), rtol=1e-5, atol=1e-3)
    source.values = None
    assert (said(source) - said(target)).abs().min() > 1  # which it did not by itself
    again = with_ppo()  # once they are off they stay so
    again.set_state(target.state())
    assert torch.equal(said(again), said(target))


def test_normalized_values_that_are_switched_on_begin_with_the_units_of_the_rewards():
    source = with_ppo()
    update(source)
    target = with_ppo(**SCALED)
    target.set_state(source.state())
    assert torch.equal(said(target), said(source))
    fold(target)
    torch.testing.assert_close(said(target), said(source), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("worlds", [1, 2, 9])
def test_returns_so_far_are_left_behind_where_a_run_goes_on_with_other_worlds(worlds):
    source, target = with_ppo(4, **SCALED), with_ppo(worlds, **SCALED)
    fold(source)
    target.set_state(source.state())
    assert target.rewards.carried.tolist() == [0.0] * worlds
    assert target.rewards.statistics.mean == source.rewards.statistics.mean
    fold(target, slots=worlds)


# Optimisers


def moments(training: Training) -> dict[str, torch.Tensor]:
    """Adam's first moment by the name of its parameter."""
    named = list(training.network.named_parameters())
    parts = training.optimizer.first.split([p.numel() for _, p in named])
    return {name: part.view(p.shape) for (name, p), part in zip(named, parts, strict=True)}


def test_adamw_decays_layers_and_no_deviation():
    training = with_ppo(optimizer="adamw", weight_decay=0.1, learning_rate=0.01)
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    for parameter in training.network.parameters():
        parameter.data.fill_(2.0)
    training.network.flat()[1].tensor.zero_()  # nothing but the decay moves them
    training.optimizer.step(0.01)
    assert "log_std" in before
    for name, parameter in training.network.named_parameters():
        expected = 2.0 if name == "log_std" else 2.0 * (1 - 0.01 * 0.1)
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, expected), msg=name)


def test_adamw_without_decay_takes_the_steps_of_adam():
    adam, adamw = with_ppo(), with_ppo(optimizer="adamw")
    for training in (adam, adamw):
        update(training)
    for name, tensor in adam.state().items():
        torch.testing.assert_close(adamw.state()[name], tensor, msg=name)


@pytest.mark.parametrize("trunk", ["separate", "shared"])
@pytest.mark.parametrize("action", ["box", "discrete"])
def test_moments_stay_with_their_parameters_from_adam_to_adamw_and_back(action, trunk):
    spec = SPEC
    if action == "discrete":  # without a deviation
        spec = EnvironmentSpec("test", SPEC.observation, (ActionSpec("discrete", counts=(4,)),), 1, 0.1, 10)

    def training_with(**ppo) -> Training:
        config = build_config({"policy": {"hidden": [8, 8], "trunk": trunk}, "ppo": ppo})
        return Training(config, spec, torch.device("cpu"))

    adam, adamw = training_with(), training_with(optimizer="adamw", weight_decay=0.1)
    for index, parameter in enumerate(adam.network.parameters()):
        parameter.grad.fill_(float(index + 1))  # every moment says whose it is
    adam.optimizer.step(0.01)
    adamw.set_state(adam.state())
    back = training_with()
    back.set_state(adamw.state())
    for training in (adamw, back):
        found = moments(training)
        for name, moment in moments(adam).items():
            assert torch.equal(found[name], moment), name
    assert bits(back) == bits(adam)
