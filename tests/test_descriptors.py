"""Descriptors: as many as may be had, and a warning before there are no more."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from rustyrl import descriptors
from rustyrl.descriptors import SCARCE, WANTED, DescriptorWatch

resource = pytest.importorskip("resource")


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """The limits of this process, which has them again after the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_as_far_as_it_may_be(limits):
    soft, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 20, hard))
    DescriptorWatch()
    raised, kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert kept == hard
    assert raised == (WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED))
    assert raised >= min(soft, WANTED)


def test_it_is_said_before_there_are_no_more_and_not_over_and_over(limits, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(descriptors.time, "monotonic", lambda: now[0])
    watch = DescriptorWatch()
    assert watch.look() == ""
    used = psutil.Process().num_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(used / SCARCE), limits[1]))
    assert watch.look() == ""  # it has looked a moment ago
    now[0] += 1.0
    assert f"of {int(used / SCARCE)} descriptors" in watch.look()
    now[0] += 1.0
    assert watch.look() == ""
    now[0] += 60.0
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # none is left, not even to look
    assert "3 of 3 descriptors" in watch.look()
