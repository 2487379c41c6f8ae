from typing import Any

from numpy.typing import NDArray

Floats = NDArray[Any]

def forward(
    x: Floats,
    weights: tuple[Floats, ...],
    biases: tuple[Floats, ...],
    activations: bytes,
    out: Floats,
    threads: int,
    /,
) -> None: ...
def ppo_gradient(
    parameters: Floats,
    gradient: Floats,
    layers: NDArray[Any],
    blocks: NDArray[Any],
    quadrature: Floats,
    rows: tuple[Floats | None, ...],
    outs: tuple[Floats | None, ...],
    numbers: tuple[float, ...],
    threads: int,
    /,
) -> None: ...
def supported() -> bool: ...
