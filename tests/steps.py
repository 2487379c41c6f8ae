"""Steps to compute advantages of, in every mix of ends and empty rows that the contract allows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl_learner.gae import gae, next_values

Flags = NDArray[np.bool_]


@dataclass
class Steps:
    """Random steps that keep the contract: a slot empties only after an end."""

    reward: Tensor
    value: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    final_index: Tensor
    final_value: Tensor

    @property
    def ended(self) -> Tensor:
        return self.terminated | self.truncated

    def future(self) -> Tensor:
        return next_values(self.value, self.terminated, self.truncated, self.final_index, self.final_value)

    def advantage(self, gamma: float, gae_lambda: float) -> Tensor:
        return gae(self.reward, self.value[:-1], self.future(), self.ended, self.valid, gamma, gae_lambda)


def random_steps(seed: int) -> Steps:
    """Mixes of terminated, truncated, both, empty rows, and columns that are cut by the end of the rollout."""
    rng = np.random.default_rng(seed)
    steps, slots = int(rng.integers(1, 14)), int(rng.integers(1, 6))
    terminated, truncated, valid = (np.zeros((steps, slots), bool) for _ in range(3))
    for b in range(slots):
        alive = rng.random() < 0.8
        for t in range(steps):
            if not alive:
                alive = rng.random() < 0.4
                continue
            valid[t, b] = True
            terminated[t, b] = rng.random() < 0.15
            truncated[t, b] = rng.random() < 0.15
            if terminated[t, b] or truncated[t, b]:
                alive = rng.random() < 0.6
    return _filled(rng, terminated, truncated, valid)


def every_mix(length: int, seed: int = 0) -> Steps:
    """A slot for each sequence of empty, plain, terminated, truncated and doubly ended rows of this length."""
    kinds = itertools.product(("empty", "plain", "terminated", "truncated", "both"), repeat=length)
    kept = [k for k in kinds if not any(pair == ("plain", "empty") for pair in itertools.pairwise(k))]
    rows = np.array(kept).T
    both = rows == "both"
    terminated, truncated = (rows == "terminated") | both, (rows == "truncated") | both
    return _filled(np.random.default_rng(seed), terminated, truncated, rows != "empty")


def _filled(rng: np.random.Generator, terminated: Flags, truncated: Flags, valid: Flags) -> Steps:
    steps, slots = valid.shape
    final_index = rng.permutation(np.argwhere(truncated))  # in any order
    return Steps(
        reward=torch.from_numpy(rng.standard_normal((steps, slots)).astype(np.float32)),
        value=torch.from_numpy(rng.standard_normal((steps + 1, slots)).astype(np.float32)),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        valid=torch.from_numpy(valid),
        final_index=torch.from_numpy(final_index.reshape(-1, 2).astype(np.int64)),
        final_value=torch.from_numpy(rng.standard_normal(len(final_index)).astype(np.float32)),
    )


def literal_next_value(steps: Steps, t: int, b: int) -> float:
    """What the future after a step is worth, by the rule."""
    if steps.terminated[t, b]:
        return 0.0
    if steps.truncated[t, b]:
        (row,) = (steps.final_index == torch.tensor([t, b])).all(1).nonzero()[:, 0]
        return steps.final_value[row].item()
    return steps.value[t + 1, b].item()
