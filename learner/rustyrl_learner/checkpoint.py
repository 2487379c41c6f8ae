"""Checkpoints: written whole or not at all, believed only if every byte is as it was written.

A checkpoint is a folder named by its policy version. ``policy.safetensors`` is the policy as actors and games
read it; ``learner.safetensors`` holds the networks, the optimiser's moments, the normaliser, the state of the
shuffles and the newest training episodes; ``worlds.safetensors``, if there is one, holds worlds as they stood before
the next batch; ``manifest.json`` names the checksums of these and the counters; ``manifest.sha256`` is its own. The
folder is written under another name, synced and renamed. docs/resume.md has the formats.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rustyrl.errors import RunFailedError
from rustyrl.installed import installed_version
from rustyrl.resume import BEHIND_S
from rustyrl_learner.gathering import KeptWorld
from rustyrl_learner.kept_worlds import pack_worlds, unpack_worlds

__all__ = [
    "EPISODES",
    "Counters",
    "Loaded",
    "Manifest",
    "WorldsNotPackedError",
    "list_checkpoints",
    "load_newest",
    "prune",
    "save",
    "whole_policy",
]

log = logging.getLogger(__name__)

DAMAGED = "damaged-"  # before the name of a checkpoint that was put aside
UNREADABLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}  # what is no damage
FORMAT = 2  # 1 had no worlds and no episodes
WORLDS = "worlds.safetensors"
EPISODES = "episodes."  # tensors of training episodes, which report NaN where a number means nothing


class WorldsNotPackedError(ValueError):
    """The worlds cannot be written, the rest of a checkpoint can."""


class Counters(msgspec.Struct, frozen=True):
    """How far training has come.

    lag_steps: env steps trained on, by policy lag
    candidates: versions whose evaluation had not ended
    """

    policy_version: int = 0
    steps: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    lag_steps: dict[int, int] = {}
    candidates: tuple[int, ...] = ()


class Manifest(msgspec.Struct, frozen=True):
    """What makes a checkpoint believable.

    worlds: those that it holds, and the batch that their episodes began with
    rustyrl: the version that wrote it
    incomplete: it lacks worlds that go on in the run that wrote it, and others of that run do not
    """

    counters: Counters
    fingerprint: str
    learner_incarnation: int
    sha256: dict[str, str]
    format: int
    worlds: dict[int, int] = {}
    rustyrl: str = ""
    incomplete: bool = False

    @property
    def exact(self) -> bool:
        """Whether what goes on from it comes to the bits of the run that wrote it."""
        return bool(self.worlds) and not self.incomplete


class Loaded(NamedTuple):
    """A checkpoint that was as it was written: ``worlds`` are those that it holds, as messages for their owners."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    path: Path
    worlds: dict[int, KeptWorld]


class _Format(msgspec.Struct, frozen=True):
    """What is looked at first: the rest of a manifest of another format may be anything."""

    format: int
    rustyrl: str = ""


