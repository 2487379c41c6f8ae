"""`rustyrl top` and the endpoint on a real run, through a real terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import statuses
from clusters import SMALL, poll, rustyrl
from test_exporter import scrape
from typer.testing import CliRunner

from rustyrl.cli import app
from rustyrl.errors import UsageError

if sys.platform == "win32":
    pytest.skip("pseudo terminals are of Unix", allow_module_level=True)

from terminals import Terminal
from test_scaling import ENDLESS, await_status, end, verb


@pytest.fixture
def terminal(tmp_path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def begin(*arguments: str, **options) -> Terminal:
        opened.append(Terminal(*arguments, cwd=tmp_path, **options))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


def test_a_run_is_watched_and_steered_on_a_terminal_and_scraped(start, terminal):
    cluster = start(*ENDLESS, "--actors", "1", "--set", "cluster.prometheus=127.0.0.1:0")
    cluster.await_version(2)
    top = terminal("top", "--run", str(cluster.run), "--every", "0.1")
    top.await_text("actors 1 of 1")
    assert "running" in top.screen()
    top.press("+")
    status = await_status(cluster, lambda s: s["actors_wanted"] == 2 and len(s["actors"]) == 2, "another actor")
    top.await_text("of 2, 4 worlds")
    top.press("p")
    top.await_text("pause: the run is paused")
    top.press("p")
    top.await_text("unpause: the run is running")

    expected = {**statuses.recorded(), "actors_absent": []}
    assert status.keys() == expected.keys()  # so what is tested and documented is what there is
    assert status["actors"][0].keys() == expected["actors"][0].keys()
    for part in ("learner", "wire", "machine", "limits"):
        assert status[part].keys() - {"refused_messages"} == expected[part].keys() - {"refused_messages"}, part
    assert status["learner"]["cpu_percent"] > 0
    metrics = poll(lambda: (found := scrape(status["prometheus"])).get("rustyrl_actors") and found, "metrics")
    assert metrics["rustyrl_trained_steps_total"][()] > 0
    assert metrics["rustyrl_actors_wanted"][()] == 2

    await_status(cluster, lambda s: [a["ready"] for a in s["actors"]] == [True, True], "both to be ready")
    assert verb(cluster, "scale", "--relieve", "0")["index"] == 0
    status = await_status(cluster, lambda s: [a["worlds"] for a in s["actors"]] == [0, 4], "its worlds to move")
    assert status["actors"][0]["relieved"]
    with pytest.raises(UsageError, match="actor 0 is relieved already"):
        verb(cluster, "scale", "--relieve", "0")
    with pytest.raises(UsageError, match="nobody else is there to take the worlds of actor 1"):
        verb(cluster, "scale", "--relieve", "1")
    with pytest.raises(UsageError, match="no actor 7 to relieve; expected one of 0, 1"):
        verb(cluster, "scale", "--relieve", "7")
    top.await_text("relieved")
    answer = verb(cluster, "scale", "--auto", "1:3")
    assert (answer["before"], answer["actors"]) == (2, 2)
    top.await_text("automatic 1 to 3")
    with pytest.raises(UsageError, match="auto takes MIN:MAX"):
        verb(cluster, "scale", "--auto", "3")
    printed = CliRunner().invoke(app, ["status", "--run", str(cluster.run)]).stdout
    assert "counting.py:Counting  running" in printed
    assert "actors 2 of 2, automatic 1 to 3, 4 worlds" in printed

    top.press("q")
    assert top.wait() == 0
    assert f"{cluster.run} goes on" in top.drawn.replace("\r\n", "")
    terminated = terminal("top", "--run", str(cluster.run), "--every", "0.1")
    terminated.await_text("relieved")
    terminated.process.send_signal(signal.SIGTERM)
    assert terminated.wait() == 143
    url = status["prometheus"]
    end(cluster)
    with pytest.raises(OSError, match="refused"):
        scrape(url)


@pytest.mark.slow
def test_the_end_of_a_run_and_a_slow_actor_are_seen_on_the_screen(start, terminal):
    cluster = start("train", "cartpole", "--actors", "4", "--total-steps", "1000000000", *SMALL)
    cluster.await_version(2)
    top = terminal("top", "--run", str(cluster.run), width=160, height=50)
    top.await_text("actors 4 of 4")
    status = await_status(cluster, lambda s: all(a["rollouts"] for a in s["actors"]), "all to contribute")
    victim = status["actors"][2]["pid"]
    import psutil

    def slow_down() -> bool:
        psutil.Process(victim).suspend()
        held = verb(cluster, "status")["held_by"]
        psutil.Process(victim).resume()
        return held == [2]

    poll(slow_down, "it to be named")
    top.await_text("holds batch")
    top.press("r")
    await_status(cluster, lambda s: s["actors"][2]["relieved"] and not s["actors"][2]["worlds"], "it to be relieved")
    other = terminal("top", "--run", str(cluster.run))
    other.await_text("relieved")
    other.process.send_signal(signal.SIGINT)
    assert other.wait() == 130
    top.press("s")
    top.await_text("stop the run")
    top.press("y")
    assert top.wait() == 0
    assert "is over: stopped by stop" in top.drawn
    assert cluster.wait()[0] == 0


def test_top_without_a_terminal_says_what_to_do_instead(tmp_path):
    from test_viewer import play

    with play(tmp_path / "runs" / "one"):
        code, out, err = rustyrl("top", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "top needs a terminal; rustyrl status prints the same once" in err


@pytest.mark.parametrize("arguments", [[], ["3", "--auto", "1:2"], ["--auto", "1:2", "--relieve", "0"]])
def test_scale_takes_exactly_one_wish(arguments):
    done = CliRunner().invoke(app, ["scale", *arguments])
    assert isinstance(done.exception, UsageError)
    assert "one of N, --auto MIN:MAX and --relieve INDEX" in str(done.exception)


def test_now_goes_with_a_number_alone():
    done = CliRunner().invoke(app, ["scale", "--relieve", "1", "--now"])
    assert "--now goes with N" in str(done.exception)
