"""Epochs that are captured once as a CUDA graph and replayed: a GPU is told of an epoch's kernels in one call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import Tensor

from rustyrl.config import PPOConfig
from rustyrl_learner.adam import Adam
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.ppo import TakeEpoch, run_epoch
from rustyrl_learner.rows import TrainingBatch

__all__ = ["EpochGraphs", "capture_on_cuda"]

log = logging.getLogger(__name__)

TOLERANCE = 0.01  # how far, by what an epoch changes, its first replay may be from the same epoch without a graph
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def capture_on_cuda(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """What work will leave, and how to have it done; nothing is done yet.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the receive thread may pin memory meanwhile
            result = work()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch leaves its own where the end of the capture fails, too
        raise
    return result, graph.replay


@dataclass(frozen=True, slots=True)
class _Captured:
    """An epoch as it was captured: where it reads, what it leaves, and how to have it done."""

    kind: tuple[object, ...]
    batch: TrainingBatch
    order: Tensor
    learning_rate: Tensor
    figures: Tensor
    replay: Callable[[], None]
    steps: int


class EpochGraphs:
    """Takes the epochs of a network's updates, by a graph once two updates in a row are of the same kind.

    A minibatch is more than a hundred small operations, and to tell a GPU of one takes longer than to do it. Batches,
    orders and the learning rate are copied to where the graph reads them. Coefficients and shapes are part of a graph,
    so updates whose clip or entropy weight is on a schedule, or whose count of rows changes, are taken without one.

    Parameters and figures of the first replay are held against those of the same epoch without a graph; where they
    differ, or nothing can be captured, the run goes on without and says so in its log.
    """

    def __init__(self, network: ActorCritic, optimizer: Adam, capture: Capture = capture_on_cuda) -> None:
        """Make one.

        Args:
            network: whose parameters lie where they stay, see `ActorCritic.flat`.
            optimizer: over them.
            capture: does what `capture_on_cuda` does.
        """
        self._network = network
        self._optimizer = optimizer
        self._capture = capture
        self._newest: tuple[object, ...] = ()
        self._captured: _Captured | None = None
        self.problem = ""  # why there are no graphs any more
        self.replayed = 0  # epochs

    def prepare(self, batch: TrainingBatch, config: PPOConfig) -> TakeEpoch:
        """How to take the epochs of this batch, one after the other; see `rustyrl_learner.ppo.run_epoch`."""
        plain = partial(run_epoch, self._network, self._optimizer, batch, config, watched=False)
        kind, before = _kind(batch, config), self._newest
        self._newest = kind
        if self.problem or kind != before:
            return plain
        if self._captured is not None and self._captured.kind == kind:
            self._captured.batch.copy_(batch)
        else:
            self._captured = None  # and its memory is free before the next one's is taken

        def take(order: Tensor, learning_rate: float, on_minibatch: Callable[[], None]) -> Tensor:
            if self.problem:
                return plain(order, learning_rate, on_minibatch)
            if self._captured is None:
                figures = self._begin(kind, batch, config, order, learning_rate)
            else:
                figures = self._replay(self._captured, order, learning_rate)
            on_minibatch()
            return figures

        return take

    def _replay(self, captured: _Captured, order: Tensor, learning_rate: float) -> Tensor:
        captured.order.copy_(order)
        captured.learning_rate.fill_(learning_rate)
        captured.replay()
        self._optimizer.steps += captured.steps
        self.replayed += 1
        return captured.figures

    def _begin(
        self, kind: tuple[object, ...], batch: TrainingBatch, config: PPOConfig, order: Tensor, learning_rate: float
    ) -> Tensor:
        """Capture an epoch, and take it both ways, of which the one without a graph is kept."""
        optimizer, block = self._optimizer, self._network.flat()[0].tensor
        rooms = batch.map(Tensor.clone)
        order, rate = order.clone(), torch.full((), learning_rate, device=block.device)
        plain = partial(run_epoch, self._network, optimizer, rooms, config, order, rate, watched=False)
        before, moments = block.clone(), {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
        steps = optimizer.steps

        def undo() -> None:
            block.copy_(before)
            optimizer.set_tensors(moments)

        try:
            figures, replay = self._capture(plain)
            taken, optimizer.steps = optimizer.steps - steps, steps  # a capture takes no step
            captured = _Captured(kind, rooms, order, rate, figures, replay, taken)
            self._replay(captured, order, learning_rate)
            replayed, of_replay = block.clone(), figures.clone()
        except RuntimeError as error:
            undo()
            self._give_up(f"an epoch cannot be captured as a CUDA graph ({error})")
            return plain()
        undo()
        figures = plain()
        distances = (replayed - block, block - before, of_replay - figures, figures)
        apart, moved, figures_apart, of_figures = torch.stack([distance.norm() for distance in distances]).tolist()
        alike = apart <= TOLERANCE * moved and figures_apart <= TOLERANCE * of_figures
        if alike or not math.isfinite(moved):
            self._captured = captured
            log.info("an epoch of %d minibatches is a CUDA graph from now on", taken)
        else:
            self._give_up(
                f"an epoch's replay differs from the epoch: parameters moved {moved:.3g}, {apart:.3g} apart, "
                f"figures are {figures_apart:.3g} apart of {of_figures:.3g}"
            )
        return figures

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        log.warning("%s: the run goes on without graphs", problem)


def _kind(batch: TrainingBatch, config: PPOConfig) -> tuple[object, ...]:
    """What a graph is captured for; the learning rate is copied to it, and gamma is in the advantages."""
    shapes = (array.shape for array in (batch.observation, batch.action, batch.action_mask) if array is not None)
    return msgspec.structs.replace(config, learning_rate=0.0, gamma=0.0), *shapes
