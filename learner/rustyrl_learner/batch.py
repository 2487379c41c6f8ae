"""From rollouts in any order to one `[T, B]` batch on the device; B = worlds x slots, columns by world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl.rollout import EpisodeRows, Rollout
from rustyrl.spec import EnvironmentSpec
from rustyrl_learner.device import CopyStream

__all__ = ["Batch", "BatchBuffer"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch on the learner's device, time first.

    observation: `[T+1, B, width]` float32, raw, the arrays of an observation flattened and joined
    action: `[T, B, A]` float32, the parts of an action flattened and joined; choices as whole numbers
    action_mask: `[T, B, M]` bool, the masks of its masked parts joined, or None
    behavior_log_prob, reward: `[T, B]` float32
    terminated, truncated, valid: `[T, B]` bool
    final_index: `[K, 2]` int64, the (t, b) of each truncated step; final_observation: `[K, width]` float32
    fresh: `[B]` bool, slots whose episodes began with this batch, whatever was in the one before
    """

    observation: Tensor
    action: Tensor
    action_mask: Tensor | None
    behavior_log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    final_index: Tensor
    final_observation: Tensor
    fresh: Tensor


@dataclass(slots=True)
class _Answer:
    """What a rollout says beside its rows, kept until the batch is complete."""

    first_world: int
    columns: NDArray[np.intp]  # of the batch, for each slot of the rollout
    fresh: NDArray[np.bool_]  # for each of them
    final_index: NDArray[np.int32]
    final_observation: NDArray[np.float32]
    episodes: EpisodeRows
    stage_s: dict[str, float]


