"""Optimiser steps on a CPU by compiled code, which takes a few rows at a time through everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rustyrl import perceptron
from rustyrl.config import PPOConfig
from rustyrl_learner.adam import Adam, Moving
from rustyrl_learner.distribution import ActionDistribution, quadrature
from rustyrl_learner.rows import ENTROPY, GRADIENT_NORM, Minibatch, TrainingBatch

if TYPE_CHECKING:
    from rustyrl_learner.network import Flat

__all__ = ["CompiledEpoch"]

BOX, SQUASHED, CHOICE = range(3)  # as in rustyrl/c/loss.h
FIGURES = GRADIENT_NORM + 1  # as there, of which all but the norm are means over rows


class CompiledEpoch:
    """Does on a CPU in one call what torch does in seventy operations for each minibatch of an epoch."""

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

    def gradient(self, rows: TrainingBatch, importance: Tensor, config: PPOConfig) -> Minibatch:
        """Write the gradient of the loss on N rows; arguments as of `rustyrl_learner.ppo.minibatch_gradient`."""
        count = len(importance)
        (figures,), said = self._call(rows, importance, config, torch.arange(count), [0, count], None)[1:]
        return Minibatch(*said, entropy=figures[ENTROPY], gradient_norm=figures[GRADIENT_NORM])

    def steps(
        self,
        rows: TrainingBatch,
        importance: Tensor,
        config: PPOConfig,
        order: Tensor,
        edges: Sequence[int],
        adam: Adam,
        learning_rate: float,
    ) -> tuple[int, Tensor, Tensor]:
        """Take an optimiser step for each minibatch, until a gradient is not finite.

        Args:
            rows: N of a batch.
            importance: `[N]`, see `rustyrl_learner.ppo.policy_loss`.
            config: coefficients.
            order: `[n]` int64, of the rows.
            edges: where in it each of M minibatches begins, and where the last one ends.
            adam: over the parameters and the gradient.
            learning_rate: of all steps.

        Returns:
            How many were taken, `FIGURES` of each minibatch, `[M, 6]`, and the log-probabilities of their rows; of
            minibatches after one whose gradient is not finite these are anything.
        """
        start, stop = edges[0], edges[-1]
        order, edges = order[start:stop], [edge - start for edge in edges]
        given = adam.moving(learning_rate, config.max_gradient_norm)
        taken, figures, (_, log_prob, _) = self._call(rows, importance, config, order, edges, given)
        adam.set_steps(adam.steps + taken)
        return taken, figures, log_prob

    def _call(
        self,
        rows: TrainingBatch,
        importance: Tensor,
        config: PPOConfig,
        order: Tensor,
        edges: Sequence[int],
        adam: Moving | None,
    ) -> tuple[int, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Minibatches taken; figures of each `[M, 6]`; advantages, log-probabilities and values `[n]`."""
        said = torch.empty(len(order)), torch.empty(len(order)), torch.empty(len(order))
        figures = torch.empty(len(edges) - 1, FIGURES)
        given = (rows.observation, rows.action, rows.action_mask, rows.proximal_log_prob, importance, rows.advantage)
        numbers = (config.clip, config.value_clip, config.entropy, config.value_coefficient, self._log_half)
        taken = perceptron.ppo_epoch(
            self._parameters,
            self._gradient,
            self._layers,
            self._blocks,
            self._quadrature,
            tuple(None if array is None else array.numpy() for array in (*given, rows.value, rows.value_target)),
            order.int().numpy(),
            np.array(edges, np.int32),
            tuple(array.numpy() for array in (*said, figures)),
            (*numbers, config.normalize_advantage),
            adam,
            self._threads,
        )
        return taken, figures, said
