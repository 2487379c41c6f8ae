"""Small perceptrons on a CPU, compiled: of a policy in an actor and of the networks in a learner.

`_perceptron.c` is compiled while rustyrl is installed, if there is a C compiler. Without one, or on a processor that it
is not made for, numpy and torch compute the same, more slowly; ``rustyrl doctor`` says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

__all__ = ["COMPILED", "MAX_THREADS", "OFF_VARIABLE", "PROBLEM", "backward", "encode_activations", "forward"]

ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2}  # as in _perceptron.c
MAX_THREADS = 64
OFF_VARIABLE = "RUSTYRL_COMPILED"  # 0 switches it off, to compare with

PROBLEM = ""  # why there is none
try:
    from rustyrl._perceptron import backward, forward, supported
except ImportError as error:
    PROBLEM = f"not compiled when rustyrl was installed: {error}"
else:
    if os.environ.get(OFF_VARIABLE) == "0":
        PROBLEM = f"switched off by {OFF_VARIABLE}=0"
    elif not supported():
        PROBLEM = "this processor has no AVX2 and FMA"
COMPILED = not PROBLEM


def encode_activations(activations: Iterable[str]) -> bytes | None:
    """The activations of the layers as `forward` and `backward` read them; None if they cannot be computed here."""
    names = list(activations)
    return bytes(ACTIVATIONS[name] for name in names) if COMPILED and ACTIVATIONS.keys() >= set(names) else None
