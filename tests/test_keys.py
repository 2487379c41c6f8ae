"""Keys: files that nobody else can read, names, and what is refused in words that hold no secret."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rustyrl.cli import app
from rustyrl.curve import Gate
from rustyrl.errors import UsageError
from rustyrl.keys import FIRST, LAUNCHED, MAX_KEYS, KeyRing, find_keys, parse_actor_key, read_actor_key
from rustyrl.run_folder import ClusterFile, RunFolder


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing.make(tmp_path / "keys")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_run_begins_with_a_key_for_its_actors_and_one_for_others(ring):
    assert mode(ring.folder) == 0o700
    names = {path.name for path in ring.folder.iterdir()}
    assert names == {"learner.key", *(f"{name}.{end}" for name in (FIRST, LAUNCHED) for end in ("key", "pub"))}
    assert {mode(path) for path in ring.folder.iterdir()} == {0o600}
    learner = ring.learner()
    for name in (FIRST, LAUNCHED):
        key = read_actor_key(ring.path(name))
        assert (key.name, key.learner) == (name, learner.public)
        assert ring.allowed()[key.public] == name
    assert "secret" not in repr(learner) + repr(read_actor_key(ring.path(FIRST)))
    again = KeyRing.make(ring.folder)  # a resumed run has the same
    assert again.learner() == learner
    assert again.allowed() == ring.allowed()


def test_a_run_that_revoked_its_first_key_gets_no_other_when_it_is_resumed(ring):
    ring.revoke(FIRST)
    assert set(KeyRing.make(ring.folder).allowed().values()) == {LAUNCHED}


def test_keys_are_made_listed_and_revoked(ring):
    public = read_actor_key(ring.add("lab-3")).public
    assert ring.allowed()[public] == "lab-3"
    ring.revoke("lab-3")
    assert public not in ring.allowed()
    assert not ring.path("lab-3").exists()
    listed = {key.name: key for key in ring.list()}
    assert listed["lab-3"].revoked >= listed["lab-3"].made
    for call, said in (
        (lambda: ring.add("lab-3"), "was and is revoked; choose another"),
        (lambda: ring.revoke("lab-3"), "is revoked already"),
        (lambda: ring.revoke("nobody"), f"no key 'nobody'; there are {FIRST}"),
        (lambda: ring.revoke(LAUNCHED), "start another run"),
        (lambda: find_keys(ring.folder), "has no keys"),
        *((lambda name=name: ring.add(name), "no name for a key") for name in ("", "../x", "learner", "a b", "x" * 65)),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_a_copied_back_file_does_not_undo_a_revocation(ring):
    kept = (ring.folder / f"{FIRST}.pub").read_bytes()
    ring.revoke(FIRST)
    path = ring.folder / f"{FIRST}.pub"
    path.write_bytes(kept)
    path.chmod(0o600)
    assert set(ring.allowed().values()) == {LAUNCHED}


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601])
def test_what_others_can_use_is_refused_with_what_to_do(ring, bits):
    path = ring.path(FIRST)
    path.chmod(bits)
    with pytest.raises(UsageError, match=f"others can use .*mode {bits:04o}.*chmod 600"):
        read_actor_key(path)
    public = ring.folder / f"{FIRST}.pub"
    public.chmod(bits)
    changeable = bool(bits & 0o022)
    assert set(ring.allowed().values()) == ({LAUNCHED} if changeable else {LAUNCHED, FIRST})
    assert ring.wrong() == ((f"others can change {public} (mode {bits:04o}): chmod 600 {public}",) * changeable)
    (ring.folder / "learner.key").chmod(bits)
    with pytest.raises(UsageError, match="chmod 600"):
        ring.learner()
    ring.folder.chmod(0o700 | bits & 0o077)
    with pytest.raises(UsageError, match="chmod 700"):
        KeyRing.make(ring.folder)


def test_what_belongs_to_somebody_else_is_refused(ring, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UsageError, match="this is user 12345: use a copy of your own"):
        read_actor_key(ring.path(FIRST))


def test_no_text_about_a_broken_key_holds_its_secret(ring):
    content = ring.path(FIRST).read_bytes()
    key = json.loads(content)
    broken = [content[:-20], content + content, b"\xff" * 10, b"[" * 4000, b"x" * 10_000]
    broken += [json.dumps({**key, field: value}).encode() for field in key for value in ("", 7, key["secret"] + "x")]
    broken += [json.dumps({**key, "more": 1}).encode(), json.dumps({**key, "public": key["learner"]}).encode()]
    beyond = "%" * 5 + key["secret"][5:]  # five letters of Z85 that are more than 32 bits
    broken += [json.dumps({**key, half: beyond}).encode() for half in ("learner", "public", "secret")]
    for bad in broken:
        with pytest.raises(UsageError, match="FILE") as caught:
            parse_actor_key(bad, "FILE")
        assert key["secret"] not in str(caught.value)
        assert caught.value.__cause__ is None
    assert parse_actor_key(content, "FILE").name == FIRST


@given(st.binary(max_size=300))
def test_any_bytes_are_a_key_or_refused(content):
    with pytest.raises(UsageError):
        parse_actor_key(content, "FILE")


def test_there_are_not_too_many_keys(ring, monkeypatch):
    monkeypatch.setattr("rustyrl.keys.MAX_KEYS", 2)
    assert MAX_KEYS > 100
    with pytest.raises(UsageError, match="may share one"):
        ring.add("one-more")


def test_a_key_is_written_whole_or_not_at_all(ring, monkeypatch):
    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match=r"cannot write the key .*No space left"):
        ring.add("late")
    assert not ring.path("late").exists()
    assert not any("late" in path.name for path in ring.folder.iterdir())


def test_a_public_half_that_anybody_can_read_is_let_in(ring):
    (ring.folder / f"{FIRST}.pub").chmod(0o644)  # as it comes back from a backup
    assert set(ring.allowed().values()) == {LAUNCHED, FIRST}
    assert ring.wrong() == ()


@pytest.mark.parametrize("end", ["pub", "key"])
def test_a_run_whose_own_key_is_half_there_gets_a_whole_one(ring, end):
    (ring.folder / f"{LAUNCHED}.{end}").unlink()
    again = KeyRing.make(ring.folder)
    assert again.allowed()[read_actor_key(again.path(LAUNCHED)).public] == LAUNCHED
    assert set(again.allowed().values()) == {LAUNCHED, FIRST}


def test_a_disk_that_is_full_between_the_two_halves_leaves_neither(ring, monkeypatch):
    real, written = os.fsync, []

    def fail_second(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(UsageError, match="No space left"):
        ring.add("late")
    assert not any("late" in path.name for path in ring.folder.iterdir())
    assert read_actor_key(ring.add("late")).name == "late"


@contextlib.contextmanager
def descriptors_taken() -> Iterator[None]:
    """All descriptors that this process may have are taken."""
    import resource  # not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 50, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def gate(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """One that reads the keys whenever it is asked to."""
    monkeypatch.setattr("rustyrl.curve.LOOK_S", 0.0)
    monkeypatch.setattr("rustyrl.curve.READ_S", -1.0)
    with zmq.Context() as context:
        opened = Gate(context, ring.folder, ring.allowed)
        yield opened
        opened.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors")
def test_without_descriptors_the_keys_stay_what_they_were(ring, gate, caplog):
    public = read_actor_key(ring.path(FIRST)).public
    with descriptors_taken():
        for _ in range(3):
            gate.refresh()
        assert gate.name(public) == FIRST
        with pytest.raises(UsageError, match="Too many open files"):
            ring.allowed()
    assert len([record for record in caplog.records if "stay what they were" in record.message]) == 1
    ring.revoke(FIRST)
    gate.refresh()
    assert gate.name(public) is None


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_key_that_cannot_be_read_for_now_is_not_taken_for_revoked(ring, gate, monkeypatch, code):
    real = Path.open

    def fail_one(path: Path, *arguments: str):
        if path.name == f"{FIRST}.pub":
            raise OSError(code, os.strerror(code))
        return real(path, *arguments)

    public = read_actor_key(ring.path(FIRST)).public
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail_one)
        gate.refresh()
        assert gate.name(public) == FIRST
    ring.revoke(FIRST)
    gate.refresh()
    assert gate.name(public) is None


# The verbs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, RunFolder]]:
    """Two runs with keys; the one that started last is over."""
    monkeypatch.chdir(tmp_path)
    folders = {}
    for started, name in enumerate(("live", "over")):
        folders[name] = folder = RunFolder(Path("runs") / name, resume=False)
        KeyRing.make(folder.path / "keys")
        folder.write_cluster(ClusterFile("e", "running", os.getpid(), "", "", 0, float(started)))
    folders["over"].close()
    yield folders
    folders["live"].close()


def said(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["keys", *arguments])
    return done.exit_code, " ".join((done.output if done.exception is None else str(done.exception)).split())


def names_of(folder: RunFolder) -> set[str]:
    return set(KeyRing(folder.path / "keys").allowed().values())


def test_keys_are_those_of_the_run_that_is_going_on_and_it_is_named(runs):
    code, output = said("revoke", FIRST)
    assert code == 0
    assert output.startswith("revoked default of the run runs/live: actors that joined with it are cut off")
    assert names_of(runs["live"]) == {LAUNCHED}
    assert names_of(runs["over"]) == {LAUNCHED, FIRST}
    assert "for the run runs/live:" in said("new", "lab-3")[1]
    assert "keys of the run runs/live " in said("list")[1]
    assert json.loads(said("list", "--json")[1])["run"] == "runs/live"


def test_of_a_run_that_is_over_nobody_is_said_to_be_cut_off(runs):
    output = said("revoke", FIRST, "--run", "runs/over")[1]
    assert output == "revoked default of the run runs/over, which is over: nobody joins with it any more"


def test_of_several_runs_with_keys_one_must_be_named(runs):
    with RunFolder(Path("runs/other"), resume=False) as other:
        KeyRing.make(other.path / "keys")
        other.write_cluster(ClusterFile("e", "running", os.getpid(), "", "", 0, 3.0))
        for arguments in (["revoke", FIRST], ["new", "lab-3"], ["list"]):
            code, output = said(*arguments)
            assert code != 0
            assert "2 runs have keys: name one with --run, of runs/other, runs/live" in output
        assert names_of(other) == names_of(runs["live"]) == {LAUNCHED, FIRST}


def test_a_file_that_is_no_key_is_said_in_the_list(runs):
    (runs["live"].path / "keys" / f"{FIRST}.pub").write_bytes(b"{}")
    assert "! not let in: runs/live/keys/default.pub is not such a file" in said("list")[1]
