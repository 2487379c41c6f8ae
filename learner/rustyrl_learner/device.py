"""What the learner computes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rustyrl.errors import UsageError
from rustyrl.perceptron import MAX_THREADS, encode_activations
from rustyrl.processes import available_cores

__all__ = ["CopyStream", "Threads", "choose_device", "gpu_figures", "share_threads"]


def choose_device(name: str) -> torch.device:
    """The device to compute on; raises `UsageError` where CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch and a driver"
            f" (torch is {torch.__version__})"
        )
    return torch.device(name)


def gpu_figures(device: torch.device) -> dict[str, Any] | None:
    """Name and memory of the GPU that training runs on, and how busy it is where its driver's library says so."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    figures: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device),
        "memory_bytes": total - free,
        "memory_total_bytes": total,
        "ours_bytes": torch.cuda.memory_reserved(device),
    }
    with contextlib.suppress(Exception):  # needs nvidia-ml-py and a driver that answers
        figures["busy_percent"] = torch.cuda.utilization(device)
    return figures


class CopyStream:
    """Copies from pinned memory to a GPU beside what is computed there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def room(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory on the GPU for arrays of these names, shapes and dtypes."""
        made = {name: torch.empty_like(array, device=self._device) for name, array in arrays.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still read who had it before
        return made

    def copy(self, arrays: Mapping[str, Tensor], room: Mapping[str, Tensor]) -> torch.cuda.Event:
        """Begin to copy pinned arrays; what `wait` takes."""
        with torch.cuda.stream(self._stream):
            for name, array in arrays.items():
                room[name].copy_(array, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self._stream)
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        """Have what this thread computes from now on wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)


@dataclass(frozen=True, slots=True)
class Threads:
    """How a learner uses the cores of a CPU.

    lanes: 2 if policy and critic are computed at the same time
    of: threads of each
    compiled: whether they are compiled code's, or torch's
    """

    lanes: int = 1
    of: int = 1
    compiled: bool = False


def share_threads(threads: int, *, shared: bool, activations: Sequence[str]) -> Threads:
    """Have torch use as many threads of the CPU as suits its learner.

    Compiled code shares rows out among threads that sleep when they have none, and takes up to 8. Torch's own share
    out every single operation and spin while one of them waits for a core, so they are at most 4, in two `Lanes`
    wherever there are two cores, and one core is left to the actors.

    Args:
        threads: 0 chooses.
        shared: whether policy and critic share layers, so that there is one lane.
        activations: of the layers of policy or critic.
    """
    cores = available_cores()
    if encode_activations(activations) is not None:
        torch.set_num_threads(1)
        return Threads(1, min(threads, MAX_THREADS) or min(cores, 8), compiled=True)
    chosen = threads or max(1, min(4, cores - 1))
    lanes = 1 if shared or (threads or cores) == 1 else 2
    each = max(1, chosen // lanes)
    torch.set_num_threads(each)
    return Threads(lanes, each)
