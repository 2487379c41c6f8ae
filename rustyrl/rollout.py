"""The struct that goes up: what one actor saw and did while it answered one ticket."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rustyrl.spec import ArraySpec, DTypeName, EnvironmentSpec

__all__ = [
    "EpisodeRows",
    "Rollout",
    "RolloutOrigin",
    "Ticket",
    "allocate_rollout",
    "first_final_not_finite",
    "first_not_finite",
    "no_episodes",
    "rollout_arrays",
    "vanished",
]

ALIGNMENT_BYTES = 64  # a cache line: every array of a rollout starts on one
ITEM_BYTES = {name: np.dtype(name).itemsize for name in get_args(DTypeName)}
POISON = 0xCB  # a byte pattern that reads as a huge negative float32 and as neither True nor False


class Ticket(msgspec.Struct, frozen=True):
    """The learner's order for experience: these worlds, for this batch, under this policy version."""

    batch: int
    policy_version: int
    worlds: tuple[int, ...]


class RolloutOrigin(msgspec.Struct, frozen=True):
    """Where a rollout comes from, so that the learner can hold it against the ticket that it answers.

    fresh: those of the ticket's worlds whose episodes began with it, whatever was in the batch before
    """

    fingerprint: str
    policy_name: str
    ticket: Ticket
    learner_incarnation: int
    actor_index: int
    actor_incarnation: int
    stage_s: dict[str, float] = msgspec.field(default_factory=dict)
    fresh: tuple[int, ...] = ()


@dataclass(slots=True)
class EpisodeRows:
    """The M episodes that ended within a rollout, in the order of their ends.

    slot: `[M]` int32, the column of the rollout in which the episode ran
    episode_return: `[M]` float32, the undiscounted sum of rewards
    length: `[M]` int32, in env steps
    metrics: name to `[M]` float32, as the world declares them; NaN where the number means nothing
    """

    slot: NDArray[np.int32]
    episode_return: NDArray[np.float32]
    length: NDArray[np.int32]
    metrics: dict[str, NDArray[np.float32]]


@dataclass(slots=True)
class Rollout:
    """T consecutive env steps of the W slots that one actor owns, for one policy.

    Time first, slots second; slots stand in the order of ``origin.ticket.worlds``, E to a world.

    observation: name to `[T+1, W, ...]`, raw; the last row is what the bootstrap value is computed from
    action: name to `[T, W, ...]`, raw samples before they are clipped or squashed
    action_mask: name to `[T+1, W, choices]` bool for the masked parts of an action, True where a choice is allowed
    behavior_log_prob: `[T, W]` float32, log-probability of ``action`` under the ticket's policy version
    reward: `[T, W]` float32
    terminated: `[T, W]` bool, the future is worth 0
    truncated: `[T, W]` bool, the future is worth V(final_observation)
    valid: `[T, W]` bool, False where a slot held no agent
    final_index: `[K, 2]` int32, the (t, w) of each truncated step
    final_observation: name to `[K, ...]`, what was seen at those steps before the reset
    episodes: the episodes that ended here
    storage: uint8, the one contiguous block that the fixed-size arrays are views of, or None
    tables: what the wire said of it before, by what stood behind the fixed-size arrays
    """

    origin: RolloutOrigin
    observation: dict[str, NDArray[np.generic]]
    action: dict[str, NDArray[np.generic]]
    action_mask: dict[str, NDArray[np.bool_]]
    behavior_log_prob: NDArray[np.float32]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    final_index: NDArray[np.int32]
    final_observation: dict[str, NDArray[np.generic]]
    episodes: EpisodeRows
    storage: NDArray[np.uint8] | None = None
    tables: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def unroll_length(self) -> int:
        """T."""
        return int(self.reward.shape[0])

    @property
    def slots(self) -> int:
        """W."""
        return int(self.reward.shape[1])


def vanished(rollout: Rollout) -> NDArray[np.bool_]:
    """`[T-1, W]` bool, the steps after which an agent is gone although its episode did not end."""
    if rollout.valid.all():
        return np.zeros((rollout.unroll_length - 1, rollout.slots), bool)
    ended = rollout.terminated | rollout.truncated
    gone: NDArray[np.bool_] = rollout.valid[:-1] & ~rollout.valid[1:] & ~ended[:-1]
    return gone


def first_not_finite(rollout: Rollout, numbers: Mapping[str, NDArray[Any]]) -> tuple[int, int, str] | None:
    """Where an agent's numbers, `[T, W, ...]` or one row more, are not finite first: (t, slot, what), None if nowhere.

    What stands where there was no agent means nothing, and is passed over.
    """
    for name, array in numbers.items():
        if _is_finite(array):
            continue
        for t, slot in np.argwhere(~np.isfinite(array))[:, :2]:
            if t >= rollout.unroll_length or rollout.valid[t, slot]:
                value = array[t, slot].ravel()
                return int(t), int(slot), f"{name} holds {value[~np.isfinite(value)][0]}"
    return None


