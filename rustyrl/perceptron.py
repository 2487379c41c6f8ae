"""Small perceptrons on a CPU, compiled: what networks say, actions and their odds, a learner's optimiser steps.

`c/perceptron.c` is compiled while rustyrl is installed, if there is a C compiler. Without one, or on a processor
that it is not made for, numpy and torch compute the same, more slowly; ``rustyrl doctor`` says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rustyrl.spec import ActionSpec, action_blocks

__all__ = ["ACTIVATIONS", "COMPILED", "MAX_THREADS", "OFF_VARIABLE", "PROBLEM"]
__all__ += ["encode_activations", "encode_blocks", "forward", "policy", "ppo_epoch"]

ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2, "elu": 3, "silu": 4}  # as in c/layers.h
BOX, SQUASHED, CHOICE = range(3)  # as in c/loss.h
MAX_THREADS = 64
MAX_LAYERS = 64  # of all networks together
OFF_VARIABLE = "RUSTYRL_COMPILED"  # 0 switches it off, to compare with

PROBLEM = ""  # why there is none
try:
    from rustyrl._perceptron import forward, policy, ppo_epoch, supported
except ImportError as error:
    PROBLEM = f"not compiled when rustyrl was installed: {error}"
else:
    if os.environ.get(OFF_VARIABLE) == "0":
        PROBLEM = f"switched off by {OFF_VARIABLE}=0"
    elif not supported():
        PROBLEM = "this processor has no AVX2 and FMA"
COMPILED = not PROBLEM


def encode_activations(activations: Iterable[str]) -> bytes | None:
    """The activations of a network's layers as `forward` reads them; None if it cannot be computed here."""
    names = list(activations)
    if not COMPILED or not ACTIVATIONS.keys() >= set(names) or len(names) > MAX_LAYERS // 2:
        return None
    return bytes(ACTIVATIONS[name] for name in names)


def encode_blocks(action: tuple[ActionSpec, ...], *, squashed: bool, first_deviation: int = 0) -> NDArray[np.int32]:
    """The blocks of an action as `policy` and `ppo_epoch` read them, `[n, 6]`.

    Args:
        action: its parts.
        squashed: whether boxes are.
        first_deviation: where the deviations of the first box are among the numbers that hold them.
    """
    rows: list[tuple[int, ...]] = []
    for block in action_blocks(action):
        if block.kind == "box":
            kind, extra = SQUASHED if squashed else BOX, first_deviation
            first_deviation += block.groups
        else:
            kind, extra = CHOICE, -1 if block.mask is None else block.mask.start
        rows.append((kind, block.groups, block.choices, block.column.start, block.output.start, extra))
    return np.array(rows, np.int32)
