"""Train from a script or from the command line: the same way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rustyrl.addresses import listen_address
from rustyrl.condition import parse_condition
from rustyrl.config import Config, PPOConfig
from rustyrl.describe import describe
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.figures import known_figures
from rustyrl.interrupts import Interrupts
from rustyrl.launcher import Launcher
from rustyrl.processes import spare_learner
from rustyrl.profiler import find_py_spy
from rustyrl.progress import Progress, make_progress
from rustyrl.resume import check_resume
from rustyrl.rollout import array_bytes, rollout_arrays
from rustyrl.run_folder import RunFolder, new_run_path
from rustyrl.spare import Spare
from rustyrl.spec import EnvironmentSpec
from rustyrl.weights import check_squashable
from rustyrl.wire import MAX_BLOB_BYTES

__all__ = ["launch", "train"]


def train(
    config: Config, run: Path | str | None = None, *, resume: bool = False, profile: bool = False
) -> dict[str, Any]:
    """Train as ``rustyrl train`` does and return the summary that it would write.

    Args:
        config: every setting; ``rustyrl.configure`` makes one from what a world recommends and your changes.
        run: the run folder; None makes a new one below ``runs/``.
        resume: go on from the newest checkpoint in ``run``.
        profile: write profiles of every process into ``profile/`` of the run folder.

    Raises:
        UsageError: something asked for cannot be had.
        RunFailedError: the run started and ended badly, with the cause.
    """
    with spare_learner() as spare:
        spec, progress = describe(config.run.env, config.env), make_progress(to_stderr=True)
        return launch(config, spec, run, resume=resume, progress=progress, profile=profile, spare=spare)


def launch(
    config: Config,
    spec: EnvironmentSpec,
    run: Path | str | None,
    *,
    resume: bool,
    progress: Progress,
    profile: bool = False,
    spare: Spare | None = None,
) -> dict[str, Any]:
    """Check what can be checked before anything is started, then run; see `train`.

    Args:
        config: as of `train`.
        spec: of its world.
        run: as of `train`.
        resume: as of `train`.
        progress: shows how it goes.
        profile: as of `train`.
        spare: of `spare_learner`.
    """
    _check(config, spec, resume)
    changes = check_resume(Path(run), config, spec) if resume and run is not None else []
    if profile:
        find_py_spy()
    with (
        Interrupts() as interrupts,
        RunFolder(Path(run) if run else new_run_path(config.run.env), resume=resume) as folder,
    ):
        try:
            _write_inputs(folder, config, spec)
            with progress:
                for change in changes:
                    progress.say(change)
                launcher = Launcher(
                    config, spec, folder, progress, interrupts, resume=resume, profile=profile, spare=spare
                )
                return launcher.run()
        except UsageError:  # nothing was trained: leave no folder that the next try would stumble over
            folder.discard()
            raise
        except RunFailedError as error:
            raise RunFailedError(f"{error}\nlogs are in {folder.path / 'logs'}") from None


def _write_inputs(folder: RunFolder, config: Config, spec: EnvironmentSpec) -> None:
    try:
        folder.write_inputs(config, spec)
    except OSError as error:
        raise UsageError(f"cannot write to the run folder {folder.path}: {error.strerror}") from None


def _check(config: Config, spec: EnvironmentSpec, resume: bool) -> None:
    """Refuse what is known to fail before any process or folder is made."""
    missing = [name for name in ("torch", "tensorboard") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {' and '.join(missing)}: pip install 'rustyrl[learner]'")
    known = known_figures(spec)
    conditions = {"--stop-at": config.run.stop_at, "its goal": spec.goal, "its evaluate_from": spec.evaluate_from}
    for source, texts in conditions.items():
        for condition in map(parse_condition, texts):
            if condition.metric not in known:
                raise UsageError(f"{source} {condition}: {spec.env!r} has no such figure; it has {', '.join(known)}")
    _check_ppo(config.ppo, config.run.total_steps)
    _check_box(config, spec)
    slots = spec.slots * config.batch.worlds
    size = sum(array_bytes(array) for array in rollout_arrays(spec, config.batch.unroll_length, slots))
    if size > MAX_BLOB_BYTES // 2:  # one actor may come to own every world; the other half is for ended episodes
        raise UsageError(
            f"a batch of {slots} slots x {config.batch.unroll_length} steps takes {size >> 20} MiB, at most "
            f"{MAX_BLOB_BYTES >> 21} MiB fit into a message; lower batch.unroll_length, batch.worlds or env.slots"
        )
    if config.cluster.listen != "ipc":
        listen_address(config.cluster.listen)
    if config.cluster.prometheus:
        _check_exporter(config.cluster.prometheus)
    if config.run.init and not resume and not Path(config.run.init).is_file():
        raise UsageError(f"--init: there is no file {config.run.init}")


def _check_exporter(address: str) -> None:
    if importlib.util.find_spec("prometheus_client") is None:
        raise UsageError("cluster.prometheus needs prometheus-client: pip install 'rustyrl[prometheus]'")
    from rustyrl.exporter import parse_address  # needs that package

    parse_address(address)


def _check_ppo(ppo: PPOConfig, total_steps: int) -> None:
    """Refuse settings that do not go together."""
    ends = {name: getattr(ppo, name) for name in ("clip_end", "entropy_end", "gamma_end")}
    for name, end in ends.items():
        if -1 < end < 0:
            raise UsageError(f"ppo.{name} is {end}, expected -1 (no change) or a number from 0 up")
    changing = ["schedule 'linear'"] if ppo.schedule == "linear" else []
    changing += [name for name, end in ends.items() if end >= 0]
    if changing and not total_steps:
        raise UsageError(f"ppo.{changing[0]} needs run.total_steps to know where it ends")
    if ppo.weight_decay and ppo.optimizer != "adamw":
        raise UsageError(f"ppo.weight_decay is for ppo.optimizer 'adamw', this is {ppo.optimizer!r}")


def _check_box(config: Config, spec: EnvironmentSpec) -> None:
    for part in spec.action if config.policy.box == "squashed" else ():
        try:
            check_squashable(part)
        except ValueError as error:
            raise UsageError(str(error)) from None
