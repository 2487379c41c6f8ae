"""Running an environment under known actions and writing down everything that it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rustyrl.rollout import EpisodeRows, Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import ActionSpec, EnvironmentSpec
from rustyrl_actors.environment import Arrays, Masks, StepRows, TimeStep, rows_of

__all__ = ["ActionDraws", "Trace", "first_difference", "run_trial", "run_trials"]


class Stepped(Protocol):
    """What a trial needs of an environment."""

    spec: EnvironmentSpec

    def reset(self, seed: tuple[int, ...], out: StepRows) -> None:
        """Start new episodes; see `Environment.reset`."""
        ...

    def step(self, action: Arrays, out: StepRows) -> TimeStep:
        """Step every slot once; see `Environment.step`."""
        ...


class ActionDraws:
    """Random actions that are fixed beforehand, but for what a mask forbids.

    Every seventh step takes the ends of the ranges, where worlds break first.
    """

    def __init__(self, spec: EnvironmentSpec, steps: int, seed: int) -> None:
        self._spec = spec
        rng = np.random.Generator(np.random.Philox(seed))
        self._random = [rng.random((steps, spec.slots, part.output_width), np.float32) for part in spec.action]

    def replace(self, slot: int, seed: int) -> None:
        """Draw other actions for one slot."""
        rng = np.random.Generator(np.random.Philox(seed))
        for random in self._random:
            random[:, slot] = rng.random(random[:, slot].shape, np.float32)

    def at(self, t: int, masks: Masks) -> Arrays:
        """The actions of step t, part to `[E, ...]`."""
        return {
            part.name: self._choices(part, random[t], masks.get(part.name))
            if part.kind == "discrete"
            else self._numbers(part, random[t], extreme=t % 7 == 6)
            for part, random in zip(self._spec.action, self._random, strict=True)
        }

    def _choices(self, part: ActionSpec, random: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[np.int64]:
        weight = random if mask is None else np.where(mask, random, -1.0)
        ends = np.cumsum(part.counts)
        chosen = [weight[:, end - count : end].argmax(1) for count, end in zip(part.counts, ends, strict=True)]
        return np.stack(chosen, 1).astype(np.int64).reshape(len(random), *part.shape)

    def _numbers(self, part: ActionSpec, random: NDArray[Any], *, extreme: bool) -> NDArray[np.float32]:
        low, high = np.clip(part.low, -3.0, None), np.clip(part.high, None, 3.0)  # as a policy that knows no bounds
        low, high = np.minimum(low, part.high), np.maximum(high, part.low)
        number = np.where(random < 0.5, low, high) if extreme else low + (high - low) * random
        numbers: NDArray[np.float32] = number.astype(np.float32).reshape(len(random), *part.shape)
        return numbers


@dataclass(slots=True)
class Trace:
    """What T steps of an environment said, as a rollout, and what its rows held right after each step.

    stale: fields that changed after the step that wrote them, as (field, t)
    ends: (t, episodes, final observations) of the steps in which episodes ended
    """

    rollout: Rollout
    ends: list[tuple[int, TimeStep]] = field(default_factory=list)
    stale: list[tuple[str, int]] = field(default_factory=list)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything by name, time first."""
        rollout = self.rollout
        return {
            **{f"observation {name!r}": array for name, array in rollout.observation.items()},
            **{f"action_mask {name!r}": array for name, array in rollout.action_mask.items()},
            "reward": rollout.reward,
            "terminated": rollout.terminated,
            "truncated": rollout.truncated,
            "valid": rollout.valid,
        }

    def episodes(self) -> list[EpisodeRows]:
        """The episodes that ended, step by step."""
        return [step.episodes for _, step in self.ends if step.episodes is not None]


def run_trial(environment: Stepped, seed: tuple[int, ...], draws: ActionDraws, steps: int, poison: int = 0xCB) -> Trace:
    """Reset an environment and step it, into rows that were filled with ``poison`` before."""
    return run_trials([environment], [seed], [draws], steps, poison)[0]


