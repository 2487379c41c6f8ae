"""Many episodes summed up: the same figures for training and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rustyrl.spec import EnvironmentSpec

__all__ = ["EPISODE_FIGURES", "episode_figures", "known_figures"]

PERCENTILES = (10, 50, 90)
# What every environment has, beside its own metrics.
EPISODE_FIGURES = (
    "return_mean",
    "return_std",
    "length_mean",
    *(f"return_p{p}" for p in PERCENTILES),
    *(f"length_p{p}" for p in PERCENTILES),
)


def known_figures(spec: EnvironmentSpec) -> tuple[str, ...]:
    """The names that a condition on episodes of this environment may use."""
    return (*EPISODE_FIGURES, *(metric.name for metric in spec.metrics))


def episode_figures(
    spec: EnvironmentSpec,
    episode_return: NDArray[np.floating],
    length: NDArray[np.number],
    metrics: Mapping[str, NDArray[np.floating]],
) -> dict[str, float]:
    """``episodes``, `EPISODE_FIGURES` and the metrics that the world declares.

    Args:
        spec: declares how each metric is summed up.
        episode_return: `[N]`, N at least 1.
        length: `[N]` env steps.
        metrics: per-episode metric to `[N]`, NaN where it means nothing.

    Returns:
        Declared metrics for which every episode reported NaN are left out.
    """
    figures = {
        "episodes": float(len(episode_return)),
        "return_mean": float(np.mean(episode_return)),
        "return_std": float(np.std(episode_return)),
        "length_mean": float(np.mean(length)),
    }
    for name, values in (("return", episode_return), ("length", length)):
        found = np.percentile(values, PERCENTILES).tolist()
        figures |= {f"{name}_p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}
    for metric in spec.metrics:
        values = metrics[metric.episode_metric]
        values = values[~np.isnan(values)]
        if len(values):
            aggregate = np.median if metric.aggregate == "median" else np.mean
            figures[metric.name] = float(aggregate(values))
    return figures
