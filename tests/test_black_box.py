"""What an actor was doing can be read when it is gone: exactly, or not at all."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from rustyrl import black_box as module
from rustyrl.black_box import ACTIONS_AT, ALIGNMENT, LAYOUT_AT, ROOM, BlackBox, Deed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not inherited there")

ACTION = {"move": np.zeros((6, 2), np.float32), "turn": np.zeros((6,), np.int32)}
COLUMNS = {3: slice(0, 4), 11: slice(4, 6)}


@pytest.fixture
def box() -> Iterator[BlackBox]:
    box = BlackBox.create()
    assert box is not None
    yield box
    box.close()


def open_descriptors() -> int:
    return psutil.Process().num_fds() if sys.platform == "linux" else 0


def act_and_die(box: BlackBox, program: str) -> None:
    """Have a child process that inherited the box do what the program says, and kill it in the middle."""
    head = (
        "import os, signal, sys; import numpy as np; from rustyrl.black_box import BlackBox; "
        "box = BlackBox(int(sys.argv[1]))\n"
    )
    dying = "\nos.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", head + program + dying, str(box.descriptor)],
        pass_fds=(box.descriptor,),
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL


def test_who_is_killed_in_a_step_leaves_the_step_and_the_exact_actions(box):
    act_and_die(
        box,
        """
