from typing import Any

from numpy.typing import NDArray

Floats = NDArray[Any]

def forward(
    x: Floats,
    weights: tuple[Floats, ...],
    biases: tuple[Floats, ...],
    activations: bytes,
    outs: tuple[Floats | None, ...],
    threads: int,
    /,
) -> None: ...
def backward(
    dout: Floats,
    x: Floats,
    outs: tuple[Floats | None, ...],
    weights: tuple[Floats, ...],
    activations: bytes,
    dweights: tuple[Floats, ...],
    dbiases: tuple[Floats, ...],
    dx: Floats | None,
    threads: int,
    /,
) -> None: ...
def supported() -> bool: ...
