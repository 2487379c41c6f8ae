"""Neither the number of actors nor timing can change what is learned."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from clusters import WORLDS
from proxies import delaying_proxy

from rustyrl import Config, configure
from rustyrl.channels import RolloutReceiver
from rustyrl.processes import actor_environment
from rustyrl.spec import EnvironmentSpec

if TYPE_CHECKING:
    from torch import Tensor

    from rustyrl_learner.batch import Batch
    from rustyrl_learner.training import Training

COUNTING = f"{WORLDS}/counting.py:Counting"
SHAPE = ("--set", "batch.worlds=4", "--set", "env.slots=8", "--set", "batch.unroll_length=16")


def training_of(config: Config, spec: EnvironmentSpec) -> Training:
    import torch

    from rustyrl_learner.training import Training

    training = Training(config, spec, torch.device("cpu"))
    if training.normalizer is not None:  # as after a warm-up
        training.normalizer.fold(torch.randn((100, spec.observation_width), generator=torch.Generator().manual_seed(0)))
    return training


def first_batch(config: Config, spec: EnvironmentSpec, actors: int, tmp_path: Path) -> Batch:
    """Batch 0 as the learner's collector puts it together from this many real actor processes."""
    import torch

    from rustyrl_learner.collector import Collector

    receiver = RolloutReceiver(f"ipc://{tmp_path}/link{actors}")
    weights = training_of(config, spec).weights()
    collector = Collector(receiver, spec, config, 0, actors, 0, weights)
    collector.start()
    command = [sys.executable, "-m", "rustyrl_actors", "run", "--join", receiver.address]
    processes = [
        subprocess.Popen([*command, "--index", str(index)], env=actor_environment(), stderr=subprocess.DEVNULL)
        for index in range(actors)
    ]
    try:
        buffer = collector.next_batch(60.0)
        assert buffer is not None
        return buffer.to_device(torch.device("cpu"))
    finally:
        collector.close()
        for process in processes:  # whether a goodbye is heard in time is not what this is about
            process.kill()
            process.wait()


def updated(config: Config, spec: EnvironmentSpec, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """How far the learner's own update on a batch moves every parameter, and its figures."""
    from dataclasses import asdict

    from rustyrl_learner.advantage import training_batch
    from rustyrl_learner.ppo import ppo_update

    training, ppo = training_of(config, spec), config.ppo
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    scales: dict[str, Any] = {"rewards": training.rewards, "values": training.values}
    lagged = config.batch.max_policy_lag > 0
    rows = training_batch(training.network, batch, ppo, normalizer=training.normalizer, lagged=lagged, **scales)
    losses = ppo_update(training.network, training.optimizer, rows, ppo, ppo.learning_rate, training.shuffle)
    moved = {name: p.detach() - before[name] for name, p in training.network.named_parameters()}
    return moved, asdict(losses)


@pytest.mark.parametrize(("env", "actors"), [("drone", (1, 2, 8)), ("cartpole", (1, 3))], ids=str)
def test_the_first_batch_is_the_same_and_gives_the_same_update_however_many_actors(env, actors, tmp_path, one_thread):
    """To rounding: actors multiply matrices of fewer rows, which may add up in another order."""
    from torch.testing import assert_close

    layers = {
        "run": {"env": env, "seed": 7},
        "env": {"slots": 8},
        "batch": {"worlds": 8, "unroll_length": 24},
        "policy": {"hidden": [16, 16]},
        "ppo": {
            "epochs": 2,
            "minibatch_size": 256,
            "learning_rate": 1e-3,
            "normalize_reward": True,
            "normalize_value": True,
        },
    }
    config, spec = configure(layers)
    one, *others = (first_batch(config, spec, count, tmp_path) for count in actors)
    assert one.observation.std() > 0
    assert one.fresh.all()
    moved, losses = updated(config, spec, one)
    assert losses["approx_kl"] > 1e-4
    for other in others:
        for field in fields(one):
            ours, theirs = getattr(one, field.name), getattr(other, field.name)
            assert_close(theirs, ours, rtol=1e-5, atol=1e-5, msg=lambda text, name=field.name: f"{name}: {text}")
        as_far, as_lossy = updated(config, spec, other)
        assert as_lossy == pytest.approx(losses, rel=1e-4, abs=1e-6)
        for name, step in moved.items():
            farthest = float(step.abs().max())
            assert farthest > 0
            assert_close(
                as_far[name], step, rtol=0, atol=1e-3 * farthest, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(4, marks=pytest.mark.slow)])
def test_same_seed_gives_the_same_bits_whatever_the_delays(start, lag):
    """Actors that sleep at random in every step, and in the second run a network that delays every message."""
    arguments = (COUNTING, "--total-steps", "600", "--seed", "11", "--max-policy-lag", str(lag), *SHAPE)
    arguments += ("--set", "run.eval_episodes=1", "--set", "env.sleep_ms=1")
    direct = start("train", *arguments, "--actors", "2")
    code, _, err = direct.wait()
    assert code == 0, err
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    learner = start("learner", *arguments, "--expect", "2", "--listen", f"tcp://127.0.0.1:{port}")
    with delaying_proxy(("127.0.0.1", port)) as proxy:
        link = f"tcp://127.0.0.1:{proxy}"
        command = [sys.executable, "-m", "rustyrl_actors", "run", "--join", link]
        actors = [
            subprocess.Popen([*command, "--index", str(i)], env=actor_environment(), stderr=subprocess.DEVNULL)
            for i in range(2)
        ]
        code, _, err = learner.wait()
        for actor in actors:
            actor.wait(20)
    assert code == 0, err
    ours, theirs = ((cluster.run / "policy.safetensors").read_bytes() for cluster in (direct, learner))
    assert ours == theirs
    assert [row["policy_loss"] for row in direct.rows()[1:]] == [row["policy_loss"] for row in learner.rows()[1:]]
