"""The keys of a run: files that only their owner can read, one for each name that may join from another machine.

``RUN/keys/`` holds the learner's pair (``learner.key``), for each actor key what its holder needs (``NAME.key``, to be
copied to where the actor runs) and what the learner lets in (``NAME.pub``); ``NAME.revoked`` was let in once.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from rustyrl.curve import make_pair, public_of
from rustyrl.errors import UsageError

__all__ = [
    "FIRST",
    "LAUNCHED",
    "MAX_KEY_BYTES",
    "ActorKey",
    "KeyRing",
    "Listed",
    "find_keys",
    "parse_actor_key",
    "read_actor_key",
]

FIRST = "default"  # what the first key for other machines is called
LAUNCHED = "launched"  # the key of the actors that the run starts itself
MAX_KEY_BYTES = 4096
MAX_KEYS = 1000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)

Half = Annotated[str, Meta(pattern=r"\A[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#\-]{40}\Z")]  # of a pair, as Z85
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")]

T = TypeVar("T")


class _Secret(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What no message, log or traceback may show."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


class LearnerKey(_Secret, frozen=True, forbid_unknown_fields=True):
    """``learner.key``: what actors know the learner by."""

    kind: Literal["rustyrl learner key: secret"]
    public: Half
    secret: Half


class ActorKey(_Secret, frozen=True, forbid_unknown_fields=True):
    """``NAME.key``: with it anybody joins as NAME. ``learner`` is the public half of the learner's pair."""

    kind: Literal["rustyrl actor key: secret"]
    name: Name
    learner: Half
    public: Half
    secret: Half


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``NAME.pub`` or ``NAME.revoked``: a key that the learner knows, without its secret; times in s since 1970."""

    name: Name
    public: Half
    made: float
    revoked: float | None = None


class KeyRing:
    """The keys of one run."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of keys, which must be its owner's alone; raises `UsageError`."""
        self.folder = folder
        try:
            status = folder.stat()
        except OSError as error:
            raise UsageError(f"cannot look into {folder}: {error.strerror}") from None
        _check_private(status, folder, "700")

    @classmethod
    def make(cls, folder: Path) -> KeyRing:
        """Open a folder of keys; what a run needs and it lacks is made."""
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        ring = cls(folder)
        if not (folder / "learner.key").exists():
            public, secret = make_pair()
            _write_new(folder / "learner.key", LearnerKey("rustyrl learner key: secret", public, secret))
        if not ring._has_launched():
            ring._write_pair(LAUNCHED)
        if not any((folder / f"{FIRST}.{end}").exists() for end in ("key", "pub", "revoked")):
            ring.add(FIRST)
        return ring

    def path(self, name: str) -> Path:
        """Where the file to hand on is."""
        return self.folder / f"{name}.key"

    def learner(self) -> LearnerKey:
        """The learner's own pair; raises `UsageError`."""
        path = self.folder / "learner.key"
        key = _decode(_read_private(path), LearnerKey, str(path))
        with contextlib.suppress(ValueError):
            if public_of(key.secret) == key.public:
                return key
        raise UsageError(f"{path} is damaged: its halves do not belong together; without it nobody can join")

    def add(self, name: str) -> Path:
        """Make a key of this name, which the learner lets in from now on; the file to hand on."""
        if not NAME.fullmatch(name) or name == "learner":
            raise UsageError(f"{name!r} is no name for a key; expected letters, digits, - and _, 64 at most")
        there = self.list()
        if any(listed.name == name for listed in there):
            raise UsageError(f"there is a key {name!r} already, or was and is revoked; choose another name")
        if len(there) >= MAX_KEYS:
            raise UsageError(f"there are {MAX_KEYS} keys already; actors may share one")
        return self._write_pair(name)

    def list(self) -> list[Listed]:
        """Every key by name, the revoked ones too; a file that is no such key is in no list, and lets nobody in.

        Raises:
            UsageError: nobody knows for now which keys there are: the folder or a file of it cannot be read.
        """
        return _look(self.folder)[0]

    def wrong(self) -> tuple[str, ...]:
        """What is wrong with the files that are in no list; raises `UsageError` as `list` does."""
        return tuple(_look(self.folder)[1])

    def allowed(self) -> dict[str, str]:
        """The names of the keys that the learner lets in, by their public halves."""
        listed = self.list()
        revoked = {key.public for key in listed if key.revoked is not None}
        return {key.public: key.name for key in listed if key.public not in revoked}

    def revoke(self, name: str) -> None:
        """Let a key in no more; the learner cuts off whoever uses it."""
        if name == LAUNCHED:
            raise UsageError(
                f"{name!r} is the key of the actors that the run starts itself, and is never revoked; "
                "if it was stolen, start another run, with --init to take the policy along"
            )
        keys = {listed.name: listed for listed in self.list()}
        listed = keys.get(name)
        if listed is None:
            valid = ", ".join(key.name for key in keys.values() if key.revoked is None and key.name != LAUNCHED)
            raise UsageError(f"there is no key {name!r}; there are {valid or 'none'}")
        if listed.revoked is not None:
            raise UsageError(f"the key {name!r} is revoked already")
        _write_new(self.folder / f"{name}.revoked", msgspec.structs.replace(listed, revoked=time.time()))
        for path in (self.folder / f"{name}.pub", self.path(name)):
            path.unlink(missing_ok=True)

    def _write_pair(self, name: str) -> Path:
        """Make a pair and write both files; the file to hand on, which is there only if the learner lets it in."""
        learner = self.learner().public
        public, secret = make_pair()
        listed = self.folder / f"{name}.pub"
        _write_new(listed, Listed(name, public, time.time()))
        try:
            _write_new(self.path(name), ActorKey("rustyrl actor key: secret", name, learner, public, secret))
        except BaseException:
            listed.unlink(missing_ok=True)
            raise
        return self.path(name)

    def _has_launched(self) -> bool:
        """Whether there are both halves of the key of the run's own actors: one that was interrupted has one."""
        try:
            key = read_actor_key(self.path(LAUNCHED))
        except UsageError:
            return False
        return self.allowed().get(key.public) == LAUNCHED and key.learner == self.learner().public


