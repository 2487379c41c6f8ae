"""Every reader of foreign bytes, and what it can read changed in every way: it reads, or refuses in its own words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzzing import Findings, Target, mutate, targets
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ["message", "frames", "weights", "policy", "spec", "control", "key", "assignments", "config", "cluster", "best"]
NAMES += ["manifest"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_tried_here_and_reads_its_seeds(found):
    assert list(found) == NAMES
    for target in found.values():
        for seed in target.seeds:
            target.read(seed)
            if target.parts is not None:
                take_apart, join = target.parts
                target.read(join(take_apart(seed)))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**64))
def test_changed_bytes_are_read_or_refused_in_words(found, name, seed):
    findings = Findings()
    findings.try_one(found[name], mutate(random.Random(seed), found[name]))
    assert not findings.failures, findings.failures[0]


FOUND = [  # by `make fuzz`, before they were refused in words
    ("cluster", b'{"env": "\xff"}'),
    ("best", b'{"version": 1, "x\xff": 2}'),
    ("spec", b'{"env": "\xff"}'),
    ("spec", b'{"more": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
    ("config", b"[run]\nseed = " + b"[" * 3000 + b"]" * 3000),
    ("assignments", b"run.seed=" + b"[" * 3000 + b"]" * 3000),
]


@pytest.mark.parametrize(("name", "content"), FOUND, ids=[f"{name} {content[:12]!r}" for name, content in FOUND])
def test_what_was_found_once_stays_refused(found, name, content):
    findings = Findings()
    findings.try_one(found[name], content)
    assert not findings.failures, findings.failures[0]


def test_a_reader_that_raises_something_else_is_found(tmp_path: Path):
    """What this module relies on."""

    def broken(content: bytes) -> None:
        if content[:1] != b"{":
            raise KeyError("planted")

    target = Target([b'{"a": 1}'], broken, (ValueError,))
    findings, draw = Findings(), random.Random(1)
    for _ in range(100):
        findings.try_one(target, mutate(draw, target))
    assert any("planted" in failure for failure in findings.failures)
