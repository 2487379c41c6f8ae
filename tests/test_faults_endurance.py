"""Many actors at once, many changes, many minutes: nothing is lost, nothing is left over, nothing grows."""

from __future__ import annotations

import os
import time

import numpy as np
import psutil
import pytest
from clusters import COUNTING, ENDLESS, await_more, await_status, contributing, end, poll, verb

pytestmark = [pytest.mark.faults]

MINUTES = float(os.environ.get("FAULTS_MINUTES", "10"))  # at least 2
SETTLE_S = max(80.0, 0.25 * MINUTES * 60)  # for caches, buffers, the learning curve and allocators to fill
# A page a second is 350 MB in a day, which a run can afford; an allocator may take a MiB whenever it likes. In three
# minutes the learner showed 3.9 kB/s, the others at most 1 kB/s; a kilobyte kept of each rollout came to 57 kB/s.
AFFORDED, NOISE = 4096.0, float(1 << 20)  # bytes/s, bytes
SIXTEEN = ("train", COUNTING, "--total-steps", "1000000000", "--json", "--set", "batch.worlds=16",
           "--set", "env.slots=2", "--set", "batch.unroll_length=8")  # fmt: skip


def ready(status) -> int:
    return sum(actor["ready"] for actor in status["actors"])


@pytest.mark.timeout(900)
def test_64_actors_start_at_once_and_go_at_once(start):
    cluster = start(*ENDLESS, "--actors", "64", "--set", "cluster.start_deadline_s=300", "--set", "cluster.lease_s=300")
    status = await_status(cluster, lambda status: ready(status) == 64, "64 actors", 400.0)
    assert sum(actor["worlds"] for actor in status["actors"]) == 4
    await_more(cluster, 5)
    verb(cluster, "scale", "1")
    await_status(cluster, lambda status: status["actors_started"] == 1 and contributing(status) == {0: 4}, "one", 200.0)
    await_more(cluster, 3)
    status = verb(cluster, "status")
    assert (status["actor_restarts"], status["tickets"]["lost"]) == (0, 0)
    end(cluster)


@pytest.mark.timeout(1800)
def test_scaling_to_16_and_back_twenty_times_loses_nothing_and_leaves_nothing(start):
    cluster = start(*SIXTEEN, "--actors", "1", "--set", "cluster.lease_s=300")
    cluster.await_version(1)
    learner = verb(cluster, "status")["learner"]["pid"]
    descriptors = cluster.descriptors()
    learner_descriptors = psutil.Process(learner).num_fds()
    for _ in range(20):
        verb(cluster, "scale", "16")
        status = await_status(cluster, lambda status: sorted(contributing(status).values()) == [1] * 16, "16", 120.0)
        assert status["actors_started"] == 16
        verb(cluster, "scale", "1")
        await_status(cluster, lambda s: s["actors_started"] == 1 and list(contributing(s).values()) == [16], "1", 120.0)
    await_more(cluster, 3)
    poll(lambda: cluster.descriptors() <= descriptors, "the launcher's descriptors")
    poll(lambda: psutil.Process(learner).num_fds() <= learner_descriptors, "the learner's descriptors")
    assert len(cluster.children("rustyrl_actors")) == 1
    status = verb(cluster, "status")
    assert status["learner"]["pid"] == learner
    assert (status["actor_restarts"], status["tickets"]["lost"]) == (0, 0)
    _, err = end(cluster)
    assert "ended with" not in err
    versions = [row["policy_version"] for row in cluster.rows()]
    assert versions == list(range(1, len(versions) + 1))


def largest_slope(seconds: np.ndarray) -> float:
    """The bytes a second that are no leak, seen for so long."""
    return AFFORDED + NOISE / float(seconds[-1] - seconds[0])


def slope(seconds: np.ndarray, sizes: np.ndarray) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen), which single steps do not move."""
    first, second = np.triu_indices(len(seconds), 1)
    return float(np.median((sizes[second] - sizes[first]) / (seconds[second] - seconds[first])))


@pytest.mark.parametrize(
    ("grows", "outlier"), [(0.0, 0.0), (9000.0, 0.0), (0.0, 50e6)], ids=["level", "leaking", "one step"]
)
def test_the_slope_is_that_of_a_leak_and_not_of_a_step(grows, outlier):
    seconds = np.arange(300.0)
    noise = np.random.default_rng(1).normal(0, 20e3, 300)
    sizes = 200e6 + grows * seconds + noise + outlier * (seconds > 270)
    assert (slope(seconds, sizes) > largest_slope(seconds)) == (grows > 0)


@pytest.mark.timeout(MINUTES * 60 + 300)
def test_no_process_grows_in_many_minutes(start):
    cluster = start(*ENDLESS, "--actors", "2", "--set", "run.checkpoint_every_s=5")
    status = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    processes = {f"actor {a['index']}": psutil.Process(a["pid"]) for a in status["actors"]}
    processes |= {"learner": psutil.Process(status["learner"]["pid"]), "launcher": psutil.Process(cluster.process.pid)}
    descriptors = {name: process.num_fds() for name, process in processes.items()}
    rows: list[list[float]] = []
    started = time.monotonic()
    while (now := time.monotonic() - started) < MINUTES * 60:
        assert cluster.process.poll() is None, cluster.wait()
        rows.append([now, *(float(process.memory_info().rss) for process in processes.values())])
        time.sleep(1.0)  # a sample a second; nothing is waited for
    table = np.array(rows)
    table = table[table[:, 0] > SETTLE_S]
    slopes = {name: slope(table[:, 0], table[:, 1 + i]) for i, name in enumerate(processes)}
    print(
        {
            name: f"{value:.0f} bytes/s of {table[-1, 1 + i] / 2**20:.0f} MiB"
            for i, (name, value) in enumerate(slopes.items())
        }
    )
    limit = largest_slope(table[:, 0])
    await_more(cluster, 3)
    for name, process in processes.items():
        poll(lambda name=name, process=process: process.num_fds() <= descriptors[name] + 4, f"descriptors of {name}")
    end(cluster)
    assert {name: round(value) for name, value in slopes.items() if value > limit} == {}