box.rest(17)
arrays = box.actions(
    {"move": np.zeros((6, 2), np.float32), "turn": np.zeros((6,), np.int32)}, {3: slice(0, 4), 11: slice(4, 6)}
)
arrays["move"][...] = np.random.default_rng(5).normal(size=(6, 2))
arrays["turn"][...] = [1, -2, 3, -4, 5, 2**31 - 1]
box.note(3, 41, 40, 0)
box.note(11, 41, 7, 6)
""",
    )
    assert box.deed() == Deed(world=11, batch=41, built=7, step=6)
    assert not box.deed().idle
    assert box.answered == 17
    last = box.last_action()
    assert last is not None
    assert list(last) == ["move", "turn"]
    expected = np.random.default_rng(5).normal(size=(6, 2)).astype(np.float32)[4:]
    assert last["move"].tobytes() == expected.tobytes()
    assert last["turn"].tolist() == [5, 2**31 - 1]
    assert (last["move"].dtype, last["turn"].dtype) == (np.float32, np.int32)


def test_at_first_it_rests_and_nothing_is_known_of_actions(box):
    assert box.deed() == Deed(-1, 0, 0, -1)
    assert box.deed().idle
    assert box.answered == 0
    assert box.last_action() is None


def test_every_deed_and_rest_is_told(box):
    box.note(0, 5, 5, -1)
    assert box.deed() == Deed(0, 5, 5, -1)
    assert not box.deed().idle  # world 0 is a world
    box.note(0, 5, 5, 0)
    box.rest(3)
    assert box.answered == 3
    assert box.deed().idle
    box.note(1, 2**40, 2**41, 2**42)
    assert box.deed() == Deed(1, 2**40, 2**41, 2**42)
    assert box.answered == 3  # what is done next does not take it back
    box.rest()
    assert box.answered == 0


def test_the_arrays_are_the_memory_and_each_world_has_its_slots(box):
    arrays = box.actions(ACTION, COLUMNS)
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (ACTION[name].shape, ACTION[name].dtype)
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.any()
    arrays["move"][...] = np.arange(12).reshape(6, 2)
    arrays["turn"][...] = np.arange(6)
    for world, columns in COLUMNS.items():
        box.note(world, 0, 0, 0)
        last = box.last_action()
        assert last is not None
        assert last["move"].tolist() == arrays["move"][columns].tolist()
        assert last["turn"].tolist() == arrays["turn"][columns].tolist()
    box.note(4, 0, 0, 0)  # a world that has no slots there
    assert box.last_action() is None
    box.rest()
    assert box.last_action() is None


def test_what_was_read_stays_as_it_was(box):
    arrays = box.actions(ACTION, COLUMNS)
    box.note(3, 0, 0, 0)
    last = box.last_action()
    arrays["turn"][...] = 9
    assert last is not None
    assert last["turn"].tolist() == [0, 0, 0, 0]


def test_parts_do_not_overlap(box):
    """Sizes that are no multiple of the alignment, and none at all."""
    like = {f"part{n}": np.zeros((n,), np.uint8) for n in (0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1)}
    arrays = box.actions(like, {0: slice(0, 200)})
    for value, array in enumerate(arrays.values(), 1):
        array[...] = value
    box.note(0, 0, 0, 0)
    last = box.last_action()
    assert last is not None
    for value, (name, array) in enumerate(like.items(), 1):
        assert last[name].tolist() == [value] * len(array)


def test_other_worlds_take_the_memory_anew(box):
    first = box.actions(ACTION, COLUMNS)
    first["move"][...] = 7
    again = box.actions({"only": np.zeros((3,), np.float64)}, {8: slice(0, 3)})
    assert not again["only"].any()  # nothing of the actions before
    box.note(3, 0, 0, 0)
    assert box.last_action() is None
    box.note(8, 0, 0, 0)
    last = box.last_action()
    assert last is not None
    assert {name: array.tolist() for name, array in last.items()} == {"only": [0.0, 0.0, 0.0]}


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (1, False)])
def test_actions_that_do_not_fit_are_ordinary_arrays_and_are_not_known(box, spare, fits):
    box.actions(ACTION, COLUMNS)  # which are not to be taken for these
    like = {"wide": np.zeros((ROOM - ACTIONS_AT + spare,), np.uint8)}
    arrays = box.actions(like, {3: slice(0, 4)})
    assert arrays["wide"].shape == like["wide"].shape
    arrays["wide"][...] = 3
    box.note(3, 1, 2, 3)
    assert box.deed() == Deed(3, 1, 2, 3)  # they did not run over it
    last = box.last_action()
    assert (last is not None) == fits
    if last is not None:
        assert last["wide"].tolist() == [3, 3, 3, 3]


def test_worlds_that_are_too_many_to_be_named_are_not_known(box):
    """The layout has 4 KiB, ahead of the actions."""
    arrays = box.actions(
        {"turn": np.zeros((2000,), np.int8)}, {world: slice(world, world + 1) for world in range(2000)}
    )
    arrays["turn"][...] = 5
    box.note(3, 0, 0, 0)
    assert box.last_action() is None


def test_a_layout_as_long_as_its_room_does_not_touch_the_actions(box):
    def last_of(name: str) -> dict[str, np.ndarray] | None:
        arrays = box.actions({name: np.zeros((4,), np.uint8)}, {3: slice(0, 4)})
        arrays[name][...] = 255
        box.note(3, 0, 0, 0)
        return box.last_action()

    length = ACTIONS_AT - LAYOUT_AT
    while (last := last_of("x" * length)) is None:
        length -= 1
    assert last["x" * length].tolist() == [255] * 4
    (used,) = struct.unpack_from("=I", box._memory, LAYOUT_AT)
    assert LAYOUT_AT + 4 + used == ACTIONS_AT  # to the last byte


TORN = {
    "cut off": b'[{"turn":["<i4",[6],4096]},{"3":[0',
    "nothing": b"",
    "zeros": b"\0" * 20,
    "no text": b"\xff\xfe\xfd",
    "a number": b"5",
    "three": b"[1,2,3]",
    "an unknown type": b'[{"turn":["<q9",[6],4096]},{"3":[0,4]}]',
    "beyond the memory": b'[{"turn":["<i4",[600000],4096]},{"3":[0,4]}]',
    "a negative shape": b'[{"turn":["<i4",[-6],4096]},{"3":[0,4]}]',
    "an object": b'[{"turn":["|O",[6],4096]},{"3":[0,4]}]',
    "no slots": b'[{"turn":["<i4",[6],4096]},{"3":[]}]',
    "an entry too short": b'[{"turn":["<i4",[6]]},{"3":[0,4]}]',
    "a shape that is none": b'[{"turn":["<i4",6,4096]},{"3":[0,4]}]',
    "a list of slots": b'[{"turn":["<i4",[6],4096]},[[0,4]]]',
    "a list of parts": b'[[["<i4",[6],4096]],{"3":[0,4]}]',
    "slots that are no numbers": b'[{"turn":["<i4",[6],4096]},{"3":["a","b"]}]',
    "a shape that is too large": b'[{"turn":["<i4",[9223372036854775807],4096]},{"3":[0,4]}]',
    "a shape beyond any number": b'[{"turn":["<i4",[92233720368547758070],4096]},{"3":[0,4]}]',
    "no slot at all": b'[{"turn":["<i4",[],4096]},{"3":[0,4]}]',
}


@pytest.mark.parametrize("layout", TORN.values(), ids=TORN.keys())
def test_a_torn_layout_is_no_layout(box, layout):
    """An actor may die, or its memory be overwritten by a world's C code, anywhere."""
    box.note(3, 5, 5, 2)
    box._memory[LAYOUT_AT : LAYOUT_AT + 4] = struct.pack("=I", len(layout))
    box._memory[LAYOUT_AT + 4 : LAYOUT_AT + 4 + len(layout)] = layout
    assert box.last_action() is None
    assert box.deed() == Deed(3, 5, 5, 2)


