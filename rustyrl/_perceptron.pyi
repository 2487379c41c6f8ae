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
def policy(
    x: Floats,
    normalizer: tuple[Floats, Floats, float] | None,
    weights: tuple[Floats, ...],
    biases: tuple[Floats, ...],
    activations: bytes,
    blocks: NDArray[Any],
    log_std: Floats,
    log_half: float,
    masks: NDArray[Any] | None,
    noise: Floats | None,
    action: Floats,
    log_prob: Floats,
    threads: int,
    /,
) -> None: ...
def ppo_epoch(
    parameters: Floats,
    gradient: Floats,
    layers: NDArray[Any],
    blocks: NDArray[Any],
    quadrature: Floats,
    rows: tuple[Floats | None, ...],
    order: NDArray[Any],
    edges: NDArray[Any],
    outs: tuple[Floats, ...],
    numbers: tuple[float, ...],
    adam: tuple[Any, ...] | None,
    threads: int,
    /,
) -> int: ...
def supported() -> bool: ...
