"""Hold the scores of presets, trained as they were published, against the published ones."""

from __future__ import annotations

import importlib.util
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from rustyrl import perceptron
from rustyrl.errors import UsageError
from rustyrl.installed import installed_version
from rustyrl.presets import Preset
from rustyrl.processes import available_cores
from rustyrl.trials import Outcome, Outcomes, Trial, budget

__all__ = ["check_packages", "judge", "machine", "result_rows"]

UNFINISHED = "not finished"
VERSIONS = ("rustyrl", "numpy", "torch", "gymnasium", "box2d", "mujoco")


def check_packages(presets: Sequence[Preset]) -> None:
    """Refuse what is known to fail for want of a package, before anything is trained.

    Raises:
        UsageError: naming every missing one, what needs it, and how to install it.
    """
    if missing := [name for name in ("torch", "tensorboard") if not _is_installed(name)]:
        raise UsageError(f"training needs {' and '.join(missing)}: pip install 'rustyrl[learner]'")
    wanting: dict[str, list[str]] = {}
    for preset in presets:
        for module, distribution in preset.packages.items():
            if not _is_installed(module):
                wanting.setdefault(distribution, []).append(preset.name)
    if wanting:
        needs = "; ".join(f"{' and '.join(names)}: {distribution}" for distribution, names in wanting.items())
        raise UsageError(f"packages are missing for {needs}. Install them: pip install 'rustyrl[verify]'")


def result_rows(
    trials: Sequence[Trial], outcomes: Outcomes, steps_limit: int | None, *, whole: bool
) -> list[dict[str, Any]]:
    """A row for each preset and lag, judged; see `judge`.

    Args:
        trials: what was planned.
        outcomes: what there is so far.
        steps_limit: as of `run_trials`.
        whole: also rows of which nothing is there yet.
    """
    rows: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        rows.setdefault((trial.preset.name, trial.lag), []).append(trial)
    return [
        judge(
            planned[0].preset,
            lag,
            {trial.seed: outcomes.get((name, lag, trial.seed)) for trial in planned},
            steps_limit,
        )
        for (name, lag), planned in rows.items()
        if whole or any((name, lag, trial.seed) in outcomes for trial in planned)
    ]


def judge(
    preset: Preset, lag: int, outcomes: dict[int, Outcome | None], steps_limit: int | None = None
) -> dict[str, Any]:
    """A row of the result: ours beside what was published.

    ``mean`` and ``std`` (of the sample; 0 for a single seed) are over the seeds that finished. It passes if all did, at
    the published number of steps, with a mean of at least ``required``; ``margin`` is the mean's distance from that.

    Args:
        preset: what was published.
        lag: the policy lag of these runs.
        outcomes: by seed; None is not finished.
        steps_limit: what runs were shortened to, if they were.
    """
    ended = {seed: outcome or Outcome(None, cause=UNFINISHED) for seed, outcome in outcomes.items()}
    scores = [outcome.score for outcome in ended.values() if outcome.score is not None]
    mean = statistics.fmean(scores) if scores else None
    total_steps = budget(preset, steps_limit)
    shortened = total_steps < preset.total_steps
    complete = bool(ended) and len(scores) == len(ended)
    return {
        "preset": preset.name,
        "env": preset.env,
        "lag": lag,
        "seeds": list(ended),
        "mean": mean,
        "std": (statistics.stdev(scores) if len(scores) > 1 else 0.0) if scores else None,
        "published": preset.published,
        "published_std": preset.published_std,
        "required": preset.required,
        "margin": None if mean is None else mean - preset.required,
        "passed": complete and not shortened and mean is not None and mean >= preset.required,
        "scores": [outcome.score for outcome in ended.values()],
        "steps": [outcome.steps for outcome in ended.values()],
        "seconds": [outcome.seconds for outcome in ended.values()],
        "total_steps": total_steps,
        "shortened": shortened,
        "kind": preset.kind,
        "source": preset.source,
        "note": preset.note,
        "failures": [{"seed": seed, "cause": out.cause} for seed, out in ended.items() if out.score is None],
    }


def machine() -> dict[str, Any]:
    """What the runs ran on, as the results of benchmarks say it."""
    versions = {name: found for name in VERSIONS if (found := installed_version(name))}
    return {
        "cores": available_cores(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "perceptrons": perceptron.PROBLEM or "compiled",
        **versions,
    }


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
