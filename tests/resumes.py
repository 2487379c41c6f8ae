"""Interrupting runs in tests, and comparing what they came to with one that was never interrupted."""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from clusters import Cluster, poll

TIMINGS = {"seconds", "trained_sps", "learner_s", "receive_s", "actor_s"}
# Everything that has a state: normalisers, schedules towards the end, a learning rate that follows the KL.
STATEFUL = (
    "--max-policy-lag", "0", "--json", "--set", "run.eval_episodes=1", "--set", "run.threads=1",
    "--set", "ppo.normalize_reward=true", "--set", "ppo.normalize_value=true", "--set", "ppo.gamma_end=0.95",
    "--set", "ppo.entropy=0.01", "--set", "ppo.entropy_end=0.001", "--set", "ppo.clip_end=0.1",
)  # fmt: skip


def rows(cluster: Cluster) -> list[dict[str, Any]]:
    """What the run has recorded, but for timings."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in cluster.rows()]


def newest(run: Path) -> tuple[str, dict[str, str]]:
    """The newest checkpoint: its name, and the checksums of all that it holds but the manifest with its seconds."""
    path = max((run / "checkpoints").glob("[0-9]*"))
    files = sorted(path.glob("*.safetensors"))
    return path.name, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def terminate(cluster: Cluster) -> None:
    """Stop it in good order."""
    cluster.process.send_signal(signal.SIGTERM)
    code, _, err = cluster.wait()
    assert code == 143, (code, err)


def kill_everything(cluster: Cluster) -> None:
    """Kill launcher, learner and actors at once."""
    for process in [psutil.Process(cluster.process.pid), *cluster.children("rustyrl_")]:
        process.kill()
    cluster.process.wait(10)
    poll(lambda: not cluster.orphans(), "no process of the run", 10.0)


def interrupt_at(start: Callable[..., Cluster], arguments: tuple[str, ...], points: list[int], seed: int) -> Cluster:
    """Run to the end, but interrupted when it comes to these versions, by turns killed and stopped; the last part."""
    clock = random.Random(seed)
    cluster = start(*arguments)
    for number, version in enumerate(points):
        cluster.await_version(version)
        if number % 2:
            terminate(cluster)
        else:
            kill_everything(cluster)
        cut = clock.randrange(40)  # a row that was being written when the machine died
        with (cluster.run / "metrics.jsonl").open("ab") as file:
            file.write(b'{"policy_version":99999,"steps":1,"seconds":2.5,'[:cut])
        cluster = start("train", "--resume", "--json", run=cluster.run)
        poll(partial(_goes_on, cluster), "the resume")  # until then the rows are those of before
    code, _, err = cluster.wait(240)
    assert code == 0, err
    return cluster


def _goes_on(cluster: Cluster) -> bool:
    assert cluster.process.poll() is None, cluster.wait()
    said = cluster.said()[1].replace("\n", " ")
    return "going on from version" in said or "nothing to resume from" in said


def assert_same_end(one: Cluster, two: Cluster) -> None:
    """Two runs recorded the same and ended in the same bits, worlds included."""
    ours, theirs = rows(one), rows(two)
    for row, twin in zip(ours, theirs, strict=True):
        other = {name: (row.get(name), twin.get(name)) for name in row | twin if row.get(name) != twin.get(name)}
        assert not other, (row["policy_version"], other)
    name, files = newest(one.run)
    assert set(files) == {"learner.safetensors", "policy.safetensors", "worlds.safetensors"}
    assert newest(two.run) == (name, files)
    assert (one.run / "policy.safetensors").read_bytes() == (two.run / "policy.safetensors").read_bytes()
