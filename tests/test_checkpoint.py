"""Checkpoints: whole or not at all, and training goes on from one as if it had never stopped."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from rustyrl.config import PPOConfig, build_config, read_config
from rustyrl.errors import RunFailedError
from rustyrl.spec import ActionSpec, ArraySpec, read_spec
from rustyrl.weights import PolicySpec
from rustyrl.wire import StateArray, decode_world_state, encode_world_state
from rustyrl_learner import checkpoint
from rustyrl_learner.adam import Adam
from rustyrl_learner.checkpoint import Counters, list_checkpoints, load_newest, prune, save
from rustyrl_learner.checkpoint_keeper import describe_resume
from rustyrl_learner.gathering import KeptWorld
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.ppo import ppo_update
from rustyrl_learner.rows import TrainingBatch
from rustyrl_learner.training import Training as WholeTraining

FINGERPRINT = "0123456789abcdef"
DTypes = get_type_hints(StateArray)["dtype"]
FILES = ("learner.safetensors", "manifest.json", "manifest.sha256", "policy.safetensors", "worlds.safetensors")
OF_FORMAT_1 = Path(__file__).parent / "data" / "run-of-format-1"
CONFIG = PPOConfig(epochs=2, minibatch_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


def write(folder: Path, version: int, fingerprint: str = FINGERPRINT) -> Path:
    """A checkpoint whose every number is its version."""
    counters = Counters(policy_version=version, steps=100 * version, seconds=0.5 * version, learning_rate=1e-3)
    tensors = {"x": torch.full((4,), float(version))}
    worlds = {world: kept_world(world, version) for world in (0, 3)}
    return save(folder, counters, b"policy %d" % version, tensors, fingerprint, 2, worlds)


def kept_world(world: int, batch: int) -> KeptWorld:
    """A world as its owner sends it, with arrays of every kind."""
    arrays: dict[str, Any] = {name: np.arange(batch, batch + 3).astype(name) for name in get_args(DTypes)}
    arrays |= {"own/elapsed": np.array(7 * batch), "none": np.zeros((0, 2), np.float32)}
    return encode_world_state(world, batch, world + 1, arrays)


def loaded_version(folder: Path) -> int:
    """Which checkpoint is believed, and that it is all of one piece."""
    loaded = load_newest(folder, FINGERPRINT)
    assert loaded is not None
    manifest, tensors, path, worlds = loaded
    version = manifest.counters.policy_version
    assert worlds.keys() == {0, 3}
    for world, (state, blob) in worlds.items():
        expected, its_blob = kept_world(world, version)
        assert (state.world, state.next_batch, state.built) == (world, version, world + 1)
        found, arrays = (decode_world_state(s, memoryview(b)) for s, b in ((state, blob), (expected, its_blob)))
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert manifest.counters == Counters(version, 100 * version, 0.5 * version, 1e-3)
    assert tensors["x"].tolist() == [float(version)] * 4
    assert int(path.name) == version
    return version


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.0),
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
        "state": torch.Generator().manual_seed(3).get_state(),
        "empty": torch.empty(0, 2),
    }
    counters = Counters(policy_version=12, steps=3456, seconds=7.25, learning_rate=1 / 3)
    path = save(tmp_path, counters, b"the policy", tensors, FINGERPRINT, 4)
    assert path == tmp_path / "000000012"
    assert (path / "policy.safetensors").read_bytes() == b"the policy"
    loaded = load_newest(tmp_path, FINGERPRINT)
    assert loaded is not None
    manifest, found, where, _ = loaded
    assert where == path
    assert manifest.counters == counters
    assert (manifest.fingerprint, manifest.learner_incarnation) == (FINGERPRINT, 4)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_one_without_worlds_has_no_file_for_them(tmp_path: Path) -> None:
    path = save(tmp_path, Counters(policy_version=4), b"", {}, FINGERPRINT, 0, {})
    assert {file.name for file in path.iterdir()} == {*FILES} - {"worlds.safetensors"}
    loaded = load_newest(tmp_path, FINGERPRINT)
    assert loaded is not None
    assert loaded.worlds == {}


def test_a_number_that_is_not_finite_is_refused_but_where_it_means_nothing(tmp_path: Path) -> None:
    tensors = {"episodes.arrival_s": torch.tensor([1.0, math.nan])}
    save(tmp_path, Counters(policy_version=4), b"", tensors, FINGERPRINT, 0)
    with pytest.raises(ValueError, match=r"network\.0 is not finite"):
        save(tmp_path, Counters(policy_version=5), b"", {"network.0": torch.tensor([math.nan])}, FINGERPRINT, 0)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [4]


def test_one_of_format_1_loads(tmp_path: Path) -> None:
    """It was written by the version before there were worlds in checkpoints."""
    config = build_config(read_config(OF_FORMAT_1 / "config.toml"))
    spec = read_spec((OF_FORMAT_1 / "spec.json").read_bytes())
    loaded = load_newest(OF_FORMAT_1 / "checkpoints", spec.fingerprint)
    assert loaded is not None
    assert (loaded.manifest.format, loaded.worlds) == (1, {})
    assert loaded.manifest.counters.policy_version == 4
    training = WholeTraining(config, spec, torch.device("cpu"))
    training.set_state(loaded.tensors)
    assert training.weights() == (loaded.path / "policy.safetensors").read_bytes()
    said = describe_resume(loaded, config)
    assert (
        said
        == "going on from version 4; 2 of 2 worlds begin new episodes: its checkpoint has format 1, which held none"
    )


def test_one_of_a_newer_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    manifest = msgspec.json.encode({"format": 3, "rustyrl": "7.8", "counters": "of another kind"})
    (path / "manifest.json").write_bytes(manifest)
    (path / "manifest.sha256").write_bytes(hashlib.sha256(manifest).hexdigest().encode())
    with pytest.raises(RunFailedError, match=r"000000002 has format 3.*up to 2.*wrote it, 7\.8.*--init"):
        load_newest(tmp_path, FINGERPRINT)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1, 2]  # it is not put aside


def test_a_checkpoint_holds_these_files(tmp_path: Path) -> None:
    assert tuple(sorted(file.name for file in write(tmp_path, 1).iterdir())) == FILES


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path, FINGERPRINT) is None
    assert load_newest(tmp_path / "missing", FINGERPRINT) is None
    assert list_checkpoints(tmp_path / "missing") == []


def test_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    for version in (2, 10, 9):
        write(tmp_path, version)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [2, 9, 10]
    assert loaded_version(tmp_path) == 10


def test_a_version_that_is_there_already_stays_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert save(tmp_path, Counters(policy_version=1, steps=999), b"other", {}, FINGERPRINT, 3) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_version_is_written_anew_when_training_comes_to_it_again(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / name).write_bytes(b"torn")
    assert loaded_version(tmp_path) == 1
    write(tmp_path, 2)
    assert loaded_version(tmp_path) == 2


def warned_of(caplog: pytest.LogCaptureFixture, path: Path) -> bool:
    return any(str(path) in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def put_back(path: Path) -> None:
    """A damaged checkpoint that was put aside."""
    (path.parent / f"damaged-{path.name}").rename(path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    whole = (path / name).read_bytes()
    for position in range(0, len(whole), 1 + len(whole) // 60):
        for bit in (0, 3, 7):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            (path / name).write_bytes(content)
            caplog.clear()
            assert loaded_version(tmp_path) == 1, (position, bit)
            assert warned_of(caplog, path)
            put_back(path)
    (path / name).write_bytes(whole)
    assert loaded_version(tmp_path) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_falls_back_to_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    whole = (path / name).read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (path / name).write_bytes(whole[:length])
        caplog.clear()
        assert loaded_version(tmp_path) == 1, length
        assert warned_of(caplog, path)
        put_back(path)
    (path / name).write_bytes(whole + b"\0")
    assert loaded_version(tmp_path) == 1


def test_flipped_at_random_places_no_damage_goes_unseen(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    for _ in range(200):
        name = FILES[rng.integers(len(FILES))]
        whole = (path / name).read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        cut = int(rng.integers(1, len(whole))) if rng.random() < 0.3 else len(whole)
        (path / name).write_bytes(damaged[:cut])
        assert loaded_version(tmp_path) == 1, name
        put_back(path)
        (path / name).write_bytes(whole)
    assert loaded_version(tmp_path) == 2


def test_a_missing_file_falls_back_to_the_checkpoint_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        caplog.clear()
        assert loaded_version(tmp_path) == 1, file.name
        assert warned_of(caplog, path)
        put_back(path)
        file.write_bytes(content)
    assert loaded_version(tmp_path) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_for_no_fault_of_its_own_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for version in (1, 2):
        write(tmp_path, version)

    def refused(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Path, "read_bytes", refused)
        with pytest.raises(RunFailedError, match="000000002 cannot be read"):
            load_newest(tmp_path, FINGERPRINT)
    assert loaded_version(tmp_path) == 2


def test_one_that_is_not_whole_is_put_aside_so_that_no_better_one_is_removed_for_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for version in (7, 8, 9):
        (write(tmp_path, version) / "manifest.json").unlink()
    assert loaded_version(tmp_path) == 1
    assert [path.name for path in list_checkpoints(tmp_path)] == ["000000001"]
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == [f"damaged-00000000{v}" for v in (7, 8, 9)]
    write(tmp_path, 2)
    prune(tmp_path, 1, set())
    assert loaded_version(tmp_path) == 2


def test_nothing_is_put_aside_if_nothing_is_whole(tmp_path: Path) -> None:
    """Or the next try would start anew, in silence, over what somebody may still rescue."""
    (write(tmp_path, 1) / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(RunFailedError, match="none of the 1 checkpoints"):
            loaded_version(tmp_path)


def test_a_whole_checkpoint_is_loaded_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    assert loaded_version(tmp_path) == 1
    assert not caplog.records


def test_files_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    shutil.copy(first / "learner.safetensors", second / "learner.safetensors")
    assert loaded_version(tmp_path) == 1


def test_when_every_checkpoint_is_broken_the_run_fails(tmp_path: Path) -> None:
    for version in (1, 2):
        (write(tmp_path, version) / "learner.safetensors").write_bytes(b"")
    with pytest.raises(RunFailedError, match="none of the 2 checkpoints"):
        load_newest(tmp_path, FINGERPRINT)


def test_a_checkpoint_of_another_environment_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, fingerprint="fedcba9876543210")
    with pytest.raises(RunFailedError, match=r"fedcba9876543210.*0123456789abcdef.*--init"):
        load_newest(tmp_path, FINGERPRINT)


def test_half_written_folders_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, 1)
    partial = tmp_path / ".000000002.partial"
    shutil.copytree(tmp_path / "000000001", partial)
    (tmp_path / "000000003").write_text("no folder")
    (tmp_path / "000000004.old").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["000000001"]
    assert loaded_version(tmp_path) == 1


def test_what_a_crash_left_half_written_does_not_hinder_the_next_attempt(tmp_path: Path) -> None:
    partial = tmp_path / ".000000002.partial"
    partial.mkdir()
    (partial / "stale").write_text("of the crash")
    path = write(tmp_path, 2)
    assert not (path / "stale").exists()
    assert not partial.exists()
    assert loaded_version(tmp_path) == 2


def test_a_failure_while_writing_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    synced: list[int] = []

    def full_disk(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 2)
    assert loaded_version(tmp_path) == 1
    write(tmp_path, 2)
    assert loaded_version(tmp_path) == 2


def test_every_byte_is_synced_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = checkpoint.os.fsync

    def watched(descriptor: int) -> None:
        synced.append((tmp_path / "000000001").exists())
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", watched)
    path = write(tmp_path, 1)
    files = len(list(path.iterdir()))
    assert synced == [False] * (files + 1) + [True]  # each file and the folder; then the folder above, renamed into


@pytest.mark.parametrize(
    ("kept", "protected", "left"),
    [
        (2, set(), [4, 5]),
        (1, {2}, [2, 5]),
        (1, {5}, [5]),
        (3, {1, 99}, [1, 3, 4, 5]),
        (9, set(), [1, 2, 3, 4, 5]),
    ],
)
def test_prune_keeps_the_newest_and_the_protected(
    tmp_path: Path, kept: int, protected: set[int], left: list[int]
) -> None:
    for version in range(1, 6):
        write(tmp_path, version)
    (tmp_path / ".000000006.partial").mkdir()
    prune(tmp_path, kept, protected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{version:09d}" for version in left]
    assert loaded_version(tmp_path) == 5


class Training:
    """Networks, optimiser and shuffles, saved and restored as the learner does."""

    def __init__(self, seed: int) -> None:
        observation = (ArraySpec("main", (5,), "float32"),)
        action = ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0))
        spec = PolicySpec(observation, (action,), (16, 16), "tanh", normalize=False)
        torch.manual_seed(seed)
        self.network = ActorCritic(spec, shared=False, initial_log_std=0.0)
        parameters, gradient = self.network.flat()
        self.optimizer = Adam(parameters.tensor, gradient.tensor, epsilon=1e-5)
        self.shuffle = torch.Generator().manual_seed(seed)
        self.rate = 1e-3

    def update(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        columns: list[Any] = [torch.randn(48, generator=generator) for _ in range(5)]
        observation, action = (torch.randn(48, width, generator=generator) for width in (5, 2))
        batch = TrainingBatch(observation, action, None, *columns)
        self.rate = ppo_update(self.network, self.optimizer, batch, CONFIG, self.rate, self.shuffle).learning_rate

    def save(self, folder: Path, version: int) -> None:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= self.optimizer.tensors()
        tensors["shuffle"] = self.shuffle.get_state()
        save(folder, Counters(policy_version=version, learning_rate=self.rate), b"", tensors, FINGERPRINT, 0)

    def load(self, folder: Path) -> None:
        loaded = load_newest(folder, FINGERPRINT)
        assert loaded is not None
        manifest, tensors, *_ = loaded
        prefix = "network."
        self.network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.optimizer.set_tensors(tensors)
        self.shuffle.set_state(tensors["shuffle"])
        self.rate = manifest.counters.learning_rate

    def bits(self) -> dict[str, Tensor]:
        return {**self.network.state_dict(), **self.optimizer.tensors()}


@pytest.mark.parametrize("stopped_after", [0, 1, 3])
def test_continued_training_equals_uninterrupted_training_in_bits(tmp_path: Path, stopped_after: int) -> None:
    straight = Training(seed=0)
    for number in range(5):
        straight.update(number)
    first = Training(seed=0)
    for number in range(stopped_after):
        first.update(number)
    first.save(tmp_path, stopped_after)
    second = Training(seed=1)
    if stopped_after:
        second.update(99)  # whatever it did before, it is overwritten
    second.load(tmp_path)
    for number in range(stopped_after, 5):
        second.update(number)
    assert second.rate == straight.rate
    assert second.bits().keys() == straight.bits().keys()
    for name, tensor in straight.bits().items():
        assert torch.equal(second.bits()[name], tensor), name
    assert torch.equal(second.shuffle.get_state(), straight.shuffle.get_state())
