"""An update on a CPU by compiled code, which takes a few rows at a time through everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl import perceptron
from rustyrl.config import PPOConfig
from rustyrl_learner.adam import Adam, Moving
from rustyrl_learner.distribution import ActionDistribution, quadrature
from rustyrl_learner.perceptron import Floats, Layers
from rustyrl_learner.rows import ENTROPY, GRADIENT_NORM, Minibatch, TrainingBatch

if TYPE_CHECKING:
    from rustyrl_learner.network import Flat

__all__ = ["CompiledUpdate"]

Arrays = tuple[NDArray[np.generic] | None, ...]  # of rows, as `ppo_epoch` reads them
FIGURES = GRADIENT_NORM + 1  # as in rustyrl/c/loss.h, of which all but the norm are means over rows


class CompiledUpdate:
    """Does on a CPU in one call what torch does in seventy operations for each minibatch of an epoch.

    The log-probabilities that an update starts from are its, too.
    """

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
        self._policy = Layers([*parameters.trunk, *parameters.policy])
        self._codes = perceptron.encode_activations([*[activation] * (len(self._policy) - 1), "identity"]) or b""
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
        deviations = parameters.views.get("log_std")
        first = 0 if deviations is None else int(deviations.storage_offset())
        squashed = distribution.squashed
        self._blocks = perceptron.encode_blocks(distribution.action, squashed=squashed, first_deviation=first)
        self._boxes = perceptron.encode_blocks(distribution.action, squashed=squashed)
        self._log_std = np.zeros(0, np.float32) if deviations is None else deviations.numpy()

    def log_prob(self, x: Tensor, action: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probability `[N]` of raw actions `[N, A]` for observations `[N, in]`; masks as of `ppo_epoch`."""
        out = torch.empty(len(x))
        masks = None if mask is None else mask.numpy()
        boxes = (self._boxes, self._log_std, self._log_half)
        layers = (*self._policy.arrays, self._codes)
        perceptron.policy(x.numpy(), None, *layers, *boxes, masks, None, action.numpy(), out.numpy(), self._threads)
        return out

    @staticmethod
    def arrays(rows: TrainingBatch, importance: Tensor) -> Arrays:
        """N rows and their importance `[N]`, see `rustyrl_learner.ppo.policy_loss`, as `steps` takes them."""
        given = (rows.observation, rows.action, rows.action_mask, rows.proximal_log_prob, importance, rows.advantage)
        return tuple(None if array is None else array.numpy() for array in (*given, rows.value, rows.value_target))

    def gradient(self, rows: TrainingBatch, importance: Tensor, config: PPOConfig) -> Minibatch:
        """Write the gradient of the loss on N rows; arguments as of `rustyrl_learner.ppo.minibatch_gradient`."""
        count = len(importance)
        order, edges = np.arange(count, dtype=np.int32), np.array([0, count], np.int32)
        _, figures, said = self._call(self.arrays(rows, importance), config, order, edges, None)
        advantage, log_prob, value = map(torch.from_numpy, said)
        entropy, norm = torch.from_numpy(figures[0, [ENTROPY, GRADIENT_NORM]])
        return Minibatch(advantage, log_prob, value, entropy=entropy, gradient_norm=norm)

    def steps(
        self,
        rows: Arrays,
        config: PPOConfig,
        order: NDArray[np.int32],
        edges: NDArray[np.int32],
        adam: Adam,
        learning_rate: float,
    ) -> tuple[int, Floats, Floats]:
        """Take an optimiser step for each minibatch, until a gradient is not finite.

        Args:
            rows: of `arrays`.
            config: coefficients.
            order: `[n]`, of the rows.
            edges: `[M + 1]`, where in it each of M minibatches begins, and where the last one ends.
            adam: over the parameters and the gradient.
            learning_rate: of all steps.

        Returns:
            How many were taken, `FIGURES` of each minibatch, `[M, 6]`, and the log-probabilities of their rows; of
            minibatches after one whose gradient is not finite these are anything.
        """
        order, edges = order[edges[0] : edges[-1]], edges - edges[0]
        given = adam.moving(learning_rate, config.max_gradient_norm)
        taken, figures, (_, log_prob, _) = self._call(rows, config, order, edges, given)
        adam.set_steps(adam.steps + taken)
        return taken, figures, log_prob

    def _call(
        self,
        rows: Arrays,
        config: PPOConfig,
        order: NDArray[np.int32],
        edges: NDArray[np.int32],
        adam: Moving | None,
    ) -> tuple[int, Floats, tuple[Floats, Floats, Floats]]:
        """Minibatches taken; figures of each `[M, 6]`; advantages, log-probabilities and values `[n]`."""
        advantage, log_prob, value = np.empty((3, len(order)), np.float32)
        figures = np.empty((len(edges) - 1, FIGURES), np.float32)
        numbers = (config.clip, config.value_clip, config.entropy, config.value_coefficient, self._log_half)
        taken = perceptron.ppo_epoch(
            self._parameters,
            self._gradient,
            self._layers,
            self._blocks,
            self._quadrature,
            rows,
            order,
            edges,
            (advantage, log_prob, value, figures),
            (*numbers, config.normalize_advantage),
            adam,
            self._threads,
        )
        return taken, figures, (advantage, log_prob, value)
