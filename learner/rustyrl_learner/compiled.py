"""The gradient of the whole loss on a CPU by compiled code, which takes a few rows at a time through everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rustyrl import perceptron
from rustyrl.config import PPOConfig
from rustyrl_learner.distribution import ActionDistribution, quadrature
from rustyrl_learner.rows import Minibatch, TrainingBatch

if TYPE_CHECKING:
    from rustyrl_learner.network import Flat

__all__ = ["CompiledGradient"]

BOX, SQUASHED, CHOICE = range(3)  # as in rustyrl/c/loss.h


class CompiledGradient:
    """Does on a CPU in one call what `rustyrl_learner.ppo.minibatch_gradient` does in sixty operations of torch."""

    def __init__(
        self, distribution: ActionDistribution, activation: str, parameters: Flat, gradient: Flat, threads: int
    ) -> None:
        """Describe the networks once.

        Args:
            distribution: of the policy.
            activation: of all hidden layers.
            parameters: read at each call.
            gradient: written at each call.
            threads: how many compute.
        """
        self._parameters, self._gradient = parameters.tensor.numpy(), gradient.tensor.numpy()
        self._threads = threads
        self._log_half = distribution.log_half
        self._quadrature = np.stack([part.numpy() for part in quadrature(torch.float32, torch.device("cpu"))])
        layers: list[tuple[int, ...]] = []
        for part, inside in enumerate((parameters.trunk, parameters.policy, parameters.critic)):
            for index, (weight, bias) in enumerate(inside):
                last = part and index == len(inside) - 1
                code = perceptron.ACTIVATIONS["identity" if last else activation]
                layers.append((part, *weight.shape, code, int(weight.storage_offset()), int(bias.storage_offset())))
        self._layers = np.array(layers, np.int32)
        blocks: list[tuple[int, ...]] = []
        for block, deviations in distribution.blocks:
            if deviations is None:
                kind, extra = CHOICE, -1 if block.mask is None else block.mask.start
            else:
                kind = SQUASHED if distribution.squashed else BOX
                extra = int(parameters.views["log_std"].storage_offset()) + deviations.start
            blocks.append((kind, block.groups, block.choices, block.column.start, block.output.start, extra))
        self._blocks = np.array(blocks, np.int32)

    def __call__(self, rows: TrainingBatch, importance: Tensor, config: PPOConfig) -> Minibatch:
        """Write the gradient of the loss on N rows; arguments as of `rustyrl_learner.ppo.minibatch_gradient`."""
        count = len(importance)
        log_prob, value, figures = (torch.empty(size) for size in (count, count, 2))
        normalized = torch.empty(count) if config.normalize_advantage and count > 1 else None
        given = (rows.observation, rows.action, rows.action_mask, rows.proximal_log_prob, importance, rows.advantage)
        perceptron.ppo_gradient(
            self._parameters,
            self._gradient,
            self._layers,
            self._blocks,
            self._quadrature,
            tuple(None if array is None else array.numpy() for array in (*given, rows.value, rows.value_target)),
            tuple(None if array is None else array.numpy() for array in (normalized, log_prob, value, figures)),
            (config.clip, config.value_clip, config.entropy, config.value_coefficient, self._log_half),
            self._threads,
        )
        advantage = rows.advantage if normalized is None else normalized
        return Minibatch(advantage, log_prob, value, entropy=figures[0], gradient_norm=figures[1])