def find_keys(run: Path) -> KeyRing:
    """The keys of a run; raises `UsageError` if it has none."""
    folder = run / "keys"
    if not folder.exists():
        raise UsageError(f"{run} has no keys, as it listens to this machine alone; see --listen tcp://0.0.0.0:PORT")
    return KeyRing(folder)


def read_actor_key(path: Path) -> ActorKey:
    """Read the file that an actor joins with.

    Raises:
        UsageError: it cannot be read, others can read it, or it is no such key.
    """
    return parse_actor_key(_read_private(path), str(path))


def parse_actor_key(content: bytes, source: str) -> ActorKey:
    """What an actor joins with, from the bytes that ``source`` gave; raises `UsageError`."""
    key = _decode(content, ActorKey, source)
    try:
        public_of(key.learner)  # any half would do: it only has to be one
        whole = public_of(key.secret) == key.public
    except ValueError:
        whole = False
    if not whole:
        raise UsageError(f"{source} is damaged: its halves do not belong together; copy it again")
    return key


def _decode(content: bytes, kind: type[T], source: str) -> T:
    try:
        if len(content) > MAX_KEY_BYTES:
            raise ValueError("it is too long")
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError):  # whose texts may quote what is secret
        name = "a key that `rustyrl keys new` made" if kind is ActorKey else "such a file"
        raise UsageError(f"{source} is not {name}; expected NAME.key of a run's keys/, whole") from None


def _look(folder: Path) -> tuple[list[Listed], list[str]]:
    """The keys by name, and what is wrong with the files that are none."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - Path.glob hides that a folder could not be read
    except OSError as error:
        raise UsageError(f"cannot look into {folder}: {error.strerror}") from None
    found: list[Listed] = []
    wrong: list[str] = []
    for path in sorted(folder / name for name in names if name.endswith((".pub", ".revoked"))):
        try:
            found.append(_read_listed(path))
        except FileNotFoundError:  # revoked meanwhile
            continue
        except (PermissionError, IsADirectoryError) as error:
            wrong.append(f"cannot read the key {path}: {error.strerror}")
        except OSError as error:  # too many open files, a disk or network that fails: it says nothing of the key
            raise UsageError(f"cannot read the key {path}: {error.strerror}") from None
        except UsageError as error:
            wrong.append(str(error))
    return found, wrong


def _read_listed(path: Path) -> Listed:
    """Read ``NAME.pub`` or ``NAME.revoked``, which are no secret; raises `OSError` and `UsageError`."""
    with path.open("rb") as file:
        _check_owner(os.fstat(file.fileno()), path)
        listed = _decode(file.read(MAX_KEY_BYTES + 1), Listed, str(path))
    if path.stem != listed.name or (path.suffix == ".pub") is not (listed.revoked is None):
        raise UsageError(f"{path} says that it is the key {listed.name!r}: its name was changed")
    return listed


def _write_new(path: Path, content: msgspec.Struct) -> None:
    """Write a file that only we can read from its first byte on, whole or not at all; raises `UsageError`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(content) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UsageError(f"cannot write the key {path}: {error.strerror}") from None


def _read_private(path: Path) -> bytes:
    """The content of a file that nobody else can read."""
    try:
        with path.open("rb") as file:
            _check_private(os.fstat(file.fileno()), path, "600")
            return file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror}") from None


def _check_private(status: os.stat_result, path: Path, mode: str) -> None:
    """Refuse what others than its owner can use, or somebody else owns; raises `UsageError`."""
    found = stat.S_IMODE(status.st_mode)
    if found & 0o077 and sys.platform != "win32":  # which has no such modes
        raise UsageError(f"others can use {path} (mode {found:04o}), so it is no secret: chmod {mode} {path}")
    _check_owner(status, path)


def _check_owner(status: os.stat_result, path: Path) -> None:
    """Refuse what others than its owner can change, or somebody else owns; raises `UsageError`."""
    if sys.platform == "win32":
        return
    found = stat.S_IMODE(status.st_mode)
    if found & 0o022:
        raise UsageError(f"others can change {path} (mode {found:04o}): chmod 600 {path}")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to user {status.st_uid}, this is user {os.geteuid()}: use a copy of your own")
