"""Our optimiser against torch's, and against the algorithm as published."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rustyrl_learner.adam import Adam

COUNT, KEPT = 200, 7


def gradients(steps: int) -> list[torch.Tensor]:
    """Of sizes from nothing to huge, some of them exactly 0."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-12, 6, COUNT)
    found = [torch.randn(COUNT, generator=generator) * sizes for _ in range(steps)]
    for gradient in found:
        gradient[::9] = 0.0
    return found


def ours(rates: list[float], **settings: float) -> torch.Tensor:
    block, gradient = torch.linspace(-2, 2, COUNT), torch.empty(COUNT)
    adam = Adam(block, gradient, epsilon=1e-5, **settings)  # type: ignore[arg-type]
    for rate, given in zip(rates, gradients(len(rates)), strict=True):
        gradient.copy_(given)
        adam.step(rate)
    return block


RATES = [1e-3, 2e-3, 0.0, 5e-4, 0.1] * 20


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(decay):
    start = torch.linspace(-2, 2, COUNT, dtype=torch.float64)
    parts = [torch.nn.Parameter(start[:KEPT].clone()), torch.nn.Parameter(start[KEPT:].clone())]
    groups = [{"params": parts[0], "weight_decay": 0.0}, {"params": parts[1], "weight_decay": decay}]
    theirs = torch.optim.AdamW(groups, lr=1.0, eps=1e-5)
    for rate, gradient in zip(RATES, gradients(len(RATES)), strict=True):
        for part, given in zip(parts, (gradient[:KEPT], gradient[KEPT:]), strict=True):
            part.grad = given.double()
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
    expected = torch.cat([part.detach() for part in parts]).float()
    torch.testing.assert_close(ours(RATES, decay=decay, kept=KEPT), expected, rtol=1e-5, atol=1e-5)


def test_the_first_step_is_the_rate_whatever_the_size_of_the_gradient():
    moved = torch.linspace(-2, 2, COUNT) - ours([0.01])
    (gradient,) = gradients(1)
    large = gradient.abs() > 1e-2
    torch.testing.assert_close(moved[large], 0.01 * gradient[large].sign(), rtol=2e-3, atol=1e-6)
    assert (moved[::9] == 0).all()


def test_it_goes_on_from_what_it_gave_and_keeps_nothing_of_before():
    def fresh() -> tuple[Adam, torch.Tensor, torch.Tensor]:
        block, gradient = torch.ones(COUNT), torch.empty(COUNT)
        return Adam(block, gradient, epsilon=1e-5), block, gradient

    first, block, gradient = fresh()
    for given in gradients(5):
        gradient.copy_(given)
        first.step(0.01)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second, other_block, other_gradient = fresh()
    other_gradient.fill_(99.0)
    second.step(1.0)
    second.set_tensors(kept)
    other_block.copy_(block)
    for adam, into in ((first, gradient), (second, other_gradient)):
        into.copy_(gradients(6)[-1])
        adam.step(0.01)
    assert torch.equal(block, other_block)
    assert {name: tensor.tolist() for name, tensor in first.tensors().items()} == {
        name: tensor.tolist() for name, tensor in second.tensors().items()
    }


def test_moments_of_other_parameters_are_refused():
    adam = Adam(torch.ones(4), torch.ones(4), epsilon=1e-5)
    other = Adam(torch.ones(5), torch.ones(5), epsilon=1e-5)
    with pytest.raises(RuntimeError, match="moments are of 5 numbers, expected 4"):
        adam.set_tensors(other.tensors())
    with pytest.raises(RuntimeError, match=r"no optimizer\.first, .* made by another version"):
        adam.set_tensors({"optimizer.0.exp_avg": torch.ones(4)})


def test_training_does_not_load_the_compiler_of_torch():
    """It takes as long to import as all the rest of torch, and nothing here uses it."""
    code = (
        "import sys, torch\n"
        "from rustyrl.config import build_config\n"
        "from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec\n"
        "from rustyrl_learner.ppo import ppo_update\n"
        "from rustyrl_learner.rows import TrainingBatch\n"
        "from rustyrl_learner.training import Training\n"
        "spec = EnvironmentSpec('test', (ArraySpec('main', (3,), 'float32'),), "
        "(ActionSpec('discrete', counts=(4,)),), 1, 0.1, 10)\n"
        "training = Training(build_config({}), spec, torch.device('cpu'))\n"
        "batch = TrainingBatch(torch.randn(64, 3), torch.zeros(64, 1), None, *torch.randn(5, 64))\n"
        "ppo_update(training.network, training.optimizer, batch, build_config({}).ppo, 1e-3, training.shuffle)\n"
        "assert training.optimizer.steps\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
