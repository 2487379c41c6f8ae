"""A GPU's TF32 rounds what goes into a product of matrices to 11 bits: learning is as fast with that, and with 8.

No GPU is needed: the update's own products, by torch, get rounded numbers, which is all that TF32 does; sums are
float32. Eight bits are bfloat16's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from studies import Study
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rustyrl import perceptron

TF32_BITS, BFLOAT16_BITS = 11, 8  # of what stands before the exponent
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.mv, torch.ops.aten.addmv}
WINDOW = 100  # episodes
MAX_UPDATES = 400
SETTINGS: dict[str, Any] = {
    "env": {"slots": 256},
    "batch": {"unroll_length": 32, "worlds": 2},
    "policy": {"hidden": [64, 64]},
    "ppo": {"minibatch_size": 4096, "epochs": 4, "learning_rate": 1e-3},
}


def rounded(x: Tensor, bits: int) -> Tensor:
    """To the nearest number of so many bits, ties to the even one."""
    dropped = 24 - bits
    whole = x.contiguous().view(torch.int32)
    odd = (whole >> dropped) & 1
    return ((whole + (1 << (dropped - 1)) - 1 + odd) & -(1 << dropped)).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Rounds the two factors of every product of matrices."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.products = bits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.products += func.overloadpacket in PRODUCTS
        if func.overloadpacket in PRODUCTS and self.bits < 24:
            args = (*args[:-2], *(rounded(x, self.bits) for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def updates_until(world: str, threshold: float, bits: int, seed: int) -> int:
    """How many updates it takes until the mean of the newest episodes is that high."""
    study = Study(world, **SETTINGS, run={"seed": seed, "threads": 1})  # a mode is the thread's that is in it
    layers = 3 * 2  # of the policy and of the critic, of which each has a product forth in a minibatch, and one back
    with closing(study.fleet), RoundedProducts(bits) as mode:
        while np.mean(study.returns[-WINDOW:] or -np.inf) < threshold or len(study.returns) < WINDOW:
            study.update()
            assert len(study.rows) < MAX_UPDATES, f"{world}, {bits} bits, seed {seed}: not in {MAX_UPDATES} updates"
    minibatches = 4 * 4 * (len(study.rows) - 1)
    assert mode.products > 2 * layers * minibatches
    return len(study.rows)


@pytest.mark.parametrize("bits", [TF32_BITS, BFLOAT16_BITS])
def test_numbers_are_rounded_as_a_gpu_does(bits: int) -> None:
    x = torch.randn(10_000) * 10.0 ** torch.randint(-20, 20, (10_000,))
    if bits == BFLOAT16_BITS:
        assert torch.equal(rounded(x, bits), x.bfloat16().float())
    error = ((rounded(x, bits) - x) / x).abs().max()
    assert 2.0 ** -(bits + 1) < error <= 2.0**-bits
    assert torch.equal(rounded(rounded(x, bits), bits), rounded(x, bits))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "threshold"), [("cartpole", 400.0), ("drone", 15.0)])
def test_learning_is_as_fast_with_rounded_products(
    world: str, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceptron, "COMPILED", False)
    seeds = range(1, 1 + int(os.environ.get("SEEDS", "3")))
    taken = {
        bits: [updates_until(world, threshold, bits, seed) for seed in seeds] for bits in (24, TF32_BITS, BFLOAT16_BITS)
    }
    for bits in (TF32_BITS, BFLOAT16_BITS):
        assert np.median(taken[bits]) <= 1.5 * np.median(taken[24]), taken
