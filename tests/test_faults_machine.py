"""Full and read-only disks, limits of descriptors, clocks that go back: training goes on, or ends with the cause."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clusters import ENDLESS, await_learner, await_more, await_status, contributing, end, poll, rustyrl, verb, words

from rustyrl.errors import RunFailedError

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

FAKETIME = os.environ.get("LIBFAKETIME") or next(map(str, Path("/usr").glob("lib*/**/libfaketimeMT.so*")), "")
TWO = (*ENDLESS, "--actors", "2")


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leave no room for anything."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                full = False
                while not full:
                    try:
                        file.write(b"x" * size)
                    except OSError as error:
                        full = error.errno == errno.ENOSPC
                        if not full:
                            raise

    def clear(self) -> None:
        self._filler.unlink()

    def set_writable(self, *, writable: bool) -> None:
        mode = "rw" if writable else "ro"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small file system is made by mount, which is not there")
    if done.returncode:
        pytest.skip(f"a small file system can be made by root alone, who may mount: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def deeds(tmp_path) -> Path:
    folder = tmp_path / "deeds"
    folder.mkdir()
    return folder


def test_a_full_disk_loses_rows_and_checkpoints_but_no_training(start, disk, deeds):
    run = disk.path / "run"
    cluster = start(*TWO, "--set", f"env.deeds={deeds}", "--set", "run.checkpoint_every_s=1", run=run)
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    disk.fill()
    with pytest.raises(
        RunFailedError, match=r"the checkpoint could not be written: .*No space left on device"
    ) as error:
        verb(cluster, "checkpoint")
    assert error.value.exit_code == 1
    (deeds / "print").touch()
    poll(lambda: not list(deeds.iterdir()), "a world to print")
    await_more(cluster, 30)
    psutil.Process(verb(cluster, "status")["actors"][0]["pid"]).kill()
    await_status(cluster, lambda s: s["actor_restarts"] == 1 and contributing(s) == {0: 2, 1: 2}, "another actor")
    status = verb(cluster, "status")
    assert status["learner"]["restarts"] == 0
    disk.clear()
    written = verb(cluster, "checkpoint")
    assert (Path(written["checkpoint"]) / "manifest.json").exists()
    newest = cluster.rows()[-1]["policy_version"]
    poll(lambda: cluster.rows()[-1]["policy_version"] > newest, "rows again")
    versions = [row["policy_version"] for row in cluster.rows()]  # each is whole, or this would raise
    assert versions == sorted(set(versions))
    assert len(versions) < versions[-1]
    assert not list((run / "checkpoints").glob(".*"))
    summary, err = end(cluster)
    assert "metrics cannot be written" in err
    assert "could not be written: OSError: [Errno 28] No space left on device" in err
    assert summary["actor_restarts"] == 1


def test_a_run_that_ends_on_a_full_disk_says_so(start, disk):
    cluster = start(*TWO, run=disk.path / "run")
    cluster.await_version(3)
    disk.fill()
    verb(cluster, "stop")
    code, out, err = cluster.wait()
    assert (code, out) == (1, "")
    assert "error: the last checkpoint could not be written: OSError: [Errno 28] No space left on device" in err
    assert "the last good checkpoint is" in err
    assert "Traceback" not in err
    cluster.assert_gone()


def test_a_learner_that_cannot_be_followed_for_a_full_disk_ends_the_run_with_the_cause(start, disk):
    cluster = start(*TWO, "--set", "cluster.restarts=0", run=disk.path / "run")
    cluster.await_version(3)
    disk.fill()
    psutil.Process(verb(cluster, "status")["learner"]["pid"]).kill()
    code, _, err = cluster.wait()
    assert code == 1
    assert "No space left on device" in err.rpartition("error: ")[2]
    cluster.assert_gone()


def test_a_goal_that_is_met_on_a_full_disk_ends_the_run_with_the_cause(start, disk):
    arguments = [a for a in TWO if a not in ("--total-steps", "1000000000")]
    cluster = start(*arguments, "--stop-at", "return_mean>=-1000000", "--set", "run.eval_every=1",
                    "--set", "run.eval_episodes=2000", run=disk.path / "run")  # fmt: skip
    poll(lambda: [p for p in cluster.children("rustyrl_actors") if "evaluate" in words(p)], "an evaluation")
    disk.fill()
    code, _, err = cluster.wait()
    assert code == 1
    assert "No space left on device" in err.rpartition("error: ")[2]
    assert "Traceback" not in err
    cluster.assert_gone()


def test_nothing_is_started_on_a_full_disk(disk):
    disk.fill()
    code, out, err = rustyrl("train", "cartpole", "--run", str(disk.path / "run"))
    assert (code, out) == (2, "")
    assert "error: cannot write to the run folder" in err
    assert "No space left on device" in err
    assert "Traceback" not in err


def test_nothing_is_started_in_a_folder_that_cannot_be_written_to(disk):
    run = disk.path / "run"
    arguments = ("train", "cartpole", "--actors", "1", "--set", "run.eval_episodes=2", "--run", str(run))
    code, _, err = rustyrl(*arguments, "--total-steps", "1000")
    assert code == 0, err
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    disk.set_writable(writable=False)
    for extra in (["--resume"], ["--resume", "--total-steps", "9000"]):
        code, _, err = rustyrl(*arguments, *extra)
        assert code == 2
        assert f"error: cannot write to the run folder {run}: Read-only file system" in err
    code, _, err = rustyrl("train", "cartpole", "--run", str(disk.path / "other"))
    assert code == 2
    assert "Read-only file system" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    disk.set_writable(writable=True)
    assert rustyrl("train", "--resume", "--run", str(run), "--total-steps", "2000")[0] == 0


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_NOFILE"), reason="limits of a running process are set on Linux only")
def test_a_learner_without_descriptors_trains_on_and_saves_when_it_has_some(start):
    cluster = start(*TWO, "--set", "run.checkpoint_every_s=1000000")
    status = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    learner = psutil.Process(status["learner"]["pid"])
    before = learner.rlimit(psutil.RLIMIT_NOFILE)
    learner.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))
    with pytest.raises(RunFailedError, match="Too many open files"):
        verb(cluster, "checkpoint")
    await_more(cluster, 5)
    learner.rlimit(psutil.RLIMIT_NOFILE, before)
    assert verb(cluster, "checkpoint")["version"] > 0
    assert verb(cluster, "status")["learner"]["restarts"] == 0
    end(cluster)


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_NOFILE"), reason="limits of a running process are set on Linux only")
def test_a_launcher_that_has_no_descriptors_for_more_actors_ends_with_the_cause(start):
    cluster = start(*TWO)
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    launcher = psutil.Process(cluster.process.pid)
    room = launcher.num_fds() + 12  # for the verb itself, and for three actors or so
    launcher.rlimit(psutil.RLIMIT_NOFILE, (room, launcher.rlimit(psutil.RLIMIT_NOFILE)[1]))
    verb(cluster, "scale", "16")
    code, _, err = cluster.wait()
    assert code == 1
    last = err.rpartition("error: ")[2]
    assert "could not be started: [Errno 24] Too many open files" in last
    assert "Traceback" not in err
    cluster.assert_gone()


@pytest.mark.skipif(not FAKETIME, reason="libfaketime is not installed; LIBFAKETIME names it elsewhere")
@pytest.mark.parametrize("change", ["-3h", "+400d"])
def test_a_clock_that_is_set_changes_nothing(start, tmp_path, change):
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    # libfaketime moves the end of a sleep on the monotonic clock too, as time.sleep asks for one: EINVAL.
    (tmp_path / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    fake = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "LD_PRELOAD": FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    cluster = start(*TWO, "--set", "cluster.lease_s=20", environment={**os.environ, **fake})
    before = await_status(cluster, lambda status: contributing(status) == {0: 2, 1: 2}, "both")
    clock.write_text(f"{change}\n")
    await_more(cluster, 20)
    psutil.Process(before["actors"][0]["pid"]).kill()
    await_status(cluster, lambda s: s["actor_restarts"] == 1 and contributing(s) == {0: 2, 1: 2}, "another actor")
    psutil.Process(before["learner"]["pid"]).kill()
    status = await_learner(cluster, 1)
    assert 0 < status["seconds"] < 300
    assert abs(time.time() - json.loads((cluster.run / "cluster.json").read_text())["started"]) < 300
    seconds = [row["seconds"] for row in cluster.rows()]
    assert seconds == sorted(seconds)
    assert verb(cluster, "checkpoint")["version"] > 0
    summary, _ = end(cluster)
    assert (summary["actor_restarts"], summary["learner_restarts"]) == (1, 1)
    assert 0 < summary["seconds"] < 300
