"""Adam over one flat block of parameters."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Adam", "Optimizer"]

PREFIX = "optimizer."
FIRST_DECAY, SECOND_DECAY = 0.9, 0.999  # beta 1 and 2


class Optimizer(Protocol):
    """Whatever changes parameters along the gradients that stand beside them."""

    def step(self, learning_rate: float) -> None:
        """Take a step of this rate."""


class Adam:
    """Kingma and Ba 2015, algorithm 1, with decay of weights apart from it (Loshchilov and Hutter 2019, AdamW).

    Six operations over a block however many layers there are. Torch's own optimisers take three times as long for
    small networks, and the first that a process makes imports torch's compiler, which doubles what a learner needs to
    start.
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
        self._decaying = block[kept:]
        self.steps = 0
        self.first = torch.zeros_like(block)  # moments
        self.second = torch.zeros_like(block)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take a step of this rate."""
        self.steps += 1
        if self._decay:
            self._decaying.mul_(1 - learning_rate * self._decay)
        self.first.lerp_(self._gradient, 1 - FIRST_DECAY)
        self.second.mul_(SECOND_DECAY).addcmul_(self._gradient, self._gradient, value=1 - SECOND_DECAY)
        spread = self.second.sqrt().mul_((1 - SECOND_DECAY**self.steps) ** -0.5).add_(self._epsilon)
        self._block.addcdiv_(self.first, spread, value=-learning_rate / (1 - FIRST_DECAY**self.steps))

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
        self.steps = int(tensors[f"{PREFIX}steps"])
        self.first.copy_(first)
        self.second.copy_(second)
