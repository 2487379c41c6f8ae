"""The screen of `top` and `status`: it fits, it is complete, and it says what matters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import statuses
from rich.text import Text

from rustyrl import units
from rustyrl.actor_rows import ORDERS
from rustyrl.chart import bar, curve
from rustyrl.screen import Aspect, draw, spell

ALL = {
    "recorded": statuses.recorded,
    "slow": statuses.slow,
    "recovering": statuses.recovering,
    "starting": statuses.starting,
    "crowded": statuses.crowded,
    "one": lambda: statuses.with_actors(1),
    "nobody": lambda: statuses.with_actors(0),
}
FOOTER = Aspect(footer=Text("the last line"))


def screen(status, width=80, height=24, aspect=FOOTER) -> list[str]:
    return [line.plain for line in draw(status, width, height, aspect)]


def shown(status, width=80, height=24, aspect=FOOTER) -> str:
    return "\n".join(screen(status, width, height, aspect))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(80, 24), (160, 50), (120, 30), (100, 60), (60, 16), (40, 8), (20, 5)])
def test_every_screen_fits_its_terminal_to_the_cell(name, size):
    width, height = size
    lines = draw(ALL[name](), width, height, FOOTER)
    assert len(lines) == height
    assert lines[-1].plain.startswith("the last line")
    for line in lines:
        assert line.cell_len <= width
        assert "\n" not in line.plain
        assert "None" not in line.plain
        assert "nan" not in line.plain


def test_a_small_terminal_shows_eight_actors_and_what_a_run_is_judged_by():
    lines = screen(statuses.with_actors(8))
    assert lines[0].startswith("cartpole  running  0:43")
    assert lines[0].endswith("run cartpole-20260101-120000")
    text = "\n".join(lines)
    for words in ("SPS         16,160", "version        113", "steps      458,752", "waits          0 %", "return 500"):
        assert words in text, text
    for words in ("issued  460", "trained 448", "rejected  4", "lost      0", "in       547 KiB/s", "actors 8 of 8"):
        assert words in text, text
    rows = [line.split() for line in lines if line.strip()[:2].strip().isdigit() and "MiB" in line]
    assert [row[0] for row in rows] == [str(index) for index in range(8)]
    assert rows[7][1:5] == ["5259", "2", "3.84", "K"]


def test_the_actor_that_holds_the_batch_is_named_above_and_in_its_row():
    lines = screen(statuses.slow())
    assert lines[2] == "! actor 2 holds the batch: all others waited 97 % of the last seconds"
    (row,) = [line for line in lines if line.endswith("holds batch")]
    assert row.split()[0] == "2"
    assert "holds" not in shown(statuses.recorded())


def test_a_dead_learner_is_said_and_its_last_figures_are_dim():
    lines = draw(statuses.recovering(), 80, 24, FOOTER)
    text = "\n".join(line.plain for line in lines)
    assert "cartpole  recovering" in text
    assert "! the learner died at version 113; another one starts from the newest checkpoint" in text
    assert "! 1.3 s ago the learner (process 4000) ended with signal 9" in text
    assert "SPS              -" in text
    wide = shown(statuses.recovering(), 160, 50)
    assert "earlier learners     1  lost with them       8" in wide
    assert "/crash.txt" in wide


def test_before_the_first_report_dashes_stand_for_figures():
    text = shown(statuses.starting())
    assert "no curve yet" in text
    assert "starting" in [line.split()[-1] for line in text.splitlines() if line.strip().startswith("0 ")]
    assert "again in 2 s" in shown(statuses.starting(), 120, 30)


def test_many_actors_are_cut_and_can_be_scrolled_to_the_last():
    status = statuses.crowded()
    first = shown(status)
    assert "… 60 more" in first
    last = screen(status, aspect=Aspect(scroll=10_000))
    assert "… 59 above" in last[-1]
    assert "… 20 above, 39 more" in shown(status, aspect=Aspect(scroll=20))


def test_what_is_special_about_an_actor_is_said_in_its_row():
    text = shown(statuses.crowded(), 160, 200)
    by_index = {line.split()[0]: line for line in text.splitlines() if line[:5].strip().isdigit()}
    for index, note in {"3": "starting", "5": "leaving", "7": "holds batch", "9": "relieved", "11": "silent"}.items():
        assert by_index[index].endswith(note), by_index[index]
    assert by_index["12"].endswith("idle")
    assert by_index["64"].endswith("again in 2 s")
    assert by_index["1000"].endswith("joined by hand")
    assert "node-3.cluste…" in by_index["7"]
    for words in ("NVIDIA H200", "45 %", "reasons  warm-up 64, stale 3, malformed 4", "automatic 1 to 64", "1.23 G"):
        assert words in text


@pytest.mark.parametrize("order", ORDERS)
def test_orders_put_first_what_they_are_named_for(order):
    status = statuses.crowded()
    text = shown(status, 160, 200, Aspect(order=order))
    first = next(line.split()[0] for line in text.splitlines() if line[:5].strip().isdigit())
    expected = {"index": "0", "held": "7", "SPS": "64", "CPU": "0", "memory": "0", "seen": "64"}
    assert first == expected[order]
    assert order == "index" or f"by {order}" in text


def test_what_keeps_a_run_from_learning_is_said_above():
    status = statuses.recorded()
    status["learner"]["findings"] = [{"kind": "a", "message": "every reward is 0", "steps": 1}]
    assert screen(status)[2] == "! every reward is 0"
    status["learner"]["findings"].append({"kind": "b", "message": "values have exploded", "steps": 2})
    assert screen(status)[2] == "! 2 findings, the newest: values have exploded"
    assert "!" not in shown(statuses.recorded())
    assert "! insecure: whoever reaches" in shown(statuses.recorded(link={"address": "", "security": "insecure"}))


def test_the_screen_in_the_documents_is_what_is_drawn():
    page = (Path(__file__).parent.parent / "docs" / "status.md").read_text()
    shown_there = page.split("<!-- screen -->\n```\n")[1].split("```")[0]
    lines = screen(statuses.slow(), 80, None, Aspect())
    assert shown_there == "\n".join(line.rstrip() for line in lines) + "\n"


def test_terminals_without_these_characters_get_others():
    lines = [line.plain for line in spell(draw(statuses.slow(), 80, 24, FOOTER), "ascii")]
    assert all(line.isascii() for line in lines)
    assert lines[3].startswith("-- learner ------")
    assert "#####" in "".join(lines)
    assert "****" in "".join(lines)
    whole = draw(statuses.slow(), 80, 24, FOOTER)
    assert [line.plain for line in spell(whole, "utf-8")] == screen(statuses.slow())


def test_without_a_height_everything_is_there():
    lines = screen(statuses.crowded(), 100, None, Aspect())
    assert sum(line[:5].strip().isdigit() for line in lines) == 65
    assert not any(re.search(r"\d more", line) for line in lines)


def test_an_alert_comes_first_and_other_runs_beside_the_name():
    lines = screen(statuses.recorded(), aspect=Aspect(alert="the launcher does not answer", place="1 of 2, tab: next"))
    assert lines[2] == "! the launcher does not answer"
    assert lines[0].endswith("run cartpole-20260101-120000  1 of 2, tab: next")


def test_a_curve_goes_from_its_lowest_to_its_highest_and_has_no_gaps():
    lines = curve([(0, 0.0), (50, 0.0), (51, 10.0), (100, 10.0)], 30, 5)
    assert [len(line) for line in lines] == [30] * 5
    assert lines[0].startswith("     10┤")
    assert lines[3].startswith("      0┤")
    assert lines[4].endswith("100 steps")
    plotted = [line[8:] for line in lines[:4]]
    assert all(any(row[column] != "\u2800" for row in plotted) for column in range(22))
    assert all(any(character != "\u2800" for character in row) for row in plotted)  # the jump is a line
    flat = curve([(0, 5.0), (10, 5.0)], 30, 5)
    assert flat[2].startswith("      5┤")


def test_a_bar_is_never_empty_for_something():
    assert bar(0.0, 4) == "    "
    assert bar(1e-6, 4) == "▏   "
    assert bar(0.5, 4) == "██  "
    assert bar(1.0, 4) == "████"
    assert bar(7.0, 4) == "████"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (units.count(1234567), "1,234,567"),
        (units.count(None), "-"),
        (units.short(999.6), "1.00 K"),
        (units.short(30238.5), "30.2 K"),
        (units.short(1234567), "1.23 M"),
        (units.size(350265344), "334 MiB"),
        (units.size(512), "512 B"),
        (units.size(2**40 * 0.9999), "1.00 TiB"),
        (units.decimal(2.76e-05), "2.76e-5"),
        (units.decimal(-0.00716), "-0.00716"),
        (units.decimal(12345.6), "12,346"),
        (units.percent(0.011), "1 %"),
        (units.span(0.0953), "95 ms"),
        (units.span(9.96), "10 s"),
        (units.span(300), "5 min"),
        (units.span(7200), "2 h"),
        (units.clock(3723), "1:02:03"),
        (units.clock(14.9), "0:14"),
    ],
)
def test_units(said, expected):
    assert said == expected
