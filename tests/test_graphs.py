"""Epochs that are captured once and replayed: on a CPU by a recording of torch's operations, on a GPU by CUDA's graphs.

A CUDA graph repeats what reached the device: the same operations, on the same memory, without Python. So does the
recording here, and where an epoch would make a graph fail, by looking at a number or by bringing one from outside, the
recording fails, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ppo import ACTIONS, batch_of, network_of, with_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rustyrl.config import PPOConfig
from rustyrl_learner.adam import Adam
from rustyrl_learner.graphs import EpochGraphs, capture_on_cuda
from rustyrl_learner.network import ActorCritic
from rustyrl_learner.ppo import Losses, ppo_update
from rustyrl_learner.rows import TrainingBatch

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = with_config(epochs=3, minibatch_size=20, value_clip=0.2, max_gradient_norm=0.5, schedule="kl", target_kl=1e-4)
ROWS = 65  # minibatches of 21 and 22
FROM_OUTSIDE = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "_to_cpu", "equal")


class Recording(TorchDispatchMode):
    """Every operation of torch in the order in which it came, done again by `replay` on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in FROM_OUTSIDE:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        self.names.append(name)
        given = _tensors((args, kwargs))
        fresh = [out for out in _tensors(result) if not any(_same_memory(out, arg) for arg in given)]
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if fresh or writes:  # else what came out is a view

            def again() -> None:
                told = func(*args, **kwargs)
                if fresh:
                    for room, number in zip(_tensors(result), _tensors(told), strict=True):
                        room.copy_(number)

            self.steps.append(again)
        return result

    def replay(self) -> None:
        for step in self.steps:
            step()


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [tensor for part in given for tensor in _tensors(part)] if isinstance(given, list | tuple) else []


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Captures:
    """Captures as a GPU does: nothing of what is captured happens until it is replayed."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.spoil: Callable[[], None] = lambda: None
        self.after: Callable[[Tensor], object] = lambda _: None
        self.looks = False
        self.changing: list[Tensor] = []

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        before = [tensor.clone() for tensor in self.changing]
        recording = Recording()
        try:
            with recording:
                figures = work()
                if self.looks:
                    figures[0].item()
        finally:
            for tensor, number in zip(self.changing, before, strict=True):
                tensor.copy_(number)
        self.recordings.append(recording)

        def replay() -> None:
            recording.replay()
            self.spoil()
            self.after(figures)

        return figures, replay


class Side:
    """A network that is trained, with graphs or without."""

    def __init__(
        self, kind: str, *, shared: bool = False, decay: float = 0.0, captures: Captures | None = None
    ) -> None:
        self.network: ActorCritic = network_of(kind, shared=shared, compiled=0)
        self.parameters, gradient = self.network.flat()
        self.optimizer = Adam(self.parameters.tensor, gradient.tensor, epsilon=1e-5, decay=decay)
        self.shuffle = torch.Generator().manual_seed(3)
        self.graphs: EpochGraphs | None = None
        if captures is not None:
            optimizer = self.optimizer
            captures.changing = [self.parameters.tensor, optimizer.first, optimizer.second, optimizer._taken]
            self.graphs = EpochGraphs(self.network, optimizer, captures)
        self.rate = 1e-3
        self.minibatches = 0

    def update(self, batch: TrainingBatch, config: PPOConfig = CONFIG) -> Losses:
        def count() -> None:
            self.minibatches += 1

        given = (self.network, self.optimizer, batch, config, self.rate, self.shuffle, count)
        losses = ppo_update(*given, graphs=self.graphs)
        self.rate = losses.learning_rate
        return losses


def batches(kind: str, count: int = 5, rows: int = ROWS) -> list[TrainingBatch]:
    return [batch_of(network_of(kind, compiled=0), rows, seed=seed, lag=0.1) for seed in range(count)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ACTIONS)
def test_updates_by_graphs_are_those_without(kind: str, shared: bool) -> None:
    """Parameters, moments, figures and the rates that follow from them."""
    captures = Captures()
    plain, replayed = Side(kind, shared=shared, decay=0.1), Side(kind, shared=shared, decay=0.1, captures=captures)
    for batch in batches(kind):
        expected, found = plain.update(batch), replayed.update(batch)
        for name in Losses.__slots__:
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name
        torch.testing.assert_close(replayed.parameters.tensor, plain.parameters.tensor, rtol=1e-4, atol=1e-6)
        assert replayed.optimizer.steps == plain.optimizer.steps == int(replayed.optimizer._taken)
    torch.testing.assert_close(replayed.optimizer.second, plain.optimizer.second, rtol=1e-4, atol=1e-8)
    assert replayed.rate != 1e-3, "the schedule changed nothing, so a rate that graphs do not read would pass"
    assert replayed.graphs is not None
    assert replayed.graphs.problem == ""
    assert len(captures.recordings) == 1
    assert replayed.graphs.replayed == 4 * CONFIG.epochs  # all but those of the first update


def test_a_graph_is_made_for_the_second_update_of_a_kind_and_holds_for_that_kind() -> None:
    captures = Captures()
    plain, replayed = Side("box"), Side("box", captures=captures)
    (first, *_), (fewer, *_) = batches("box"), batches("box", rows=50)
    bolder = with_config(epochs=3, minibatch_size=20, clip=0.3)
    told = []
    for batch, config in [
        (first, CONFIG),
        (fewer, CONFIG),  # never two in a row
        (first, CONFIG),
        (first, CONFIG),  # captured
        (fewer, CONFIG),
        (first, CONFIG),
        (first, CONFIG),  # still good
        (first, bolder),
        (first, bolder),  # captured anew
    ]:
        plain.update(batch, config)
        replayed.update(batch, config)
        told.append(len(captures.recordings))
        torch.testing.assert_close(replayed.parameters.tensor, plain.parameters.tensor, rtol=1e-4, atol=1e-6)
    assert told == [0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert replayed.graphs is not None
    assert replayed.graphs.replayed == 9


@pytest.mark.parametrize("breaks", ["replay", "capture"])
def test_where_graphs_do_not_work_the_run_goes_on_without(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    captures = Captures()
    plain, replayed = Side("squashed"), Side("squashed", captures=captures)
    if breaks == "replay":
        captures.spoil = lambda: replayed.parameters.tensor[3].mul_(1.01)
    captures.looks = breaks == "capture"
    with caplog.at_level(logging.WARNING):
        for batch in batches("squashed"):
            plain.update(batch)
            replayed.update(batch)
            torch.testing.assert_close(replayed.parameters.tensor, plain.parameters.tensor, rtol=1e-4, atol=1e-6)
            assert replayed.optimizer.steps == plain.optimizer.steps
    assert replayed.graphs is not None
    expected = {"replay": "an epoch's replay differs", "capture": "an epoch cannot be captured"}[breaks]
    assert expected in replayed.graphs.problem
    assert expected in caplog.text
    assert len(caplog.records) == 1


def test_numbers_that_are_not_finite_are_found_in_what_was_replayed() -> None:
    replayed = Side("box", captures=Captures())
    good, *_, bad = batches("box")
    for _ in range(3):
        replayed.update(good)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        replayed.update(replace(bad, value_target=bad.value_target * float("nan")))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_norm_beyond_float32_before_the_last_minibatch_is_found(graphs: bool) -> None:
    """Its step changes nothing, and those after it are fine."""
    side = Side("box", captures=Captures())
    good, wrong, *_ = batches("box")
    for _ in range(3 if graphs else 0):
        side.update(good)
    wrong.value_target[0] = 1e24
    last = with_config(epochs=1, minibatch_size=20)
    shuffle = torch.Generator().manual_seed(next(s for s in range(99) if _place_of_first(s) < ROWS // 3))
    given = (side.network, side.optimizer, wrong, last if not graphs else CONFIG, 1e-3, shuffle)
    with pytest.raises(FloatingPointError, match="the value loss is inf"):
        ppo_update(*given, graphs=side.graphs)


def _place_of_first(seed: int) -> int:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).tolist().index(0)


def test_figures_that_differ_are_found_too() -> None:
    side = Side("box", captures=(captures := Captures()))
    captures.after = lambda figures: figures.mul_(1.1)
    for batch in batches("box"):
        side.update(batch)
    assert side.graphs is not None
    assert "figures are" in side.graphs.problem


def test_a_stop_between_replayed_epochs_is_heard() -> None:
    replayed = Side("box", captures=Captures())
    (batch, *_) = batches("box")
    for _ in range(3):
        replayed.update(batch)
    assert replayed.minibatches == 3 * CONFIG.epochs + 2 * CONFIG.epochs  # three minibatches each without a graph
    before = replayed.optimizer.steps

    def stop() -> None:
        raise InterruptedError

    given = (replayed.network, replayed.optimizer, batch, CONFIG, 1e-3, replayed.shuffle, stop)
    with pytest.raises(InterruptedError):
        ppo_update(*given, graphs=replayed.graphs)
    assert replayed.optimizer.steps == before + 3


def test_training_that_was_put_back_goes_on_by_the_same_graph() -> None:
    """As after an update that a stop abandoned: state is copied to where it was."""
    replayed = Side("box", captures=Captures())
    (batch, *_) = batches("box")
    for _ in range(3):
        replayed.update(batch)
    block, shuffle, rate = replayed.parameters.tensor.clone(), replayed.shuffle.get_state(), replayed.rate
    moments = {name: tensor.clone() for name, tensor in replayed.optimizer.tensors().items()}
    replayed.update(batch)
    once = replayed.parameters.tensor.clone()
    replayed.parameters.tensor.copy_(block)
    replayed.optimizer.set_tensors(moments)
    replayed.shuffle.set_state(shuffle)
    replayed.rate = rate
    replayed.update(batch)
    assert torch.equal(replayed.parameters.tensor, once)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_what_a_gpu_cannot_capture_leaves_it_as_it_was() -> None:
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        capture_on_cuda(lambda: torch.ones(3, device="cuda").sum().item())  # type: ignore[arg-type, return-value]
    assert torch.cuda.current_stream() == before
    assert (torch.ones(3, device="cuda") * 2).sum().item() == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("kind", ACTIONS)
def test_updates_by_graphs_of_a_gpu_are_those_without(kind: str) -> None:
    sides = []
    for graphs in (False, True):
        network = network_of(kind, compiled=0).cuda()
        parameters, gradient = network.flat()
        optimizer = Adam(parameters.tensor, gradient.tensor, epsilon=1e-5)
        made = EpochGraphs(network, optimizer, capture_on_cuda) if graphs else None
        shuffle = torch.Generator().manual_seed(3)
        for batch in batches(kind):
            there = batch.map(lambda array: array.cuda())
            ppo_update(network, optimizer, there, CONFIG, 1e-3, shuffle, graphs=made)
        sides.append(parameters.tensor)
    torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-5)
    assert made is not None
    assert made.problem == ""
    assert made.replayed == 4 * CONFIG.epochs
