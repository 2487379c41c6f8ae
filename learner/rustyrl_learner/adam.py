"""Adam over one flat block of parameters."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Adam", "Moving", "Optimizer"]

PREFIX = "optimizer."
BETAS = (0.9, 0.999)
SETTINGS: dict[str, Any] = {
    "beta1": BETAS[0],
    "beta2": BETAS[1],
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
}

# What compiled code takes steps by: moments `[P]`, rate, beta1, beta2, epsilon, decay, the largest norm of a gradient,
# how many parameters at the start do not decay, steps taken.
Moving = tuple[NDArray[np.float32], NDArray[np.float32], float, float, float, float, float, float, int, int]


class Optimizer(Protocol):
    """Whatever changes parameters along the gradients that stand beside them."""

    def step(self, learning_rate: float | Tensor) -> None:
        """Take a step of this rate; a tensor `[]` is read on its device when the step is taken there."""


class Adam:
    """Kingma and Ba 2015, algorithm 1, with decay of weights apart from it (Loshchilov and Hutter 2019, AdamW).

    By one operation of torch over a block, however many layers there are. Torch's own optimisers take longer for small
    networks, and the first that a process makes imports torch's compiler, which doubles what a learner needs to start.
    """

    def __init__(self, block: Tensor, gradient: Tensor, *, epsilon: float, decay: float = 0.0, kept: int = 0) -> None:
        """Optimise a block.

        Args:
            block: `[P]` float32, changed in place.
            gradient: `[P]` float32, read at each step.
            epsilon: added to the root of the second moment.
            decay: what a step of rate 1 would take off each parameter, as a share.
            kept: how many parameters at the start of the block do not decay.
        """
        self._block = block
        self._gradient = gradient
        self._epsilon = epsilon
        self._decay = decay
        self._kept = kept
        self._decaying = block[kept:]
        self.steps = 0
        self._taken = block.new_zeros(())  # steps, where the operation looks for them
        self.first = torch.zeros_like(block)  # moments
        self.second = torch.zeros_like(block)

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        """Take a step of this rate; a tensor `[]` is read on its device when the step is taken there."""
        self.steps += 1
        if self._decay:
            self._decaying.mul_(1 - learning_rate * self._decay)
        self._taken.add_(1)
        state: tuple[list[Tensor], ...] = (
            [self._block],
            [self._gradient],
            [self.first],
            [self.second],
            [],
            [self._taken],
        )
        torch._fused_adam_(*state, lr=learning_rate, eps=self._epsilon, **SETTINGS)

    def moving(self, learning_rate: float, largest_norm: float) -> Moving:
        """Where compiled code goes on from, on a CPU; who has it take steps says so by `set_steps`."""
        moments = self.first.numpy(), self.second.numpy()
        return *moments, learning_rate, *BETAS, self._epsilon, self._decay, largest_norm, self._kept, self.steps

    def set_steps(self, steps: int) -> None:
        """Go on as after so many."""
        self.steps = steps
        self._taken.fill_(steps)

    def tensors(self) -> dict[str, Tensor]:
        """What it goes on from, by name; not copies."""
        steps = torch.tensor(self.steps)
        return {f"{PREFIX}steps": steps, f"{PREFIX}first": self.first, f"{PREFIX}second": self.second}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave; raises `RuntimeError` if that was of other parameters."""
        missing = self.tensors().keys() - tensors.keys()
        if missing:
            raise RuntimeError(
                f"there is no {', '.join(sorted(missing))}, so it was made by another version of rustyrl"
            )
        first, second = tensors[f"{PREFIX}first"], tensors[f"{PREFIX}second"]
        if first.shape != self.first.shape:
            raise RuntimeError(f"the optimiser's moments are of {first.numel()} numbers, expected {self.first.numel()}")
        self.set_steps(int(tensors[f"{PREFIX}steps"]))
        self.first.copy_(first)
        self.second.copy_(second)