def first_final_not_finite(rollout: Rollout) -> tuple[int, int, str] | None:
    """The same for final observations."""
    for name, array in rollout.final_observation.items():
        if not _is_finite(array):
            t, slot = rollout.final_index[int(np.argwhere(~np.isfinite(array))[0][0])]
            return int(t), int(slot), f"the final observation {name!r} is not finite"
    return None


def _is_finite(array: NDArray[Any]) -> bool:
    """Whether all numbers are finite; the sum of their squares says so in half the time, unless they are huge."""
    if array.dtype.kind != "f":
        return True
    return bool(np.vdot(array, array) < np.inf or np.isfinite(array).all())


def rollout_arrays(spec: EnvironmentSpec, unroll_length: int, slots: int) -> list[ArraySpec]:
    """The fixed-size arrays of a rollout in the order in which they stand on the wire."""
    steps = (unroll_length, slots)
    rows = (unroll_length + 1, slots)
    return [
        *(ArraySpec(f"observation.{a.name}", rows + a.shape, a.dtype) for a in spec.observation),
        *(ArraySpec(f"action.{part.name}", steps + part.shape, part.array.dtype) for part in spec.action),
        *(ArraySpec(f"action_mask.{part.name}", rows + part.mask.shape, "bool") for part in spec.action if part.masked),
        ArraySpec("behavior_log_prob", steps, "float32"),
        ArraySpec("reward", steps, "float32"),
        ArraySpec("terminated", steps, "bool"),
        ArraySpec("truncated", steps, "bool"),
        ArraySpec("valid", steps, "bool"),
    ]


def allocate_rollout(
    spec: EnvironmentSpec, unroll_length: int, slots: int, origin: RolloutOrigin, *, poison: bool = False
) -> Rollout:
    """Allocate a rollout whose fixed-size arrays are views of one contiguous block.

    The block has room behind them for the final observations and episodes of a usual rollout, so that the
    whole is sent without a copy. With ``poison`` it starts filled with a pattern that no step writes.
    """
    arrays = rollout_arrays(spec, unroll_length, slots)
    size = sum(aligned(array_bytes(array)) for array in arrays)
    # Room for every slot ending twice. Pages that are never written cost nothing.
    tail = 2 * slots * (4 * (spec.observation_width + 5 + len(spec.episode_metrics))) + 64 * ALIGNMENT_BYTES
    storage = np.empty(size + tail, np.uint8)
    if poison:
        storage[:] = POISON
    views: dict[str, NDArray[np.generic]] = {}
    offset = 0
    for array in arrays:
        count = array_bytes(array)
        views[array.name] = storage[offset : offset + count].view(array.dtype).reshape(array.shape)
        offset += aligned(count)
    return rollout_from_arrays(views, origin, no_episodes(spec), storage=storage)


def rollout_from_arrays(
    views: dict[str, NDArray[np.generic]],
    origin: RolloutOrigin,
    episodes: EpisodeRows,
    *,
    final_index: NDArray[np.int32] | None = None,
    storage: NDArray[np.uint8] | None = None,
) -> Rollout:
    """Build the struct from arrays under their wire names (see `rollout_arrays`)."""
    groups: dict[str, dict[str, NDArray[np.generic]]] = {
        "observation": {},
        "action": {},
        "action_mask": {},
        "final_observation": {},
    }
    for name, view in views.items():
        group, dot, rest = name.partition(".")
        if dot and group in groups:
            groups[group][rest] = view
    observation, final = groups["observation"], groups["final_observation"]
    if not final:
        final = {name: np.empty((0, *a.shape[2:]), a.dtype) for name, a in observation.items()}
    return Rollout(
        origin=origin,
        observation=observation,
        action=groups["action"],
        action_mask=groups["action_mask"],  # type: ignore[arg-type]
        behavior_log_prob=views["behavior_log_prob"],  # type: ignore[arg-type]
        reward=views["reward"],  # type: ignore[arg-type]
        terminated=views["terminated"],  # type: ignore[arg-type]
        truncated=views["truncated"],  # type: ignore[arg-type]
        valid=views["valid"],  # type: ignore[arg-type]
        final_index=np.empty((0, 2), np.int32) if final_index is None else final_index,
        final_observation=final,
        episodes=episodes,
        storage=storage,
    )


def no_episodes(spec: EnvironmentSpec) -> EpisodeRows:
    """The episodes of a rollout in which none ended."""
    none = np.empty(0, np.float32)
    empty = np.empty(0, np.int32)
    return EpisodeRows(empty, none, empty, dict.fromkeys(spec.episode_metrics, none))


def array_bytes(array: ArraySpec) -> int:
    """The size of an array, computed with Python integers so that it cannot overflow."""
    return math.prod(array.shape, start=ITEM_BYTES[array.dtype])


def aligned(count_bytes: int) -> int:
    """Round up to the alignment of the arrays in a block."""
    return -(-count_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
