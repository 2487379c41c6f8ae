"""Checkpoints written beside training: as things stood when they were asked for, and a failure is only told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clusters import poll

from rustyrl_learner import checkpoint, checkpoint_writer
from rustyrl_learner.checkpoint import Counters, list_checkpoints, load_newest
from rustyrl_learner.checkpoint_writer import CheckpointWriter, Written

FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(tmp_path, 2, FINGERPRINT, 3)
    yield writer
    writer.close(10.0)
    assert not writer._thread.is_alive()


def begin(writer: CheckpointWriter, version: int, tensor: torch.Tensor | None = None, protected: tuple[int, ...] = ()):
    tensor = torch.full((3,), float(version)) if tensor is None else tensor
    writer.begin(counters(version), b"policy %d" % version, {"x": tensor}, set(protected))


def counters(version: int) -> Counters:
    return Counters(version, 100 * version, 1.0, 1e-3)


def finish(writer: CheckpointWriter) -> list[Written]:
    """Everything that is being written, in order."""
    found: list[Written] = []
    while writer.busy:
        more = writer.ended(10.0)
        assert more
        found += more
    return found


@pytest.fixture
def held(monkeypatch) -> Iterator[threading.Event]:
    """The disk is slow: writing goes on when the event is set."""
    go = threading.Event()
    save = checkpoint.save

    def slow(*arguments, **named):
        assert go.wait(10.0)
        return save(*arguments, **named)

    monkeypatch.setattr(checkpoint_writer.checkpoint, "save", slow)
    yield go
    go.set()


def test_what_is_written_is_as_it_was_when_it_was_asked_for(tmp_path, writer, held):
    weights = torch.arange(6.0).reshape(2, 3)
    weights.requires_grad_()
    begin(writer, 4, weights)
    with torch.no_grad():
        weights += 100.0  # training goes on
    held.set()
    assert finish(writer) == [Written(counters(4), tmp_path / "000000004")]
    loaded = load_newest(tmp_path, FINGERPRINT)
    assert loaded is not None
    manifest, tensors, path, _ = loaded
    assert tensors["x"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert manifest.counters == Counters(4, 400, 1.0, 1e-3)
    assert manifest.learner_incarnation == 3
    assert (path / "policy.safetensors").read_bytes() == b"policy 4"


def test_it_is_busy_until_the_end_has_been_told(writer, held):
    assert not writer.busy
    assert writer.ended() == []
    assert writer.ended(10.0) == []  # nothing is under way, so nothing is waited for
    begin(writer, 1)
    assert writer.busy
    assert writer.ended() == []  # at once
    assert writer.ended(0.01) == []
    held.set()
    poll(lambda: not writer._ended.empty(), "the end")
    assert writer.busy  # so that no other is begun before this one was told
    assert [written.version for written in writer.ended()] == [1]
    assert not writer.busy
    assert writer.write_s > 0


def test_they_are_written_in_order_and_told_together(writer, held):
    for version in (1, 2, 3):
        begin(writer, version)
    held.set()
    poll(lambda: writer._ended.qsize() == 3, "three ends")
    assert [written.version for written in writer.ended()] == [1, 2, 3]


def test_only_the_first_is_waited_for(writer, monkeypatch):
    """Training goes on as soon as there is something to be told."""
    go = threading.Event()
    save = checkpoint.save

    def slow(folder, counters, *others, **named):
        assert counters.policy_version == 1 or go.wait(10.0)
        return save(folder, counters, *others, **named)

    monkeypatch.setattr(checkpoint_writer.checkpoint, "save", slow)
    begin(writer, 1)
    begin(writer, 2)
    started = time.monotonic()
    assert [written.version for written in writer.ended(8.0)] == [1]
    assert time.monotonic() - started < 8.0
    go.set()
    assert [written.version for written in finish(writer)] == [2]


def test_old_ones_are_removed_but_for_those_that_are_protected(tmp_path, writer):
    for version in range(1, 6):
        begin(writer, version, protected=(1, 2) if version < 5 else (1,))
    finish(writer)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1, 4, 5]


def test_a_failure_is_told_and_the_next_one_is_written(tmp_path, writer, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    begin(writer, 1)
    finish(writer)
    took_s = writer.write_s
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        begin(writer, 2)
        assert finish(writer) == [Written(counters(2), None, "OSError: [Errno 28] No space left on device")]
    assert writer.write_s == took_s  # which is of those that were written
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["000000001"]  # nothing half written
    begin(writer, 3)
    assert finish(writer) == [Written(counters(3), tmp_path / "000000003")]


def test_when_one_cannot_be_written_those_before_stay(tmp_path, writer, monkeypatch):
    """They are removed once a newer one is whole, not before."""
    for version in (1, 2):
        begin(writer, version)
    finish(writer)
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: 1 / 0)
    begin(writer, 3)
    assert [written.problem for written in finish(writer)] == ["ZeroDivisionError: division by zero"]
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1, 2]


def test_closing_waits_for_what_is_under_way(tmp_path):
    writer = CheckpointWriter(tmp_path, 3, FINGERPRINT, 0)
    for version in (1, 2, 3):
        begin(writer, version)
    writer.close(10.0)
    assert not writer._thread.is_alive()
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1, 2, 3]


def test_closing_waits_no_longer_than_its_limit(tmp_path, held):
    writer = CheckpointWriter(tmp_path, 3, FINGERPRINT, 0)
    begin(writer, 1)
    writer.close(0.01)
    assert writer._thread.is_alive()
    held.set()
    writer._thread.join(10.0)
    assert not writer._thread.is_alive()
