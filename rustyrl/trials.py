"""The runs that presets ask for: each a process of its own, several at once, and what became of them."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rustyrl.config import Config, build_config, config_to_toml
from rustyrl.errors import UsageError
from rustyrl.interrupts import Interrupts
from rustyrl.presets import Preset
from rustyrl.processes import Child, await_end, start_child
from rustyrl.run_folder import write_atomic

__all__ = ["Outcome", "Outcomes", "Trial", "budget", "plan", "read_score", "run_trials", "trial_config"]

TURN_S = 0.1
STOP_GRACE_S = 10.0  # a run takes up to cluster.stop_s, 5 s, to end


@dataclass(frozen=True, slots=True)
class Trial:
    """One run that a preset asks for."""

    preset: Preset
    lag: int
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder, log and configuration."""
        return f"{self.preset.name}-lag{self.lag}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trial: its score after so many env steps and seconds, or why it has none."""

    score: float | None
    steps: int = 0
    seconds: float = 0.0
    cause: str = ""


Outcomes = dict[tuple[str, int, int], Outcome]  # by preset, lag, seed


@dataclass(slots=True)
class _Running:
    trial: Trial
    child: Child


def plan(presets: Sequence[Preset], lags: Sequence[int], seeds: Sequence[int]) -> list[Trial]:
    """Every run, those of one row of the result one after another."""
    return [Trial(preset, lag, seed) for preset in presets for lag in lags for seed in seeds]


def trial_config(trial: Trial, total_steps: int) -> Config:
    """The whole configuration of a trial; what its world recommends has no part in it."""
    run = {"env": trial.preset.env, "seed": trial.seed, "total_steps": total_steps}
    return build_config(trial.preset.layer, {"run": run, "batch": {"max_policy_lag": trial.lag}})


def budget(preset: Preset, steps_limit: int | None) -> int:
    """The env steps of a run of a preset."""
    return preset.total_steps if steps_limit is None else min(preset.total_steps, steps_limit)


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    jobs: int = 1,
    steps_limit: int | None = None,
    on_outcome: Callable[[Trial, Outcome], None] = lambda _trial, _outcome: None,
) -> tuple[Outcomes, str]:
    """Run trials, ``jobs`` at once; one that fails is an outcome, and the others go on.

    Args:
        trials: in the order in which they are started.
        folder: new; gets a run folder, a log and a configuration each.
        jobs: how many may run at the same time.
        steps_limit: shortens runs to so many env steps, which makes their scores incomparable.
        on_outcome: told of each that ends.

    Returns:
        The outcomes, and ``interrupt`` or ``terminate`` if a signal cut them short, else ``""``.

    Raises:
        UsageError: the folder cannot be made, or holds something.
    """
    _make_folder(folder)
    outcomes: Outcomes = {}
    waiting, running = deque(trials), list[_Running]()

    def note(trial: Trial, outcome: Outcome) -> None:
        outcomes[trial.preset.name, trial.lag, trial.seed] = outcome
        on_outcome(trial, outcome)

    with Interrupts() as interrupts:
        try:
            while (waiting or running) and not interrupts.count:
                while waiting and len(running) < jobs:
                    trial = waiting.popleft()
                    try:
                        running.append(_start(trial, folder, steps_limit))
                    except (OSError, UsageError) as error:
                        note(trial, Outcome(None, cause=f"could not be started: {error}"))
                for one in [one for one in running if not one.child.running]:
                    running.remove(one)
                    note(one.trial, _outcome(one, folder))
                time.sleep(TURN_S)
        finally:
            _stop(running, interrupts)
        return outcomes, interrupts.reason


def read_score(preset: Preset, run: Path) -> Outcome:
    """The score of a run folder, by what kind of figure was published.

    A training return is ``return_mean`` of the last row of ``metrics.jsonl``, over the newest 200 episodes; a greedy
    evaluation is what the run itself ended with, over 100 episodes.

    Raises:
        OSError, msgspec.DecodeError: the run left no results.
    """
    summary = msgspec.json.decode((run / "summary.json").read_bytes(), type=dict[str, Any])
    steps, seconds = summary["steps"], summary["seconds"]
    if summary["stopped_by"] != "total_steps":
        return Outcome(None, steps, seconds, f"stopped by {summary['stopped_by']}")
    if preset.kind == "greedy evaluation":  # of the final policy, on seeds of which training saw none
        figures = summary["eval"] or {}
    else:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
        figures = msgspec.json.decode(lines[-1], type=dict[str, Any]) if lines else {}
    if "return_mean" not in figures:
        return Outcome(None, steps, seconds, "no episode ended")
    return Outcome(float(figures["return_mean"]), steps, seconds)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; choose another --runs")
    except OSError as error:
        raise UsageError(f"cannot write to the folder of runs {folder}: {error.strerror}") from None


def _start(trial: Trial, folder: Path, steps_limit: int | None) -> _Running:
    config = folder / f"{trial.name}.toml"
    write_atomic(config, config_to_toml(trial_config(trial, budget(trial.preset, steps_limit))).encode())
    arguments = ["rustyrl.trial", "--config", str(config), "--run", str(folder / trial.name)]
    return _Running(trial, start_child(trial.name, arguments, folder / f"{trial.name}.log", actor=False, capture=True))


def _outcome(ended: _Running, folder: Path) -> Outcome:
    """The score of a run that has ended, or the cause that it has none."""
    child = ended.child
    said = child.process.stdout.read().decode(errors="replace") if child.process.stdout is not None else ""
    code, tail = child.process.returncode, child.tail()
    child.close()
    if code:
        return Outcome(None, cause=said or tail or f"its process ended with code {code}")
    try:
        return read_score(ended.trial.preset, folder / ended.trial.name)
    except (OSError, msgspec.DecodeError) as error:
        return Outcome(None, cause=f"its results cannot be read: {error}")


def _stop(running: list[_Running], interrupts: Interrupts) -> None:
    """Bring down what still runs: by an interrupt and its grace, at once if a second signal comes."""
    children = [one.child for one in running]
    for child in children:
        child.signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_GRACE_S
    while await_end(children, time.monotonic()) and time.monotonic() < deadline and interrupts.count < 2:
        time.sleep(TURN_S)
    for child in children:
        child.close()