def save(
    folder: Path,
    counters: Counters,
    policy: bytes,
    tensors: dict[str, Tensor],
    fingerprint: str,
    incarnation: int,
    worlds: Mapping[int, KeptWorld] | None = None,
    *,
    incomplete: bool = False,
) -> Path:
    """Write one checkpoint into ``folder``; returns its path.

    A whole one of this version stays as it is, unless that is incomplete and this one is not.

    Raises:
        OSError: it could not be written.
        ValueError: a tensor holds numbers that are not finite, so that nothing could go on from it.
        WorldsNotPackedError: the worlds cannot be written, whatever the reason; nothing was.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.startswith(EPISODES) and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    target = folder / f"{counters.policy_version:09d}"
    if target.exists():
        try:
            there, _ = _read(target)
        except (OSError, ValueError):
            shutil.rmtree(target)  # damaged: training went back behind it and has come here again
        else:
            if incomplete or not there.incomplete:
                return target
    try:
        packed = pack_worlds(worlds) if worlds else b""
    except Exception as error:
        raise WorldsNotPackedError(f"{type(error).__name__}: {error}") from error
    files = {
        "policy.safetensors": policy,
        "learner.safetensors": save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}),
    }
    if worlds:
        files[WORLDS] = packed
    manifest = Manifest(
        counters=counters,
        fingerprint=fingerprint,
        learner_incarnation=incarnation,
        sha256={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        format=FORMAT,
        worlds={world: state.built for world, (state, _) in (worlds or {}).items()},
        rustyrl=installed_version("rustyrl"),
        incomplete=incomplete,
    )
    files["manifest.json"] = msgspec.json.encode(manifest)
    files["manifest.sha256"] = hashlib.sha256(files["manifest.json"]).hexdigest().encode()
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, data in files.items():
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(partial)
        if target.exists():  # an incomplete one: prune removes it under this name
            replaced = folder / f".{target.name}.replaced.partial"
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise
    _sync_folder(folder)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Every finished checkpoint, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir() and path.name.isdigit())


def load_newest(
    folder: Path, fingerprint: str, warn: Callable[[str], None] = log.warning, *, exact: bool = False
) -> Loaded | None:
    """The newest checkpoint whose bytes are as they were written; warns of each that is not, and puts it aside.

    Args:
        folder: of all of them.
        fingerprint: of the environment.
        warn: is told what is not whole or passed over.
        exact: pass over an incomplete one for an exact one that is at most `BEHIND_S` of training older.

    Raises:
        RunFailedError: there are checkpoints but none is whole, or they are of another environment or of a newer
            format, or the newest cannot be read for a reason that says nothing of it.
    """
    found, damaged = list_checkpoints(folder), []
    for path in reversed(found):
        try:
            manifest, data = _read(path)
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno in UNREADABLE:
                raise RunFailedError(f"checkpoint {path} cannot be read, which says nothing of it: {error}") from None
            warn(f"checkpoint {path} is not whole ({error}), trying the one before")
            damaged.append(path)
            continue
        if manifest.fingerprint != fingerprint:
            raise RunFailedError(
                f"checkpoint {path} is of environment {manifest.fingerprint}, this run's is {fingerprint}: resume "
                "with the same environment and parameters, or start from its policy with --init"
            )
        for other in damaged:  # or they would pass for the newest, and better ones be removed for them
            shutil.rmtree(folder / f"{DAMAGED}{other.name}", ignore_errors=True)
            with contextlib.suppress(OSError):
                other.rename(folder / f"{DAMAGED}{other.name}")
        if exact and manifest.incomplete and (better := _exact_before(path, manifest, found)):
            newest, (path, manifest, data) = manifest.counters, better
            again = newest.policy_version - manifest.counters.policy_version
            warn(
                f"the newest checkpoint, of version {newest.policy_version}, lacks worlds: going back to version "
                f"{manifest.counters.policy_version}, the newest exact one; {again} updates are done again, to the "
                "same bits"
            )
        kept = data.get(WORLDS)
        batch, built = manifest.counters.policy_version, manifest.worlds
        worlds = {} if kept is None else unpack_worlds(kept, batch, built)
        return Loaded(manifest, load_tensors(data["learner.safetensors"]), path, worlds)
    if found:
        raise RunFailedError(f"none of the {len(found)} checkpoints in {folder} is whole; see the log")
    return None


def whole_policy(folder: Path, version: int) -> Path | None:
    """The policy of the checkpoint of a version; None if there is none, or not as it was written."""
    path = folder / f"{version:09d}"
    try:
        _read(path)
    except (OSError, ValueError):
        return None
    return path / "policy.safetensors"


def prune(folder: Path, kept: int, protected: set[int], newest: int | None = None) -> None:
    """Remove all but the newest ``kept`` checkpoints and those of the ``protected`` policy versions.

    Args:
        folder: of all of them.
        kept: how many stay.
        protected: those of these policy versions do, too.
        newest: version that was written last: training went back behind those of later ones, and does them again.
    """
    found = list_checkpoints(folder)
    ahead = [path for path in found if newest is not None and int(path.name) > newest]
    for path in [*found[: len(found) - len(ahead)][:-kept], *ahead]:
        if int(path.name) not in protected:
            with contextlib.suppress(OSError):  # under a name that is none, so that half of one passes for none
                path.rename(folder / f".{path.name}.partial")
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _exact_before(incomplete: Path, its: Manifest, found: list[Path]) -> tuple[Path, Manifest, dict[str, bytes]] | None:
    """The newest exact checkpoint before an incomplete one, if that gives up little training."""
    for path in reversed(found[: found.index(incomplete)]):
        try:
            manifest, data = _read(path)
        except (OSError, ValueError, RecursionError):
            continue  # it is not needed, and stays where it is
        if manifest.fingerprint != its.fingerprint or its.counters.seconds - manifest.counters.seconds > BEHIND_S:
            return None
        if manifest.exact:
            return path, manifest, data
    return None


def _read(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and files of a checkpoint.

    Raises:
        OSError, ValueError: it is not as it was written.
        RunFailedError: it is of a newer format.
    """
    content = (path / "manifest.json").read_bytes()
    if hashlib.sha256(content).hexdigest().encode() != (path / "manifest.sha256").read_bytes():
        raise ValueError("manifest.json is damaged")
    written = msgspec.json.decode(content, type=_Format)
    if written.format > FORMAT:
        ours = installed_version("rustyrl")
        raise RunFailedError(
            f"checkpoint {path} has format {written.format}, this rustyrl ({ours or 'not installed'}) reads "
            f"formats up to {FORMAT}: go on with the one that wrote it, {written.rustyrl or 'a newer one'}, or start a "
            f"new run from its policy: --init {path / 'policy.safetensors'}"
        )
    manifest = msgspec.json.decode(content, type=Manifest)
    data = {name: (path / name).read_bytes() for name in manifest.sha256}
    broken = [name for name, digest in manifest.sha256.items() if hashlib.sha256(data[name]).hexdigest() != digest]
    if broken:
        raise ValueError(f"{', '.join(broken)} is damaged")
    return manifest, data


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