@dataclass(slots=True)
class BatchBuffer:
    """Host memory for one batch, filled by the receive thread while another batch is trained on.

    Where the learner computes on CUDA it is pinned, with memory there beside it, to which a stream of its own copies
    the batch as soon as it is complete.
    """

    number: int
    spec: EnvironmentSpec
    unroll_length: int
    worlds: int
    copies: CopyStream | None = None
    answers: list[_Answer] = field(default_factory=list)
    receive_s: dict[str, float] = field(default_factory=dict)  # what the receive thread spent, by stage
    policy_version: int = 0  # that collected it
    _arrays: dict[str, Tensor] = field(init=False)
    _room: dict[str, Tensor] = field(init=False)  # on the GPU
    _copied: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        steps, slots = self.unroll_length, self.worlds * self.spec.slots
        self._arrays = {
            "observation": self._empty((steps + 1, slots, self.spec.observation_width), torch.float32),
            "action": self._empty((steps, slots, self.spec.action_width), torch.float32),
            "behavior_log_prob": self._empty((steps, slots), torch.float32),
            "reward": self._empty((steps, slots), torch.float32),
            "terminated": self._empty((steps, slots), torch.bool),
            "truncated": self._empty((steps, slots), torch.bool),
            "valid": self._empty((steps, slots), torch.bool),
        }
        if self.spec.mask_width:
            self._arrays["action_mask"] = self._empty((steps, slots, self.spec.mask_width), torch.bool)
        self._room = {} if self.copies is None else self.copies.room(self._arrays)

    def begin(self, number: int) -> None:
        """Use the memory for another batch."""
        self.number = number
        self.answers = []
        self._copied = None

    def complete(self) -> None:
        """All of it has come: begin to copy it, while another batch is trained on."""
        if self.copies is not None:
            self._copied = self.copies.copy(self._arrays, self._room)

    def place(self, rollout: Rollout) -> None:
        """Copy an admitted rollout into the columns of its worlds."""
        worlds, slots = rollout.origin.ticket.worlds, self.spec.slots
        self.policy_version = rollout.origin.ticket.policy_version  # one for all rollouts of a batch
        for position, world in enumerate(worlds):
            here, there = slice(position * slots, (position + 1) * slots), slice(world * slots, (world + 1) * slots)
            steps = self.unroll_length
            self._join("observation", rollout.observation, [a.name for a in self.spec.observation], here, there)
            self._join("action", rollout.action, [part.name for part in self.spec.action], here, there)
            if self.spec.mask_width:
                masks = {name: mask[:steps] for name, mask in rollout.action_mask.items()}
                self._join("action_mask", masks, [part.name for part in self.spec.action if part.masked], here, there)
            for name, array in {
                "behavior_log_prob": rollout.behavior_log_prob,
                "reward": rollout.reward,
                "terminated": rollout.terminated,
                "truncated": rollout.truncated,
                "valid": rollout.valid,
            }.items():
                self._arrays[name].numpy()[:, there] = array[:, here]
        columns = np.concatenate([np.arange(world * slots, (world + 1) * slots) for world in worlds])
        seen = [
            rollout.final_observation[a.name].reshape(len(rollout.final_index), a.width) for a in self.spec.observation
        ]
        # Copies: the rollout's arrays are views of a network frame that is given back after this call.
        self.answers.append(
            _Answer(
                first_world=worlds[0],
                columns=columns,
                fresh=np.repeat(np.isin(worlds, rollout.origin.fresh), slots),
                final_index=rollout.final_index.copy(),
                final_observation=np.concatenate(seen, axis=1).astype(np.float32),
                episodes=EpisodeRows(
                    rollout.episodes.slot.copy(),
                    rollout.episodes.episode_return.copy(),
                    rollout.episodes.length.copy(),
                    {name: values.copy() for name, values in rollout.episodes.metrics.items()},
                ),
                stage_s=rollout.origin.stage_s,
            )
        )

    def to_device(self, device: torch.device) -> Batch:
        """The complete batch as tensors on the device (stop 6 of the straight line)."""
        if self.copies is not None and self._copied is not None:
            self.copies.wait(self._copied)
            on_device = dict(self._room)
        else:
            on_device = {name: array.to(device) for name, array in self._arrays.items()}
        answers = sorted(self.answers, key=lambda answer: answer.first_world)
        index = [
            np.stack([answer.final_index[:, 0], answer.columns[answer.final_index[:, 1]]], axis=1) for answer in answers
        ]
        # By (t, column), so that the order does not depend on which actor owned which worlds.
        joined = np.concatenate(index).astype(np.int64)
        order = np.lexsort((joined[:, 1], joined[:, 0]))
        final = np.concatenate([answer.final_observation for answer in answers])[order]
        mask = on_device.pop("action_mask", None)
        fresh = np.zeros(self.worlds * self.spec.slots, bool)
        for answer in answers:
            fresh[answer.columns] = answer.fresh
        return Batch(
            **on_device,
            action_mask=mask,
            final_index=torch.from_numpy(joined[order]).to(device),
            final_observation=torch.from_numpy(final).to(device),
            fresh=torch.from_numpy(fresh).to(device),
        )

    def episodes(self) -> EpisodeRows:
        """The episodes that ended in this batch, their slots as columns, in an order that ownership cannot change."""
        parts = [(answer.columns, answer.episodes) for answer in self.answers]
        slot = np.concatenate([columns[part.slot] for columns, part in parts]).astype(np.int32)
        order = np.argsort(slot, kind="stable")  # an answer holds the episodes of a slot in time order
        return EpisodeRows(
            slot=slot[order],
            episode_return=np.concatenate([part.episode_return for _, part in parts])[order],
            length=np.concatenate([part.length for _, part in parts])[order],
            metrics={
                name: np.concatenate([part.metrics[name] for _, part in parts])[order]
                for name in self.spec.episode_metrics
            },
        )

    def actor_stage_s(self) -> dict[str, float]:
        """Seconds that the actors spent by stage on this batch, summed over them."""
        total: dict[str, float] = {}
        for answer in self.answers:
            for stage, seconds in answer.stage_s.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def _join(self, name: str, arrays: dict[str, NDArray[Any]], order: list[str], here: slice, there: slice) -> None:
        """Flatten and join named arrays `[T, slots, ...]` into the columns of one, casting to its dtype."""
        target = self._arrays[name].numpy()
        start = 0
        for key in order:
            part = arrays[key][:, here].reshape(len(target), self.spec.slots, -1)
            target[:, there, start : start + part.shape[2]] = part
            start += part.shape[2]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.copies is not None)
