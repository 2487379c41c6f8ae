"""What is kept of a process that died says how it ended and what it was doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rustyrl.black_box import BlackBox
from rustyrl.crash import SHOWN_SLOTS, describe_deed, describe_end, write_crash
from rustyrl.processes import Child

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no black boxes there")


@pytest.fixture
def box() -> Iterator[BlackBox]:
    box = BlackBox.create()
    assert box is not None
    yield box
    box.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    process = subprocess.Popen([sys.executable, "-S", "-E", "-c", ""])
    process.wait(60)
    child = Child("actor 3", process, tmp_path / "log", -1)
    yield child
    child.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "code 0"),
        (1, "code 1"),
        (-signal.SIGKILL, "signal 9 (SIGKILL)"),
        (-signal.SIGSEGV, "signal 11 (SIGSEGV)"),
        (-63, "signal 63 (unnamed)"),
    ],
)
def test_an_end_is_told_in_words(code, words):
    assert describe_end(code) == words


def test_without_a_black_box_nothing_is_said():
    assert describe_deed(None, 7) == []


def test_who_had_nothing_to_do_was_waiting(box):
    box.rest(5)
    assert describe_deed(box, 7) == ["it was waiting for tickets, having answered 5"]


def test_a_world_that_is_being_built_has_no_step_and_no_action_yet(box):
    box.actions({"turn": np.zeros((2,), np.int32)}, {2: slice(0, 2)})  # of the ticket before
    box.note(2, 9, 9, -1)
    assert describe_deed(box, 7) == [
        "world 2 was being built or reset for batch 9",
        "its seed: (7, 2, 9) (run seed, world, batch that its episodes began with)",
    ]


@pytest.mark.parametrize("step", [0, 12])
def test_a_step_is_told_with_seed_and_the_actions_of_its_slots(box, step):
    arrays = box.actions({"turn": np.zeros((4,), np.int32), "move": np.zeros((4, 1), np.float32)}, {2: slice(1, 3)})
    arrays["turn"][...] = [1, 2, 3, 4]
    arrays["move"][...] = [[0.5], [1 / 3], [-2.0], [9.0]]
    box.note(2, 9, 4, step)
    assert describe_deed(box, 7) == [
        f"world 2 was in env step {step} of the unroll for batch 9",
        "its seed: (7, 2, 4) (run seed, world, batch that its episodes began with)",
        "last action, part 'turn', slots 0 to 1:\n[2, 3]",
        "last action, part 'move', slots 0 to 1:\n[[ 0.333333],\n [-2.      ]]",
    ]


@pytest.mark.parametrize(("slots", "more"), [(SHOWN_SLOTS, ""), (SHOWN_SLOTS + 1, " (of 17)"), (500, " (of 500)")])
def test_of_many_slots_the_first_are_told(box, slots, more):
    arrays = box.actions({"turn": np.zeros((slots,), np.int32)}, {0: slice(0, slots)})
    arrays["turn"][...] = np.arange(slots)
    box.note(0, 0, 0, 0)
    head, shown = describe_deed(box, 7)[2].split("\n", 1)
    assert head == f"last action, part 'turn', slots 0 to 15{more}:"
    assert [int(number) for number in shown.strip("[]").split(",")] == list(range(16))


def test_an_action_with_many_numbers_is_told_in_full(box):
    arrays = box.actions({"move": np.zeros((16, 200), np.int32)}, {0: slice(0, 16)})
    arrays["move"][...] = np.arange(3200).reshape(16, 200)
    box.note(0, 0, 0, 0)
    assert "..." not in describe_deed(box, 7)[2]


def test_actions_that_were_not_kept_are_not_told(box):
    box.note(2, 9, 4, 3)
    assert len(describe_deed(box, 7)) == 2


def test_a_record_holds_what_is_known_line_by_line(tmp_path, child):
    path = write_crash(tmp_path / "deep" / "crashes", child, "ended with code 1", ["a", "b"], "Traceback\nError: é")
    assert path is not None
    assert path.parent == tmp_path / "deep" / "crashes"
    assert path.name.startswith("actor-3-")
    assert path.name.endswith(f"-{child.pid}.txt")
    assert path.read_text(encoding="utf-8") == (
        f"actor 3, process {child.pid}, ended with code 1\na\nb\n\nTraceback\nError: é\n"
    )


def test_a_record_that_cannot_be_written_is_none(tmp_path, child):
    (tmp_path / "crashes").write_text("a file in the way")
    assert write_crash(tmp_path / "crashes", child, "ended", [], "") is None
