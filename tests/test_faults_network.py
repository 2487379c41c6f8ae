"""Actors behind a real network boundary: training goes on, losses are counted, and who was away comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from boundary import HERE, Boundary, boundary
from clusters import ENDLESS, Cluster, await_more, await_status, end, poll, verb
from proxies import delaying_proxy

pytestmark = pytest.mark.faults

LINK = f"tcp://{HERE}:5555"
FAKETIME = next(map(str, Path("/usr").glob("lib*/**/libfaketimeMT.so*")), "")
BACK_S = 2.0  # promised: from the return of the link to the first rollout over it. Printed, not asserted
FIRST_BY_HAND = 1000


@pytest.fixture
def wire() -> Iterator[Boundary]:
    with boundary() as made:
        yield made


@contextmanager
def actor(cluster: Cluster, link: str, *options: str, prefix: Sequence[str] = (), **variables: str) -> Iterator[None]:
    """Meanwhile an actor has joined by hand, and works."""
    command = [
        *prefix,
        sys.executable,
        "-c",
        "from rustyrl.main import main; main()",
        "actor",
        "--join",
        link,
        *options,
    ]
    with (cluster.run / "there.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **variables})
    try:
        await_status(cluster, works, "the actor there to work")
        yield
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def cluster(start: Callable[..., Cluster], wire: Boundary) -> Iterator[Cluster]:
    """A learner with an actor on each side of the boundary."""
    running = start(*ENDLESS, "--listen", LINK, "--actors", "1", prefix=wire.here)
    await_status(running, lambda status: status["learner"].get("version", 0) > 2, "training")
    with actor(running, LINK, "--key", str(running.run / "keys" / "default.key"), prefix=wire.there):
        yield running


def there(status: dict[str, Any]) -> dict[str, Any] | None:
    """The actor behind the boundary, if the learner knows it."""
    found = [actor for actor in status["actors"] if actor["index"] >= FIRST_BY_HAND]
    return found[0] if found else None


def works(status: dict[str, Any]) -> bool:
    """Whether it has worlds and answers tickets."""
    actor = there(status)
    return actor is not None and actor["worlds"] > 0 and actor["rollouts"] > 0


def version(cluster: Cluster) -> int:
    return int(verb(cluster, "status")["learner"]["version"])


def await_return(cluster: Cluster) -> float:
    """Wait until the actor there answers tickets that were issued after now; how long that took."""
    since = time.monotonic()
    before = there(verb(cluster, "status"))
    count = before["rollouts"] if before else 0

    def back(status: dict[str, Any]) -> bool:
        actor = there(status)
        if actor is None or not works(status):
            return False
        return actor["rollouts"] > count if before and actor["rollouts"] >= count else True

    await_status(cluster, back, "the actor there to be back")
    return time.monotonic() - since


def finish(cluster: Cluster) -> dict[str, Any]:
    """End it: nothing was trained on at a larger lag than allowed, and every ticket is accounted for."""
    assert {int(lag) for row in cluster.rows() for lag in row["lag_steps"]} <= {0, 1}
    summary, _ = end(cluster)
    return summary


@pytest.mark.parametrize("seconds", [5.0, 30.0])
def test_training_goes_on_while_the_network_is_cut_and_the_actor_comes_back(
    cluster: Cluster, wire: Boundary, seconds: float
) -> None:
    lost = verb(cluster, "status")["tickets"]["lost"]
    with wire.cut():
        cut_at, before = time.monotonic(), version(cluster)
        await_status(cluster, lambda status: status["learner"]["version"] > before + 3, "training to go on", 20.0)
        held = time.monotonic() - cut_at
        time.sleep(max(0.0, seconds - held))
        during = version(cluster)
    back = await_return(cluster)
    print(f"cut for {seconds:.0f} s: training was held {held:.1f} s, {during - before} versions, back in {back:.2f} s")
    assert verb(cluster, "status")["tickets"]["lost"] > lost  # and counted
    await_more(cluster, 3)
    finish(cluster)


def test_a_fifth_of_all_packets_may_be_lost(cluster: Cluster, wire: Boundary) -> None:
    with wire.losing(0.2):
        before, since = version(cluster), time.monotonic()
        time.sleep(20.0)
        await_more(cluster, 5)
        during = (version(cluster) - before) / (time.monotonic() - since)
    back = await_return(cluster)
    print(f"20 % loss: {during:.1f} versions a second, back in {back:.2f} s")
    await_more(cluster, 5)
    finish(cluster)


def test_a_link_of_10_mbit_is_enough(cluster: Cluster, wire: Boundary) -> None:
    with wire.narrow("10mbit"):
        before = there(verb(cluster, "status"))
        assert before is not None
        await_more(cluster, 30)
        during = there(verb(cluster, "status"))
        assert during is not None
        assert during["rollouts"] > before["rollouts"]
    finish(cluster)


def test_connections_that_are_reset_are_made_again(cluster: Cluster, wire: Boundary) -> None:
    returned = []
    for _ in range(5):
        with wire.resetting():
            time.sleep(1.0)
        returned.append(await_return(cluster))
        await_more(cluster, 3)
    print("resets: back in", ", ".join(f"{seconds:.2f} s" for seconds in returned))
    finish(cluster)


def test_a_network_that_flaps_does_not_end_the_run(cluster: Cluster, wire: Boundary) -> None:
    for _ in range(6):
        with wire.cut():
            time.sleep(1.5)
        time.sleep(1.0)
    print(f"flapping: back in {await_return(cluster):.2f} s")
    await_more(cluster, 5)
    poll(lambda: works(verb(cluster, "status")), "it works")
    finish(cluster)


def test_delay_and_jitter_slow_training_down_and_harm_nothing(start: Callable[..., Cluster]) -> None:
    running = start(*ENDLESS, "--listen", "tcp://127.0.0.1:0", "--actors", "1")
    status = await_status(running, lambda status: status["learner"].get("version", 0) > 2, "training")
    port = int(status["link"]["address"].rpartition(":")[2])
    with delaying_proxy(("127.0.0.1", port), most_s=0.2) as proxy, actor(running, f"tcp://127.0.0.1:{proxy}"):
        lost = verb(running, "status")["tickets"]["lost"]
        await_more(running, 10)
        assert verb(running, "status")["tickets"]["lost"] == lost
    finish(running)


@pytest.mark.skipif(not FAKETIME, reason="libfaketime is not installed")
@pytest.mark.parametrize("offset", ["-5h", "+5h"])
def test_clocks_that_are_hours_apart_do_not_matter(start: Callable[..., Cluster], wire: Boundary, offset: str) -> None:
    running = start(*ENDLESS, "--listen", LINK, "--actors", "1", prefix=wire.here)
    await_status(running, lambda status: status["learner"].get("version", 0) > 2, "training")
    wrong = {"LD_PRELOAD": FAKETIME, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with actor(running, LINK, "--key", str(running.run / "keys" / "default.key"), prefix=wire.there, **wrong):
        lost = verb(running, "status")["tickets"]["lost"]
        with wire.cut():
            time.sleep(2.0)
        await_return(running)
        await_more(running, 10)
        assert verb(running, "status")["tickets"]["lost"] <= lost + 2
    finish(running)
