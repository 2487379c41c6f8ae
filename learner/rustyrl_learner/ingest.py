"""Hold a rollout against the ticket and the environment that it claims to answer, before it is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import ContractError, WireError
from rustyrl.rollout import Rollout, first_final_not_finite, first_not_finite, rollout_arrays, vanished
from rustyrl.spec import ActionSpec, EnvironmentSpec

__all__ = ["admit"]


def admit(rollout: Rollout, spec: EnvironmentSpec, unroll_length: int, learner_incarnation: int) -> None:
    """Check everything that decoding could not know (stop 5 of the straight line).

    The caller has seen that the ticket is one that this actor owes.

    Raises:
        WireError: the rollout is not what this run expects; it is refused and counted under the reason.
        ContractError: it is, but the user's world put numbers or flags into it that nothing can be learned from.
    """
    origin = rollout.origin
    if origin.learner_incarnation != learner_incarnation:
        raise WireError("incarnation", f"for learner {origin.learner_incarnation}, this is {learner_incarnation}")
    if origin.fingerprint != spec.fingerprint:
        raise WireError("fingerprint", f"environment {origin.fingerprint}, expected {spec.fingerprint}")
    if not set(origin.fresh) <= set(origin.ticket.worlds):
        raise WireError("fresh", f"worlds {origin.fresh} are said to be fresh, the ticket has {origin.ticket.worlds}")
    slots = spec.slots * len(origin.ticket.worlds)
    _check_shapes(rollout, spec, unroll_length, slots)
    _check_ends(rollout, spec, slots)
    _check_contract(rollout, spec)


def _check_shapes(rollout: Rollout, spec: EnvironmentSpec, unroll_length: int, slots: int) -> None:
    named: dict[str, NDArray[Any]] = {
        **{f"observation.{name}": array for name, array in rollout.observation.items()},
        **{f"action.{name}": array for name, array in rollout.action.items()},
        **{f"action_mask.{name}": array for name, array in rollout.action_mask.items()},
        "behavior_log_prob": rollout.behavior_log_prob,
        "reward": rollout.reward,
        "terminated": rollout.terminated,
        "truncated": rollout.truncated,
        "valid": rollout.valid,
    }
    expected = {array.name: array for array in rollout_arrays(spec, unroll_length, slots)}
    if named.keys() != expected.keys():
        raise WireError("shape", f"arrays {sorted(named)}, expected {sorted(expected)}")
    for name, array in named.items():
        want = expected[name]
        if array.shape != want.shape or array.dtype != want.dtype:
            raise WireError("shape", f"{name} is {array.dtype} {array.shape}, expected {want.dtype} {want.shape}")
    for part in spec.action:
        action = rollout.action[part.name]
        if part.kind == "discrete" and action.size:
            counts = np.reshape(part.counts, part.shape)
            if action.min() < 0 or (action >= counts).any():
                raise WireError("action", f"a choice of {part.name!r} outside its {part.text}")
        if part.masked:
            _check_mask(part, action, rollout)


def _check_mask(part: ActionSpec, action: NDArray[Any], rollout: Rollout) -> None:
    """Every choice that was taken was allowed."""
    mask = rollout.action_mask[part.name][:-1]
    taken = action.reshape(*mask.shape[:2], -1) + np.array(part.first)
    if not np.take_along_axis(mask, taken, axis=2)[rollout.valid].all():
        raise WireError("action", f"a choice of {part.name!r} that its mask does not allow")


def _check_ends(rollout: Rollout, spec: EnvironmentSpec, slots: int) -> None:
    final = rollout.final_index
    if final.dtype != np.int32 or final.ndim != 2 or final.shape[1] != 2:
        raise WireError("final", f"final_index is {final.dtype} {final.shape}, expected int32 [K, 2]")
    cut = np.argwhere(rollout.truncated)
    if final.shape != cut.shape or not np.array_equal(final[np.lexsort(final.T[::-1])], cut):
        raise WireError("final", f"final_index names {len(final)} steps, truncated flags are set at {len(cut)} others")
    if rollout.final_observation.keys() != {array.name for array in spec.observation}:
        raise WireError(
            "final", f"final observations {sorted(rollout.final_observation)}, not those of the environment"
        )
    for array in spec.observation:
        seen = rollout.final_observation[array.name]
        if seen.shape != (len(final), *array.shape) or seen.dtype != array.dtype:
            raise WireError("final", f"final_observation.{array.name} is not {array.dtype} of {len(final)} rows")
    episodes = rollout.episodes
    count = episodes.slot.size
    columns = [episodes.slot, episodes.episode_return, episodes.length, *episodes.metrics.values()]
    if any(column.shape != (count,) for column in columns) or set(episodes.metrics) != set(spec.episode_metrics):
        raise WireError("episodes", "the columns of the ended episodes do not agree")
    wanted = [np.int32, np.float32, np.int32, *[np.float32] * len(episodes.metrics)]
    if [column.dtype for column in columns] != wanted or not np.isfinite(episodes.episode_return).all():
        raise WireError("episodes", "slots and lengths are int32, returns and metrics float32, and returns finite")
    if count and not 0 <= episodes.slot.min() <= episodes.slot.max() < slots:
        raise WireError("episodes", f"an episode in a slot outside 0..{slots - 1}")


def _check_contract(rollout: Rollout, spec: EnvironmentSpec) -> None:
    numbers = {f"observation {name!r}": array for name, array in rollout.observation.items()}
    numbers["reward"] = rollout.reward
    numbers |= {f"action {name!r}": array for name, array in rollout.action.items()}
    numbers["behavior_log_prob"] = rollout.behavior_log_prob
    if found := first_not_finite(rollout, numbers):
        t, slot, what = found
        raise ContractError(f"{_where(rollout, spec, t, slot)}: {what}; a world must give finite numbers")
    if found := first_final_not_finite(rollout):
        t, slot, what = found
        raise ContractError(f"{_where(rollout, spec, t, slot)}: {what}")
    both = rollout.terminated & rollout.truncated
    if both.any():
        t, slot = np.argwhere(both)[0]
        raise ContractError(f"{_where(rollout, spec, int(t), int(slot))}: a step is both terminated and truncated")
    gone = vanished(rollout)
    if gone.any():
        t, slot = np.argwhere(gone)[0]
        raise ContractError(
            f"{_where(rollout, spec, int(t), int(slot))}: the agent is gone in the next step without an end; "
            "set terminated (it died) or truncated (it was taken away) in its last step"
        )


def _where(rollout: Rollout, spec: EnvironmentSpec, t: int, slot: int) -> str:
    ticket = rollout.origin.ticket
    world, row = ticket.worlds[slot // spec.slots], slot % spec.slots
    return f"world {world} of {spec.env!r}, slot {row}, step {t} of batch {ticket.batch}"
