"""What keys do in `top`, with a launcher that the test plays."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import statuses
from clusters import poll

from rustyrl.control import ControlServer
from rustyrl.errors import UsageError
from rustyrl.keyboard import split_keys
from rustyrl.run_folder import ClusterFile, RunFolder
from rustyrl.top import describe_end
from rustyrl.viewer import Viewer


class PlayedLauncher:
    """A run folder and a control socket."""

    def __init__(self, folder: RunFolder, control: ControlServer) -> None:
        self.folder, self.control = folder, control
        self.status = statuses.recorded(run=str(folder.path))
        self.asked: list[tuple[bytes, dict[str, Any]]] = []

    def enter(self, state: str) -> None:
        self.folder.write_cluster(ClusterFile("cartpole", state, os.getpid(), self.control.address, "", 0, time.time()))

    def hear(self) -> None:
        """Answer questions for the status; keep orders."""
        for peer, message in self.control.receive(0.01, []):
            if message["kind"] == "status":
                self.control.send(peer, self.status)
            else:
                self.asked.append((peer, message))

    def show(self, viewer: Viewer, width: int = 80, height: int = 24) -> list[str]:
        """What is on the screen once the newest status is."""
        poll(lambda: (self.hear(), viewer.remote.turn() and viewer.remote.status == self.status)[1], "a status")
        return [line.plain for line in viewer.lines(width, height)]

    def order(self) -> tuple[bytes, dict[str, Any]]:
        """The order that comes."""
        poll(lambda: (self.hear(), self.asked)[1], "an order")
        return self.asked.pop()


@contextmanager
def play(path: Path) -> Iterator[PlayedLauncher]:
    with RunFolder(path, resume=False) as folder, ControlServer(folder.socket_address("control")) as control:
        launcher = PlayedLauncher(folder, control)
        launcher.enter("running")
        yield launcher


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[PlayedLauncher]:
    with play(tmp_path / "runs" / "one") as played:
        yield played


@pytest.fixture
def viewer(launcher: PlayedLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Viewer]:
    monkeypatch.chdir(tmp_path)
    with Viewer(launcher.folder.path, 0.02) as shown:
        yield shown


def test_a_status_is_drawn_and_one_that_does_not_come_is_said(launcher, viewer):
    assert "asking the launcher" in viewer.lines(80, 24)[0].plain
    lines = launcher.show(viewer)
    assert lines[0].startswith("cartpole  running")
    assert lines[-1].startswith(" + - scale  p pause")
    assert len(lines[-1]) <= 80
    poll(lambda: viewer.remote.turn() or viewer.remote.silent_s > 0, "the next question")
    viewer.remote._asked_at -= 3
    lines = [line.plain for line in viewer.lines(80, 24)]
    assert lines[2].startswith(f"! the launcher (process {os.getpid()}) has not answered for 3")
    assert "SPS" in lines[4]  # what was known stays
    assert launcher.show(viewer)[2].startswith("──")


def test_scaling_and_pausing_are_ordered_and_their_answers_shown(launcher, viewer):
    launcher.show(viewer)
    for key, ordered, answer, said in [
        (
            "+",
            {"kind": "scale", "actors": "+1", "now": False},
            {"before": 4, "actors": 5, "worlds": 8, "note": ""},
            "5 actors",
        ),
        ("-", {"kind": "scale", "actors": "-1", "now": False}, {"error": "-1 actors cannot be had"}, "cannot be had"),
        ("p", {"kind": "pause"}, {"state": "paused", "run": "x"}, "pause: the run is paused"),
    ]:
        viewer.press(key)
        peer, order = launcher.order()
        assert order == ordered
        launcher.control.send(peer, answer)
        # a status that comes before the answer is news too
        poll(lambda viewer=viewer, said=said: (viewer.remote.turn(), said in viewer.remote.said)[1], "the answer")
        assert said in viewer.lines(80, 24)[-1].plain
    launcher.status["state"] = "paused"
    launcher.show(viewer)
    viewer.press("p")
    assert launcher.order()[1] == {"kind": "unpause"}


def test_a_checkpoint_takes_its_time_and_the_screen_goes_on(launcher, viewer):
    launcher.show(viewer)
    viewer.press("c")
    peer, order = launcher.order()
    assert order == {"kind": "checkpoint"}
    launcher.status["seconds"] = 99.0
    lines = launcher.show(viewer)
    assert lines[0].startswith("cartpole  running  1:39")
    assert lines[-1] == " checkpoint: asked for"
    launcher.control.send(peer, {"version": 7, "checkpoint": "/runs/one/checkpoints/000000007"})
    poll(lambda: viewer.remote.turn() and "version 7" in viewer.remote.said, "the answer")
    assert viewer.lines(80, 24)[-1].plain == " checkpoint: version 7 is in checkpoints/000000007"


def test_who_holds_the_batch_is_relieved_and_nobody_else(launcher, viewer):
    launcher.show(viewer)
    viewer.press("r")
    assert "nobody holds the batch" in viewer.lines(80, 24)[-1].plain
    launcher.status = statuses.slow()
    launcher.show(viewer)
    viewer.press("r")
    peer, order = launcher.order()
    assert order == {"kind": "relieve", "index": 2}
    launcher.control.send(peer, {"index": 2, "worlds": 3})
    poll(lambda: viewer.remote.turn() and "3" in viewer.remote.said, "the answer")
    assert viewer.lines(80, 24)[-1].plain == " relieve: actor 2 gives its worlds, 3, to the others"


def test_a_stop_is_confirmed_first(launcher, viewer):
    launcher.show(viewer)
    viewer.press("s")
    assert "y: yes, any other key: no" in viewer.lines(80, 24)[-1].plain
    viewer.press("q")
    assert not viewer.left
    launcher.show(viewer)
    assert launcher.asked == []
    viewer.press("s")
    viewer.press("y")
    assert launcher.order()[1] == {"kind": "stop"}


def test_help_order_and_scrolling_change_what_is_shown(launcher, viewer):
    launcher.status = statuses.crowded()
    launcher.show(viewer)
    viewer.press("?")
    page = [line.plain for line in viewer.lines(80, 24)]
    assert len(page) <= 24
    assert max(map(len, page)) <= 80
    assert "any key goes back" in page[0]
    viewer.press("q")
    assert not viewer.left
    for key in ("down", "page down", "up"):
        viewer.press(key)
    assert "… 10 above" in viewer.lines(80, 24)[-2].plain
    viewer.press("end")
    viewer.press("page up")
    viewer.press("home")
    assert "… 60 more" in viewer.lines(80, 24)[-2].plain
    viewer.press("o")
    assert any("by held" in line.plain for line in viewer.lines(80, 24))
    viewer.press("q")
    assert viewer.left


def test_several_runs_are_told_apart_and_gone_through(launcher, viewer, tmp_path):
    launcher.show(viewer)
    viewer.press("n")
    assert "no other run goes on" in viewer.lines(80, 24)[-1].plain
    with play(tmp_path / "runs" / "two") as second:
        second.status["env"] = "drone"
        viewer.press("tab")
        assert viewer.remote.path.name == "two"
        lines = second.show(viewer)
        assert lines[0].startswith("drone")
        assert lines[0].endswith("run two  1 of 2, tab: next")
        viewer.press("n")
        assert viewer.remote.path.name == "one"
        assert launcher.show(viewer)[0].endswith("run one  2 of 2, tab: next")


def test_how_a_run_ended_is_said_in_one_line(launcher, viewer, tmp_path):
    path = launcher.folder.path
    assert not viewer.over
    assert "was killed while it was running" in describe_end(path)
    launcher.enter("failed")
    assert describe_end(path).endswith(f"failed; what there is to know is in {path / 'logs'}")
    launcher.folder.write_summary({"stopped_by": "goal", "seconds": 83.4, "steps": 123456})
    launcher.enter("finished")
    assert "is over: stopped by goal after 1:23 and 123,456 steps; the policy is" in describe_end(path)
    launcher.folder.close()
    launcher.folder._lock = os.open(os.devnull, os.O_RDONLY)  # closed once more by the fixture
    assert viewer.over
    with pytest.raises(UsageError, match="is over"):
        Viewer(path, 1.0)


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        ("q", ["q"]),
        ("+-", ["+", "-"]),
        ("\x1b[A\x1b[Bp", ["up", "down", "p"]),
        ("\x1bOA", ["up"]),
        ("\x1b[5~\x1b[6~", ["page up", "page down"]),
        ("\x1b[1;5Cq", ["q"]),  # Ctrl-right means nothing here, and must not press C
        ("\x1b", ["escape"]),
        ("\t\r", ["tab", "enter"]),
    ],
)
def test_keys_are_told_from_what_terminals_send_for_them(sent, keys):
    assert split_keys(sent) == keys
