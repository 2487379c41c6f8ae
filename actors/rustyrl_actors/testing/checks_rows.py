"""Checks of what a world writes: rows, numbers, flags, metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import vanished
from rustyrl_actors.spaces import leaves
from rustyrl_actors.testing.subject import Cut, DoesNotApplyError, Subject, ViolationError, cut_ends, forced_ends
from rustyrl_actors.testing.trial import Trace, first_difference

__all__ = [
    "ends_with_flags",
    "gives_finite_numbers",
    "keeps_no_rows",
    "observes_within_its_space",
    "reports_its_metrics",
    "runs",
    "writes_every_row",
]

OTHER_POISON = 0x35  # a byte pattern unlike the usual one: what a world leaves unwritten differs between the two


def runs(subject: Subject) -> None:
    """Raises whatever the world raises."""
    subject.trace()


def writes_every_row(subject: Subject) -> None:
    """Compare two trials whose rows held other bytes before."""
    other = subject.trial(poison=OTHER_POISON)
    difference = first_difference(subject.trace(), other) or _final_difference(
        cut_ends(subject.trace()), cut_ends(other)
    )
    if not difference and subject.style != "gym":
        difference = _final_difference(forced_ends(subject), forced_ends(subject, poison=OTHER_POISON))
    if difference and not first_difference(subject.trace(), subject.trial()):
        raise ViolationError(
            f"what stood in memory before a step shows through: {difference}",
            "observe() must write every number of the observation of the slots it is asked for, in every step",
        )


def keeps_no_rows(subject: Subject) -> None:
    """Look for rows that changed after the step that wrote them."""
    if stale := subject.trace().stale:
        name, t = stale[0]
        raise ViolationError(
            f"{name} of step {t} was changed by a later step: the world kept a reference to rows that it was lent",
            "read agent.observation, agent.reward and the flags from the agent each time; keep copies of what you need",
        )


def observes_within_its_space(subject: Subject) -> None:
    """Hold every observation against the bounds that the world declares, last ones of cut episodes included."""
    info = subject.source.info
    if info is None:
        raise DoesNotApplyError("Gymnasium's environments are not held to their bounds")
    trace = subject.trace()
    for name, space in leaves(info.observation_space):
        low, high = getattr(space, "low", None), getattr(space, "high", None)
        if low is None or high is None:
            continue
        array = trace.rollout.observation[name]
        out = (array < low) | (array > high)
        out[:-1] &= _occupied(trace, array)
        for t, slot, *index in np.argwhere(out).tolist()[:1]:
            raise _outside(name, tuple(index), f"slot {slot} at step {t}", array[t, slot], low, high)
        for cut in [*cut_ends(trace), *forced_ends(subject)]:
            last = cut.final_observation[name]
            for row, *index in np.argwhere((last < low) | (last > high)).tolist()[:1]:
                where = f"slot {cut.slot[row]}, the last of an episode that was cut,"
                raise _outside(name, tuple(index), where, last[row], low, high)


def _outside(
    name: str, index: tuple[int, ...], where: str, seen: NDArray[Any], low: NDArray[Any], high: NDArray[Any]
) -> ViolationError:
    part = f"{list(index)}" if index else ""
    bounds = " to ".join(str(np.broadcast_to(bound, seen.shape)[index]) for bound in (low, high))
    return ViolationError(
        f"observation {name!r}{part} of {where} is {seen[index]}, its space goes from {bounds}",
        "widen the bounds of the observation_space (infinite ones are fine), or clip what observe() writes",
    )


def gives_finite_numbers(subject: Subject) -> None:
    """Look for infinities and NaN."""
    trace = subject.trace()
    for name, array in trace.arrays().items():
        if array.dtype.kind != "f":
            continue
        bad = ~np.isfinite(array)
        if name.startswith("observation"):
            bad[:-1] &= _occupied(trace, array)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ViolationError(
                f"{name} of slot {index[1]} at step {index[0]} is {array[index]}",
                "find what divides by zero or grows without bound; end the episode before it does",
            )
    if subject.style != "gym":
        _check_final(subject)


def _check_final(subject: Subject) -> None:
    """Hold the last observations of episodes that were cut: the learner computes with them."""
    for cut in [*cut_ends(subject.trace()), *forced_ends(subject)]:
        for name, array in cut.final_observation.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                slot = cut.slot[np.argwhere(~np.isfinite(array))[0][0]]
                raise ViolationError(
                    f"the final observation {name!r} of slot {slot}, whose episode was cut, is not finite",
                    "find what divides by zero: observe() is asked once more after the last step of an episode",
                )


def _final_difference(ones: list[Cut], others: list[Cut]) -> str:
    """Where the last observations of episodes that were cut differ, in words."""
    for one, other in zip(ones, others, strict=True):
        for name, array in one.final_observation.items():
            differs = array != other.final_observation[name]
            if array.dtype.kind == "f":
                differs &= ~(np.isnan(array) & np.isnan(other.final_observation[name]))
            if differs.any():
                slot = one.slot[np.argwhere(differs)[0][0]]
                return f"the final observation {name!r} of slot {slot}, whose episode was cut"
    return ""


def ends_with_flags(subject: Subject) -> None:
    """Look for agents that are gone without an end, and for flags of agents that are not there."""
    rollout, limit = subject.trace().rollout, subject.source.spec.max_episode_steps
    ended = rollout.terminated | rollout.truncated
    gone = vanished(rollout)
    if gone.any():
        t, slot = (int(i) for i in np.argwhere(gone)[0])
        raise ViolationError(
            f"the agent in slot {slot} is gone at step {t + 1}, and its episode had not ended",
            "set terminated (it died) or truncated (it was taken away) in the last step in which valid is True",
        )
    if (ended & ~rollout.valid).any():
        t, slot = (int(i) for i in np.argwhere(ended & ~rollout.valid)[0])
        raise ViolationError(
            f"slot {slot} holds no agent at step {t}, and yet an episode ends there",
            "set valid to False from the step after the end on",
        )
    longest = max((int(part.length.max()) for part in subject.trace().episodes()), default=0)
    if longest > limit:
        raise ViolationError(f"an episode had {longest} steps, the limit is {limit}", "look at max_episode_steps")
    lengths = np.concatenate([part.length for part in subject.trace().episodes()] or [np.zeros(0, np.int32)])
    if limit > 1 and len(lengths) > rollout.slots and (lengths == 1).all():
        how = "terminates" if rollout.terminated.any() else "is truncated"
        raise ViolationError(
            f"every episode {how} in its first step",
            "flags are cleared before each step: look at the condition that sets agent.terminated or agent.truncated",
        )


def reports_its_metrics(subject: Subject) -> None:
    """Look at the declared metrics of every episode that ended."""
    if not subject.source.spec.episode_metrics:
        raise DoesNotApplyError("it declares none")
    ended = [step.episodes for step in forced_ends(subject)] if subject.style != "gym" else []
    for part in [*subject.trace().episodes(), *ended]:
        for name, values in part.metrics.items():
            if np.isinf(values).any():
                raise ViolationError(
                    f"the episode metric {name!r} is {values[np.isinf(values)][0]}",
                    "report NaN where the number means nothing: such an episode is left out of the figure",
                )


def _occupied(trace: Trace, array: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a slot held an agent, shaped to go with `[T, E, ...]`."""
    valid = trace.rollout.valid
    return valid.reshape(*valid.shape, *(1,) * (array.ndim - 2))
