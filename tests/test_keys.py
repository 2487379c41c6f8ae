"""Keys: files that nobody else can read, names, and what is refused in words that hold no secret."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustyrl.errors import UsageError
from rustyrl.keys import FIRST, LAUNCHED, MAX_KEYS, KeyRing, find_keys, parse_actor_key, read_actor_key


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
        (lambda: ring.revoke(LAUNCHED), "scale 0"),
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
    (ring.folder / f"{FIRST}.pub").chmod(bits)
    assert set(ring.allowed().values()) == {LAUNCHED}
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