@pytest.mark.parametrize("length", [3, ACTIONS_AT, ROOM, 2**32 - 1])
def test_a_torn_length_is_no_layout(box, length):
    box.actions(ACTION, COLUMNS)
    box.note(3, 5, 5, 2)
    box._memory[LAYOUT_AT : LAYOUT_AT + 4] = struct.pack("=I", length)
    assert box.last_action() is None


def test_a_child_that_dies_while_it_changes_the_layout_leaves_none(box, monkeypatch):
    box.actions(ACTION, COLUMNS)
    box.note(3, 0, 0, 0)

    def die(*arguments: object) -> None:
        raise SystemExit

    monkeypatch.setattr(box, "_array", die)
    with pytest.raises(SystemExit):
        box.actions({"other": np.zeros((2,), np.float32)}, {5: slice(0, 2)})
    monkeypatch.undo()
    assert box.last_action() is None  # not the actions of before under another name


def test_closing_gives_the_descriptor_back_even_while_an_array_is_in_use():
    before = open_descriptors()
    box = BlackBox.create()
    assert box is not None
    assert open_descriptors() == before + (sys.platform == "linux") * 2  # it, and the map's own
    arrays = box.actions(ACTION, COLUMNS)
    box.close()
    arrays["turn"][...] = 4  # still memory
    assert arrays["turn"].tolist() == [4] * 6
    assert box.descriptor == -1
    box.close()  # once more is nothing
    del arrays, box
    assert open_descriptors() == before


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
@pytest.mark.parametrize("refuse", ["memfd_create", "ftruncate"])
def test_without_memory_for_it_there_is_none_and_nothing_is_left_open(monkeypatch, refuse):
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    before = open_descriptors()
    monkeypatch.setattr(module.os, refuse, full)
    assert BlackBox.create() is None
    assert open_descriptors() == before


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this is what is done elsewhere")
def test_where_memory_has_no_name_a_file_without_one_does(monkeypatch):
    monkeypatch.delattr(module.os, "memfd_create")
    box = BlackBox.create()
    assert box is not None
    act_and_die(box, "box.note(1, 2, 3, 4)")
    assert box.deed() == Deed(1, 2, 3, 4)
    box.close()


def test_it_can_be_read_while_it_is_written(box):
    """The launcher looks whenever it likes: steps never go back, and a deed is read without an error."""

    def write() -> None:
        for step in range(20_000):
            box.note(step % 7, step, step, step)

    with ThreadPoolExecutor(1) as pool:
        done, seen = pool.submit(write), 0
        while not done.done():
            step = box.deed().step
            assert seen - 1 <= step < 20_000
            seen = step
    done.result()
    assert box.deed().step == 19_999
