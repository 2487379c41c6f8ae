"""Which checkpoints a run can go on from to the same bits, what is said of the others, and what copying may cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rustyrl.config import build_config
from rustyrl.wire import WorldState, encode_world_state
from rustyrl_learner import checkpoint, checkpoint_keeper
from rustyrl_learner.checkpoint import Counters, Loaded, list_checkpoints, load_newest
from rustyrl_learner.checkpoint_keeper import CheckpointKeeper, describe_resume
from rustyrl_learner.checkpoint_writer import CheckpointWriter, Written
from rustyrl_learner.gathering import Gathering, KeptWorld

FINGERPRINT = "0123456789abcdef"
KEPT = 2
CONFIG = build_config({
    "run": {"env": "cartpole", "checkpoints_kept": KEPT, "checkpoint_every": 10},
    "batch": {"worlds": 2, "max_policy_lag": 0},
})  # fmt: skip


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[CheckpointKeeper]:
    writer = CheckpointWriter(tmp_path, KEPT, FINGERPRINT, 0)
    yield CheckpointKeeper(CONFIG, writer)
    writer.close(10.0)


def state(world: int, batch: int) -> KeptWorld:
    return encode_world_state(world, batch, 0, {"x": np.full(3, float(batch))})


def copies(keeper: CheckpointKeeper, batch: int, *came: int, dead: bool = False) -> None:
    """A batch edge at which copies of these worlds come in time; the owner of the others is too slow, or dead."""
    gathering = Gathering(batch)
    gathering.ask(b"quick", came)
    gathering.ask(b"slow", tuple({0, 1} - set(came)))

    def ask() -> Gathering:
        for world in came:
            message, blob = state(world, batch)
            assert gathering.take(b"quick", message, memoryview(blob))
        if dead:
            gathering.lose(b"slow")
        if not gathering.givers:
            gathering.done.set()
        return gathering

    keeper.leave_edge()
    keeper.gather(ask, lambda: time.monotonic() - 1)


def write(keeper: CheckpointKeeper, version: int, seconds: float | None = None) -> list[Written]:
    now = Counters(version, seconds=float(version) if seconds is None else seconds)
    keeper.begin(now, b"policy", {"x": torch.ones(1)}, set())
    found = []
    while keeper.writer.busy:
        for written in keeper.writer.ended(10.0):
            keeper.note(written)
            found.append(written)
    return found


def exact_at(keeper: CheckpointKeeper, version: int) -> None:
    copies(keeper, version, 0, 1)
    (written,) = write(keeper, version)
    assert written.exact
    assert keeper.explain(written) == ""


def inexact_at(keeper: CheckpointKeeper, version: int, seconds: float | None = None) -> str:
    """One in the middle of a batch; what is said of it."""
    keeper.leave_edge()
    (written,) = write(keeper, version, seconds)
    return keeper.explain(written)


def resumed(folder: Path, said: list[str] | None = None) -> Loaded:
    loaded = load_newest(folder, FINGERPRINT, (said if said is not None else []).append, exact=True)
    assert loaded is not None
    return loaded


def versions(folder: Path) -> list[int]:
    return [int(path.name) for path in list_checkpoints(folder)]


@pytest.mark.parametrize("came", [(), (0,)])
def test_copies_that_come_too_late_make_no_edge_and_take_nothing_from_exactness(keeper, came):
    exact_at(keeper, 100)
    copies(keeper, 104, *came)
    assert not keeper.at_edge
    assert keeper.keeps_worlds
    assert keeper.stays_behind(Counters(104, seconds=104.0)) == 4
    exact_at(keeper, 105)  # they are asked for again


def test_a_first_try_that_takes_too_long_is_not_the_last(keeper):
    copies(keeper, 1)
    exact_at(keeper, 2)


@pytest.mark.parametrize("came", [(), (0,)])
def test_a_checkpoint_without_worlds_that_were_too_slow_is_incomplete(keeper, tmp_path, came):
    exact_at(keeper, 100)
    copies(keeper, 104, *came)
    (written,) = write(keeper, 104)
    assert (written.worlds, written.incomplete) == (0, True)
    said: list[str] = []
    assert resumed(tmp_path, said).manifest.counters.policy_version == 100
    (message,) = said
    assert message == (
        "the newest checkpoint, of version 104, lacks worlds: going back to version 100, the newest exact one; 4 "
        "updates are done again, to the same bits"
    )


def test_one_that_lacks_the_worlds_of_a_dead_actor_is_exact(keeper, tmp_path):
    exact_at(keeper, 100)
    copies(keeper, 104, 0, dead=True)
    assert keeper.at_edge
    (written,) = write(keeper, 104)
    assert (written.worlds, written.exact) == (1, True)
    assert resumed(tmp_path).manifest.counters.policy_version == 104


def test_copies_that_a_broken_receive_thread_cut_short_are_not_all():
    gathering = Gathering(5)
    gathering.ask(b"a", (0, 1))
    message, blob = state(0, 5)
    assert gathering.take(b"a", message, memoryview(blob))
    gathering.broken = True
    gathering.done.set()
    assert gathering.end() is None


def test_the_exact_one_outlives_the_incomplete_and_a_stop_says_what_a_resume_does(keeper, tmp_path):
    exact_at(keeper, 100)
    for version in (101, 102, 103):
        said = inexact_at(keeper, version)
    assert versions(tmp_path) == [100, 102, 103]
    assert "a resumed run goes on from version 100 and does 3 updates again, to the same bits" in said
    assert keeper.stays_behind(Counters(105, seconds=105.0)) == 5
    assert resumed(tmp_path).manifest.counters.policy_version == 100
    exact_at(keeper, 104)
    assert versions(tmp_path) == [103, 104]
    assert resumed(tmp_path).manifest.counters.policy_version == 104


def test_one_that_is_begun_while_the_exact_one_is_written_spares_it(keeper, tmp_path):
    copies(keeper, 100, 0, 1)
    keeper.begin(Counters(100), b"policy", {"x": torch.ones(1)}, set())
    keeper.leave_edge()
    for version in (101, 102):
        keeper.begin(Counters(version), b"policy", {"x": torch.ones(1)}, set())
    while keeper.writer.busy:
        for written in keeper.writer.ended(10.0):
            keeper.note(written)
    assert versions(tmp_path) == [100, 101, 102]


def test_too_much_training_is_not_given_up(keeper, tmp_path):
    exact_at(keeper, 100)
    assert "begins new episodes where it lacks them" in inexact_at(keeper, 103, seconds=161.0)
    assert keeper.stays_behind(Counters(103, seconds=161.0)) is None
    loaded = resumed(tmp_path)
    assert loaded.manifest.counters.policy_version == 103
    assert "had gone on when its checkpoint was written, or their copies did not come" in describe_resume(
        loaded, CONFIG
    )
    inexact_at(keeper, 104, seconds=162.0)
    assert versions(tmp_path) == [103, 104]  # nothing would go back as far as 100


def test_where_exactness_is_not_wanted_the_newest_is_taken(keeper, tmp_path):
    exact_at(keeper, 100)
    inexact_at(keeper, 103)
    loaded = load_newest(tmp_path, FINGERPRINT)
    assert loaded is not None
    assert loaded.manifest.counters.policy_version == 103


def test_versions_that_are_come_to_again_take_the_place_of_incomplete_ones(keeper, tmp_path):
    exact_at(keeper, 100)
    inexact_at(keeper, 102)
    inexact_at(keeper, 103)
    keeper.take_up(resumed(tmp_path))
    assert keeper.exact == Counters(100, seconds=100.0)
    exact_at(keeper, 102)
    assert versions(tmp_path) == [100, 102]  # and 103 is to be done again
    assert resumed(tmp_path).manifest.counters.policy_version == 102
    assert inexact_at(keeper, 102) == ""  # the exact one of that version stays
    assert resumed(tmp_path).manifest.counters.policy_version == 102
    assert not list(tmp_path.glob(".*"))


def test_a_learner_whose_worlds_never_could_be_had_writes_no_incomplete_ones(keeper):
    gathering = Gathering(1)
    gathering.ask(b"a", (0, 1))
    for world in (0, 1):
        gathering.take(b"a", WorldState(world, 0, 0, ()), memoryview(b""))
    gathering.done.set()
    keeper.gather(lambda: gathering, lambda: float("inf"))
    (written,) = write(keeper, 1)
    assert not written.incomplete
    keeper.gather(lambda: pytest.fail("asked in vain"), lambda: float("inf"))


def test_worlds_that_cannot_be_written_do_not_cost_the_rest(keeper, tmp_path, monkeypatch):
    exact_at(keeper, 100)
    for version in (101, 102, 103):
        copies(keeper, version, 0, 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "pack_worlds", lambda _: 1 / 0)
            (written,) = write(keeper, version)
        assert (written.problem, written.worlds, written.incomplete) == ("", 0, True)
    assert "could not be written (ZeroDivisionError: division by zero); a resumed run goes on from version 100" in (
        keeper.explain(written)
    )
    assert versions(tmp_path) == [100, 102, 103]
    newest = load_newest(tmp_path, FINGERPRINT)
    assert newest is not None
    assert newest.tensors["x"].tolist() == [1.0]


def test_copying_that_is_slow_is_done_less_often_and_said_once(keeper, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(checkpoint_keeper.time, "monotonic", lambda: clock[0])
    said: list[str] = []

    def edge(copy_s: float) -> None:
        gathering = Gathering(10)

        def ask() -> Gathering:
            clock[0] += copy_s
            gathering.done.set()
            return gathering

        keeper.gather(ask, lambda: float("inf"))
        keeper.begin(Counters(10), b"", {}, set())

    def due_after(waited_s: float, version: int = 11) -> bool:
        keeper.writer._waiting = 0  # the disk is not what this is about
        clock[0] += waited_s
        due = keeper.is_due(version, said.append)
        clock[0] -= waited_s
        return due

    edge(0.01)
    assert due_after(0.5, version=20)
    assert not due_after(4.9)
    assert due_after(5.1)
    assert said == []
    edge(2.0)
    assert not due_after(39.0, version=20)
    assert due_after(41.0)
    edge(10.0)
    assert not due_after(59.0)
    assert due_after(61.0)  # a run that is killed does not lose more
    (message,) = said
    assert "training stood still for 2.0 s; it is done every 40 s" in message
