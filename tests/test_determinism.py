"""Neither the number of actors nor timing can change what is learned."""

from __future__ import annotations

import random
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from clusters import WORLDS

from rustyrl import Config, configure
from rustyrl.channels import RolloutReceiver
from rustyrl.processes import actor_environment
from rustyrl.spec import EnvironmentSpec

COUNTING = f"{WORLDS}/counting.py:Counting"
SHAPE = ("--set", "batch.worlds=4", "--set", "env.slots=8", "--set", "batch.unroll_length=16")


def first_batch(config: Config, spec: EnvironmentSpec, actors: int, tmp_path: Path) -> dict[str, np.ndarray]:
    """Batch 0 as the learner's collector puts it together from this many real actor processes."""
    import torch

    from rustyrl.weights import PolicySpec, encode_weights
    from rustyrl_learner.collector import Collector
    from rustyrl_learner.network import ActorCritic, export_weights

    torch.manual_seed(5)
    policy = PolicySpec(spec.observation, spec.action, (16, 16), "tanh", normalize=False)
    weights = encode_weights(export_weights(ActorCritic(policy, shared=False, initial_log_std=0.0), None))
    receiver = RolloutReceiver(f"ipc://{tmp_path}/link{actors}")
    collector = Collector(receiver, spec, config, 0, actors, 0, weights, pin=False)
    collector.start()
    command = [sys.executable, "-m", "rustyrl_actors", "run", "--join", receiver.address]
    processes = [
        subprocess.Popen([*command, "--index", str(index)], env=actor_environment(), stderr=subprocess.DEVNULL)
        for index in range(actors)
    ]
    try:
        buffer = collector.next_batch(60.0)
        assert buffer is not None
        batch = buffer.to_device(torch.device("cpu"))
        tensors = {name: getattr(batch, name) for name in batch.__slots__}
        return {name: tensor.numpy().copy() for name, tensor in tensors.items() if tensor is not None}
    finally:
        collector.close()
        for process in processes:
            assert process.wait(20) == 0


@pytest.mark.parametrize("env", ["drone", "cartpole"])
def test_first_batch_of_1_2_and_4_actors_is_the_same_experience(env, tmp_path):
    layers = {"run": {"env": env, "seed": 7}, "env": {"slots": 8}, "batch": {"worlds": 4, "unroll_length": 24}}
    config, spec = configure(layers)
    one, two, four = (first_batch(config, spec, actors, tmp_path) for actors in (1, 2, 4))
    assert one["observation"].std() > 0
    for name, array in one.items():
        for other in (two, four):
            assert array.shape == other[name].shape
            np.testing.assert_allclose(array, other[name], rtol=1e-5, atol=1e-5, err_msg=name)


@contextmanager
def delaying_proxy(target: tuple[str, int]) -> Iterator[int]:
    """Pass tcp connections on to the target, holding every chunk up for up to 20 ms; gives its own port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stopping = threading.Event()
    threads: list[threading.Thread] = []
    clock = random.Random()

    def pump(client: socket.socket) -> None:
        with (
            suppress(OSError),
            client,
            socket.create_connection(target) as server,
            selectors.DefaultSelector() as ready,
        ):
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not stopping.is_set():
                for key, _ in ready.select(0.1):
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        return
                    stopping.wait(clock.random() * 0.02)
                    key.data.sendall(data)

    def accept() -> None:
        while not stopping.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=pump, args=(client,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        acceptor.join(10)
        for thread in threads:
            thread.join(10)
        listener.close()


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(4, marks=pytest.mark.slow)])
def test_same_seed_gives_the_same_bits_whatever_the_delays(start, lag):
    """Actors that sleep at random in every step, and in the second run a network that delays every message."""
    arguments = (COUNTING, "--total-steps", "1500", "--seed", "11", "--max-policy-lag", str(lag), *SHAPE)
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
