"""What the screen says of everything but the actors: lists of lines out of the status, for a given width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from rustyrl.chart import bar, curve
from rustyrl.units import count, decimal, percent, short, size, span

__all__ = ["Cell", "cells", "curve_lines", "is_down", "lag_lines", "learner_lines", "machine_lines", "traffic_lines"]

GAP = 2
HUNGRY = 0.5  # a learner that waits longer than this part of its time could use more experience
SHARE_WIDTH = 6  # of "100 %" and a blank
Cell = tuple[str, str] | tuple[str, str, str]  # what it is called, its value, and how that is styled


def cells(rows: Sequence[Sequence[Cell]], width: int) -> list[Text]:
    """Lines of names, to the left, and values, to the right, in columns of equal width as far as they fit."""
    lines = []
    for row in rows:
        line = Text()
        each = (width - GAP * (len(row) - 1)) // len(row)
        fits = all(len(name) + 1 + len(value) <= each for name, value, *_ in row)
        for place, (name, value, *style) in enumerate(row):
            line.append(" " * GAP if place else "")
            line.append(name, "dim")
            line.append(" " * (each - len(name) - len(value) if fits else 1))
            line.append(value, *style)
        lines.append(line)
    return lines


def is_down(status: dict[str, Any]) -> bool:
    """Whether what is known of the learner are the last words of one that is gone."""
    return status["state"] == "recovering" or not status["learner"]["running"]


def learner_lines(status: dict[str, Any], width: int, *, full: bool) -> list[Text]:
    """Speed, waiting, lag and losses; ``full`` with everything there is."""
    learner = status["learner"]
    losses, wait = learner.get("losses", {}), None if is_down(status) else learner.get("wait_share")
    sps = None if is_down(status) or "version" not in learner else learner["sps"]
    update_s = learner.get("update_s")
    busy_s = sum(v for k, v in update_s.items() if k != "wait") if update_s else None
    training = learner.get("training", {})
    rows: list[Sequence[Cell]] = [
        (("SPS", count(sps), "bold"), ("mean SPS", count(learner.get("trained_sps")))),
        (("version", count(learner.get("version")), "bold"), ("steps", count(learner.get("steps")))),
        (("update", span(busy_s)), ("waits", percent(wait), "yellow" if (wait or 0) > HUNGRY else "")),
    ]
    policy, value = decimal(losses.get("policy_loss")), decimal(losses.get("value_loss"))
    divergence, entropy = decimal(losses.get("approx_kl")), decimal(losses.get("entropy"))
    if not full:
        rows += [(("policy, value loss", f"{policy}, {value}"),), (("KL, entropy", f"{divergence}, {entropy}"),)]
    else:
        rate, norm = losses.get("learning_rate"), losses.get("gradient_norm")
        rows += [
            (("policy loss", policy), ("value loss", value)),
            (("KL", divergence), ("entropy", entropy)),
            (("clipped", percent(losses.get("clip_fraction"))), ("gradient norm", decimal(norm))),
            (("learning rate", decimal(rate)), ("epochs", count(losses.get("epochs")))),
            (("return", decimal(training.get("return_mean")), "bold"), ("+-", decimal(training.get("return_std")))),
            (("length", decimal(training.get("length_mean"))), ("device", learner.get("device", "-"))),
            (("process", str(learner["pid"] or "-")), ("restarts", count(learner["restarts"]))),
            (("CPU", whole_percent(learner.get("cpu_percent"))), ("memory", size(learner.get("memory_bytes")))),
        ]
    lines = cells(rows, width) + lag_lines(learner.get("lag_steps", {}), width, full=full)
    if is_down(status):
        for line in lines:
            line.stylize("dim")
    return lines


def lag_lines(lag_steps: dict[str, int], width: int, *, full: bool) -> list[Text]:
    """The histogram of policy lag: a line for each lag, or one for all."""
    total = sum(lag_steps.values())
    if not total:
        return [Text.assemble(("policy lag", "dim"), " no batch yet")]
    shares = [(lag, steps / total) for lag, steps in lag_steps.items()]
    if full:
        room = max(4, width - 7 - SHARE_WIDTH)
        return [
            Text.assemble((f"lag {lag:>2} ", "dim"), (bar(share, room), "cyan"), f"{percent(share):>{SHARE_WIDTH}}")
            for lag, share in shares
        ]
    line = Text.assemble(("lag", "dim"))
    room = (width - len("lag")) // len(shares) - 4 - SHARE_WIDTH
    for lag, share in shares:
        drawn = f"{bar(share, min(room, 12))}{percent(share):>{SHARE_WIDTH}}" if room > 2 else percent(share)
        line.append_text(Text.assemble((f"  {lag} ", "dim"), (drawn, "cyan" if room > 2 else "")))
    return [line]


def traffic_lines(status: dict[str, Any], width: int, *, full: bool) -> list[Text]:
    """Tickets by fate, and what crosses the wire."""
    tickets, wire = status["tickets"], status["wire"]
    knocked = wire["refused_handshakes"]
    rejected, refused = (
        tickets.get("rejected", {}),
        wire["refused_messages"] | ({"knocked": knocked} if knocked else {}),
    )
    lost = tickets.get("lost")
    fates: list[Cell] = [
        ("issued", short(tickets.get("issued"))),
        ("trained", short(tickets.get("trained"))),
        ("open", short(tickets.get("outstanding"))),
        ("rejected", short(sum(rejected.values()))),
        ("lost", short(lost), "yellow" if lost else ""),
        ("refused", short(sum(refused.values())), "yellow" if refused else ""),
    ]
    incoming, outgoing = f"{size(wire['received_bytes_s'])}/s", f"{size(wire['sent_bytes_s'])}/s"
    if not full:
        return cells([fates[:3], fates[3:], (("in", incoming), ("out", outgoing))], width)
    lines = cells([fates[:2], (fates[3], fates[4]), (fates[2], ("messages refused", *fates[5][1:]))], width)
    reasons = [f"{reason} {count(times)}" for reason, times in {**rejected, **refused}.items()]
    lines += [Text.assemble((f"{'reasons ':<9}", "dim"), ", ".join(reasons))] if reasons else []
    if past := status["tickets_before"]:
        before = sum(life["tickets"]["lost"] for life in past)
        lines += cells([(("earlier learners", count(len(past))), ("lost with them", short(before)))], width)
    lines += cells([(("received", incoming), ("", size(wire["received_bytes"])))], width)
    return lines + cells([(("sent", outgoing), ("", size(wire["sent_bytes"])))], width)


def machine_lines(status: dict[str, Any], width: int, *, full: bool) -> list[Text]:
    """Cores, memory and GPU; what the learner and the actors of this machine take."""
    machine, learner, gpu = status["machine"], status["learner"], status["gpu"]
    here = [row for row in status["actors"] if row["memory_bytes"] is not None]
    load = machine.get("load")
    memory = f"{size(machine.get('memory_bytes'))} of {size(machine.get('memory_total_bytes'))}"
    usage = (("CPU", whole_percent(machine.get("cpu_percent"))), ("cores", count(machine.get("cores"))))
    actors_cpu = whole_percent(sum(row["cpu_percent"] or 0.0 for row in here)) if here else "-"
    actors_memory = size(sum(row["memory_bytes"] for row in here)) if here else "-"
    if not full:
        rows: list[Sequence[Cell]] = [
            (("CPU", f"{usage[0][1]} of {usage[1][1]}"), ("memory", size(machine.get("memory_bytes")))),
            (("learner", whole_percent(learner.get("cpu_percent"))), ("", size(learner.get("memory_bytes")))),
            (("actors", actors_cpu), ("", actors_memory)),
        ]
        if gpu:
            rows.append((("GPU", whole_percent(gpu.get("busy_percent"))), ("", size(gpu["memory_bytes"]))))
        return cells(rows, width)
    lines = cells([usage, (("load", "-" if not load else " ".join(f"{part:.1f}" for part in load)),)], width)
    lines += cells([(("memory", memory),)], width)
    lines += cells(
        [(("learner", whole_percent(learner.get("cpu_percent"))), ("", size(learner.get("memory_bytes"))))], width
    )
    lines += cells([(("actors here", actors_cpu), ("", actors_memory))], width)
    if gpu is None:
        return [
            *lines,
            Text.assemble(("GPU ", "dim"), f"none; device {learner['device']}" if "device" in learner else "-"),
        ]
    lines += [Text.assemble(("GPU ", "dim"), gpu["name"])]
    taken = f"{size(gpu['memory_bytes'])} of {size(gpu['memory_total_bytes'])}"
    lines += cells([(("GPU busy", whole_percent(gpu.get("busy_percent"))), ("ours", size(gpu["ours_bytes"])))], width)
    return lines + cells([(("GPU memory", taken),)], width)


def curve_lines(status: dict[str, Any], width: int, height: int) -> list[Text]:
    """The learning curve: the mean return of training over env steps."""
    points = status["curve"]
    if len(points) < 2:
        return [Text("no curve yet: no episode has ended", "dim")]
    lines = [Text(line, "cyan") for line in curve(points, width, height)]
    lines[-1].stylize("dim")
    return lines


def whole_percent(value: float | None) -> str:
    """What is in percent already."""
    return "-" if value is None else f"{value:.0f} %"