def run_trials(
    environments: Sequence[Stepped],
    seeds: Sequence[tuple[int, ...]],
    draws: Sequence[ActionDraws],
    steps: int,
    poison: int = 0xCB,
) -> list[Trace]:
    """The same for several environments in one process, stepped in turns."""
    traces = [_allocate(environment.spec, steps, poison) for environment in environments]
    rows = [rows_of(trace.rollout, slice(0, trace.rollout.slots)) for trace in traces]
    kept: list[list[dict[str, NDArray[Any]]]] = [[] for _ in traces]
    for environment, seed, trace in zip(environments, seeds, traces, strict=True):
        environment.reset(seed, _first_rows(trace.rollout))
    started = [{name: array[0].copy() for name, array in _seen(trace)} for trace in traces]
    for t in range(steps):
        for index, environment in enumerate(environments):
            trace = traces[index]
            masks = {name: array[t] for name, array in trace.rollout.action_mask.items()}
            action = draws[index].at(t, masks)
            step = environment.step(action, rows[index][t])
            for array in action.values():
                array.fill(0)  # an actor uses its arrays again
            if step.episodes is not None:
                trace.ends.append((t, step))
            kept[index].append({name: _written(name, array, t).copy() for name, array in trace.arrays().items()})
    for trace, start, snapshots in zip(traces, started, kept, strict=True):
        trace.stale += [(name, 0) for name, array in _seen(trace) if not _same(start[name], array[0]).all()]
        for t, snapshot in enumerate(snapshots):
            for name, array in trace.arrays().items():
                if not _same(snapshot[name], _written(name, array, t)).all():
                    trace.stale.append((name, t))
    return traces


def first_difference(one: Trace, other: Trace, slots: Sequence[int] | None = None) -> str:
    """Where two traces differ first, in words; empty if they agree in all bits of what means something."""
    count = one.rollout.slots
    chosen = np.arange(count) if slots is None else np.array(slots, np.intp)
    found: list[tuple[int, str]] = []
    valid = one.rollout.valid & other.rollout.valid
    others = other.arrays()
    for name, array in one.arrays().items():
        same = _same(array, others[name]).reshape(len(array), count, -1)
        if name.startswith(("observation", "action_mask")):
            same[:-1] |= ~valid[:, :, None]  # what stands where there was no agent means nothing
        for t, slot, _ in np.argwhere(~same[:, chosen])[:1]:
            where = np.argwhere(~_same(array[t, chosen[slot]], others[name][t, chosen[slot]]))[0]
            values = (values[t, chosen[slot]][tuple(where)] for values in (array, others[name]))
            at = f"[{', '.join(map(str, where))}]" if len(where) else ""
            found.append(
                (int(t), f"{name}{at} of slot {chosen[slot]} at step {t}: {' against '.join(map(str, values))}")
            )
    found += _episode_difference(one, other, set(chosen.tolist()))
    return min(found, default=(0, ""))[1]


def _episode_difference(one: Trace, other: Trace, slots: set[int]) -> list[tuple[int, str]]:
    """Where the world's figures of ended episodes differ first; when they end is in the flags."""
    for (t, step), (other_t, other_step) in zip(one.ends, other.ends, strict=False):
        mine, theirs = step.episodes, other_step.episodes
        if mine is None or theirs is None or t != other_t or not np.array_equal(mine.slot, theirs.slot):
            continue
        for name, values in mine.metrics.items():
            for slot, a, b in zip(mine.slot.tolist(), values.tolist(), theirs.metrics[name].tolist(), strict=True):
                if slot in slots and a != b and not (np.isnan(a) and np.isnan(b)):
                    return [(t, f"episode metric {name!r} of slot {slot} at step {t}: {a:.6g} against {b:.6g}")]
    return []


def _allocate(spec: EnvironmentSpec, steps: int, poison: int) -> Trace:
    origin = RolloutOrigin(spec.fingerprint, "check", Ticket(0, 0, (0,)), 0, 0, 0)
    rollout = allocate_rollout(spec, steps, spec.slots, origin)
    assert rollout.storage is not None  # noqa: S101 - allocate_rollout makes one block
    rollout.storage[:] = poison
    return Trace(rollout)


def _first_rows(rollout: Rollout) -> StepRows:
    """The rows that a reset writes; what it is not to write is row 0 of the first step."""
    return StepRows(
        observation={name: array[0] for name, array in rollout.observation.items()},
        action_mask={name: array[0] for name, array in rollout.action_mask.items()},
        reward=rollout.reward[0],
        terminated=rollout.terminated[0],
        truncated=rollout.truncated[0],
        valid=rollout.valid[0],
    )


def _seen(trace: Trace) -> list[tuple[str, NDArray[Any]]]:
    """Observations and masks, which a reset writes too."""
    return [(name, array) for name, array in trace.arrays().items() if name.startswith(("observation", "action_mask"))]


def _written(name: str, array: NDArray[Any], t: int) -> NDArray[Any]:
    """What step t wrote into a field."""
    row: NDArray[Any] = array[t + 1] if name.startswith(("observation", "action_mask")) else array[t]
    return row


def _same(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Equal, numbers that are not finite included."""
    if one.dtype == np.bool_:  # of a byte that is neither False nor True, numpy says that it is True
        one, other = one.view(np.uint8), other.view(np.uint8)
    equal = np.asarray(one == other)
    if one.dtype.kind == "f":
        equal = equal | (np.isnan(one) & np.isnan(other))
    return equal
