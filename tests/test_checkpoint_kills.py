"""Killed at any moment of writing, the newest whole checkpoint loads, and it is never an older one than before."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rustyrl.wire import encode_world_state
from rustyrl_learner import checkpoint
from rustyrl_learner.checkpoint import Counters, list_checkpoints, load_newest, prune, save

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that is killed is a copy of this one"),
]

FINGERPRINT = "0123456789abcdef"
KEPT = 2
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def write(folder: Path, version: int) -> None:
    """What the writer's thread does: a checkpoint whose every number is its version, and older ones away."""
    number = float(version)
    world = encode_world_state(0, version, 0, {"world.x": torch.full((500,), number).numpy()})
    tensors = {"x": torch.full((2000,), number)}
    save(folder, Counters(policy_version=version), b"%d" % version, tensors, FINGERPRINT, 0, {0: world})
    prune(folder, KEPT, set())


def newest(folder: Path) -> int:
    """Which checkpoint is believed, and that it is all of one piece."""
    loaded = load_newest(folder, FINGERPRINT)
    assert loaded is not None
    version = loaded.manifest.counters.policy_version
    assert loaded.tensors["x"].tolist() == [float(version)] * 2000
    state, blob = loaded.worlds[0]
    assert state.next_batch == version
    assert torch.frombuffer(bytearray(blob), dtype=torch.float32).tolist() == [float(version)] * 500
    assert (loaded.path / "policy.safetensors").read_bytes() == b"%d" % version
    for path in list_checkpoints(folder):
        checkpoint._read(path)  # none that has a name is half removed
    return version


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a copy of this process that never comes back; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)


def die_at(operation: int, folder: Path) -> None:
    """Have this process killed before so many operations on files in the folder; each sync counts as one, too."""
    left = operation

    def count(what: object) -> None:
        nonlocal left
        if str(folder) in str(what):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in OPERATIONS:
            count(arguments[0])

    sync = os.fsync

    def counted_sync(descriptor: int) -> None:
        count(folder)
        sync(descriptor)

    checkpoint.os.fsync = counted_sync
    sys.addaudithook(watch)


def test_killed_before_any_operation_the_newest_whole_one_loads(tmp_path: Path) -> None:
    operation = version = died = 0
    while True:
        folder = tmp_path / str(operation)
        for before in (1, 2, 3):
            write(folder, before)

        def work(folder: Path = folder, operation: int = operation) -> None:
            die_at(operation, folder)
            write(folder, 4)

        _, status = os.waitpid(in_a_child(work), 0)
        before, version = version, newest(folder)
        assert version in (3, 4)
        assert version >= before  # once it has its name, it keeps it
        assert len(list_checkpoints(folder)) >= KEPT  # old ones go last
        write(folder, 5)  # what was left behind is no obstacle
        assert newest(folder) == 5
        assert sorted(path.name for path in folder.iterdir()) == ["000000004", "000000005"] or version == 3
        if not os.WIFSIGNALED(status):
            break
        died += 1
        operation += 1
    assert version == 4
    assert died > 15  # five files to open and to sync, folders to make, to sync, to rename and to remove


def test_killed_at_50_random_moments_the_newest_whole_one_loads(tmp_path: Path) -> None:
    clock = random.Random(3)
    version = 1
    write(tmp_path, version)
    moved = kills = 0
    while kills < 50 or moved <= 5:  # on a slow disk it takes more of them until enough were whole
        kills += 1

        def work(first: int = version + 1) -> None:
            for number in range(first, first + 10_000):
                write(tmp_path, number)

        pid = in_a_child(work)
        time.sleep(clock.random() * 0.04 * max(1.0, kills / 50))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = newest(tmp_path)
        assert found >= version
        assert not list(tmp_path.glob("damaged-*"))  # what has a name is whole
        moved += found > version
        version = found
