"""What the learner computes on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from rustyrl.errors import UsageError
from rustyrl.processes import available_cores

__all__ = ["choose_device", "gpu_figures", "share_threads"]


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


def share_threads(threads: int, *, shared: bool) -> int:
    """Have torch use so many threads of the CPU, half of them for each of two `Lanes`; returns how many lanes.

    Args:
        threads: 0 takes all cores but one, which the actors need, and at most 4, as the products are small: torch's
            threads spin while one of them waits for a core. It takes two lanes wherever there are two cores, since a
            lane that waits does not.
        shared: whether policy and critic share layers, so that there is one lane.
    """
    cores = available_cores()
    chosen = threads or max(1, min(4, cores - 1))
    lanes = 1 if shared or (threads or cores) == 1 else 2
    torch.set_num_threads(max(1, chosen // lanes))
    return lanes
