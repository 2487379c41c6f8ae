"""The screen that `top` shows live and `status` prints: from the status of a run to lines of a given width."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from rustyrl.actor_rows import actor_lines
from rustyrl.panels import curve_lines, is_down, learner_lines, machine_lines, traffic_lines
from rustyrl.units import clock, count, decimal, percent, span

__all__ = ["Aspect", "draw", "spell"]

WIDE = 120  # three columns from here on, else two
NARROWEST = 70  # for two
SIDE = 46  # width of the outer columns of three
GAP = 3
SHORTEST, SHORT = 14, 20  # lines that it takes for the learner's block, and for traffic and machine
TALLEST = 24  # curve
STATE_STYLES = {"running": "bold green", "failed": "bold red", "finished": "bold"}
QUIET_S = 5.0  # after so long a learner that says nothing is worth a line
CRASH_S = 60.0  # for so long a death is worth a line
ASCII = {ord(drawn): other for drawn, other in zip("─│┤└…█▏▎▍▌▋▊▉", "-||+~########", strict=True)}
ASCII |= {0x2800: " ", **{0x2800 + dots: "*" for dots in range(1, 256)}}  # braille patterns
Block = tuple[str, list[Text]]


@dataclass(frozen=True, slots=True)
class Aspect:
    """How the status is looked at.

    scroll, order: of the actors
    place: which of how many runs it is, or "" where that does not matter
    alert: a line of its own, before all others
    footer: the last line, None for none
    """

    scroll: int = 0
    order: str = "index"
    place: str = ""
    alert: str = ""
    footer: Text | None = None


def draw(status: dict[str, Any], width: int, height: int | None, aspect: Aspect) -> list[Text]:
    """The lines of the screen, each cut to the width; ``height`` None for as many as it takes."""
    lines = [_title(status, width, aspect), _subtitle(status), *_alerts(status, aspect)]
    if height is None or height >= SHORTEST:
        actors = 2 + max(1, len(status["actors"]) + len(status["actors_absent"]))
        lines += _blocks(status, width, height, 0 if height is None else height - len(lines) - actors - 1)
    others = 2 + max(1, len(status["actors"]) + len(status["actors_absent"])) + (aspect.footer is not None)
    limit = textwrap.wrap(status["bottleneck"], width)
    if height is None or height - len(lines) >= others + len(limit):  # where nothing has to go for it
        lines += [Text(line, "dim") for line in limit]
    wanted, here = status["actors_wanted"], sum(row["ready"] for row in status["actors"])
    by_order = "" if aspect.order == "index" else f", by {aspect.order}"
    auto = status["auto"]
    between = f", automatic {auto['lowest']} to {auto['highest']}" if auto else ""
    lines.append(_rule(f"actors {here} of {max(wanted, here)}{between}, {status['worlds']} worlds{by_order}", width))
    room = None if height is None else height - len(lines) - (aspect.footer is not None)
    lines += actor_lines(status, width, None if room is None else max(2, room), aspect.scroll, aspect.order)
    lines += _deaths(status, width, None if height is None else height - len(lines) - (aspect.footer is not None))
    if height is not None:
        last = [] if aspect.footer is None else [aspect.footer]
        lines = lines[: height - len(last)]
        lines += [Text() for _ in range(height - len(last) - len(lines))] + [line.copy() for line in last]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def spell(lines: list[Text], encoding: str) -> list[Text]:
    """The same lines in characters that an encoding has."""
    try:
        "".join(map(chr, ASCII)).encode(encoding)
    except UnicodeEncodeError:
        for line in lines:
            line.plain = line.plain.translate(ASCII)
    return lines


def _title(status: dict[str, Any], width: int, aspect: Aspect) -> Text:
    state = status["state"]
    env = status["env"].replace("\\", "/").rpartition("/")[2] if ".py:" in status["env"] else status["env"]
    line = Text.assemble((env, "bold"), "  ", (state, STATE_STYLES.get(state, "bold yellow")))
    line.append(f"  {clock(status['seconds'])}")
    name = status["run"].replace("\\", "/").rpartition("/")[2]
    right = Text.assemble(("run ", "dim"), name, (f"  {aspect.place}" if aspect.place else "", "dim"))
    line.append(" " * max(2, width - line.cell_len - right.cell_len))
    return line.append_text(right)


def _subtitle(status: dict[str, Any]) -> Text:
    """What ends the run, how far it is, and what the last evaluation said."""
    parts = []
    limits, learner = status["limits"], status["learner"]
    if goal := " and ".join(status["goal"]):
        parts.append(("until ", goal))
    if limits["steps"]:
        done = learner.get("steps", 0)
        left = ""
        if (sps := learner.get("sps")) and status["state"] == "running":
            left = f", {span(max(0.0, (limits['steps'] - done) / sps))} left"
        parts.append(("steps ", f"{percent(min(1.0, done / limits['steps']))} of {count(limits['steps'])}{left}"))
    if limits["seconds"]:
        parts.append(
            ("time ", f"{percent(min(1.0, status['seconds'] / limits['seconds']))} of {span(limits['seconds'])}")
        )
    if status["eval"]:
        shown = [(k, v) for k, v in status["eval"].items() if k not in ("return_std", "length_mean", "episodes")]
        figures = ", ".join(f"{name.replace('_', ' ')} {decimal(value)}" for name, value in shown if value is not None)
        parts.append(("evaluated ", figures))
    line = Text()
    for place, (name, value) in enumerate(parts or [("until ", "stopped")]):
        line.append_text(Text.assemble("  " if place else "", (name, "dim"), value))
    return line


def _alerts(status: dict[str, Any], aspect: Aspect) -> list[Text]:
    """What should not be overlooked, worst first."""
    learner, lines = status["learner"], []
    if aspect.alert:
        lines.append(Text(f"! {aspect.alert}", "bold red"))
    if status["link"]["security"] == "insecure":
        lines.append(Text("! insecure: whoever reaches the link can read the policy and feed the training", "bold red"))
    if status["state"] in ("recovering", "running") and is_down(status):
        since = f" at version {count(learner['version'])}" if "version" in learner else ""
        lines.append(Text(f"! the learner died{since}; another one starts from the newest checkpoint", "bold red"))
    elif status["state"] == "running" and (learner["silent_s"] or 0) > QUIET_S:
        lines.append(Text(f"! the learner has said nothing for {span(learner['silent_s'])}", "bold yellow"))
    if held := status["held_by"]:
        names = ", ".join(map(str, held[:5])) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
        actors = f"actor {names} holds" if len(held) == 1 else f"actors {names} hold"
        share = next(row["held_share"] for row in status["actors"] if row["index"] == held[0])
        cost = f"all others waited {percent(share)} of the last seconds"
        lines.append(Text(f"! {actors} the batch: {cost}", "bold yellow"))
    if findings := learner.get("findings"):
        others = f"{len(findings)} findings, the newest: " if len(findings) > 1 else ""
        lines.append(Text(f"! {others}{findings[-1]['message']}", "bold yellow"))
    for crash in status["crashes"][-1:]:
        if (ago := status["seconds"] - crash["at_s"]) < CRASH_S:
            lines.append(Text(f"! {span(ago)} ago {crash['what']}", "red"))
    return lines


def _deaths(status: dict[str, Any], width: int, room: int | None) -> list[Text]:
    """The last deaths and where they are described, if there were any and there is room."""
    if not status["crashes"] or (room is not None and room < 2):
        return []
    lines = [_rule(f"deaths; actors started again: {status['actor_restarts']}", width)]
    for crash in reversed(status["crashes"]):
        lines.append(Text.assemble((f"{clock(crash['at_s']):>8}  ", "dim"), crash["what"]))
        if crash["record"]:
            lines.append(Text(f"{'':>10}{crash['record']}", "dim"))
    return lines if room is None else lines[:room]


def _blocks(status: dict[str, Any], width: int, height: int | None, room: int) -> list[Text]:
    """Learner, curve, traffic and machine, side by side as far as there is room; the curve may fill ``room``."""
    mean = f"return {decimal(status['learner'].get('training', {}).get('return_mean'))}"
    if width >= WIDE:
        left: Block = ("learner", learner_lines(status, SIDE, full=True))
        right: Block = ("tickets and wire", traffic_lines(status, SIDE, full=True))
        right[1].extend([_rule("machine", SIDE), *machine_lines(status, SIDE, full=True)])
        tall = max(len(left[1]), len(right[1]), min(room - 2, TALLEST))
        middle = width - 2 * (SIDE + GAP)
        return _beside([left, (mean, curve_lines(status, middle, tall)), right], [SIDE, middle, SIDE])
    if width < NARROWEST:
        return [_rule("learner", width), *learner_lines(status, width, full=False)]
    half = (width - GAP) // 2
    rest = width - GAP - half
    learner = learner_lines(status, half, full=False)
    lines = _beside([("learner", learner), (mean, curve_lines(status, rest, len(learner)))], [half, rest])
    if height is not None and height < SHORT:
        return lines
    traffic: Block = ("tickets and wire", traffic_lines(status, half, full=False))
    return lines + _beside([traffic, ("machine", machine_lines(status, rest, full=False))], [half, rest])


def _beside(blocks: list[Block], widths: list[int]) -> list[Text]:
    """Blocks with their headings, next to each other."""
    tall = max(len(lines) for _, lines in blocks)
    columns = [[_rule(title, width), *lines] for (title, lines), width in zip(blocks, widths, strict=True)]
    joined = []
    for row in range(tall + 1):
        line = Text()
        for place, (lines, width) in enumerate(zip(columns, widths, strict=True)):
            part = lines[row].copy() if row < len(lines) else Text()
            part.truncate(width, overflow="ellipsis", pad=place + 1 < len(columns))
            line.append(" " * GAP if place else "")
            line.append_text(part)
        joined.append(line)
    return joined


def _rule(title: str, width: int) -> Text:
    return Text.assemble(("── ", "dim"), (title, "bold"), (" " + "─" * max(0, width - len(title) - 4), "dim"))
