"""What a run leaves behind to be read: figures over the newest episodes, and rows that stand there once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rustyrl.figures import EPISODE_FIGURES
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import ActionSpec, ArraySpec, EnvironmentSpec, MetricSpec
from rustyrl_learner import record as module
from rustyrl_learner.record import REOPEN_S, WINDOW, EpisodeWindow, MetricsLog

SPEC = EnvironmentSpec(
    env="maze",
    observation=(ArraySpec("main", (2,), "float32"),),
    action=(ActionSpec("discrete", counts=(2,)),),
    slots=1,
    step_s=0.1,
    max_episode_steps=50,
    metrics=(
        MetricSpec("success_rate", "success", "mean"),
        MetricSpec("time_median", "time", "median"),
        MetricSpec("time_mean", "time", "mean"),
    ),
)


def episodes_of(rng: np.random.Generator, count: int) -> EpisodeRows:
    """Episodes of which only those that succeeded have a time."""
    success = rng.random(count) < 0.5
    return EpisodeRows(
        slot=np.zeros(count, np.int32),
        episode_return=rng.normal(10, 5, count).astype(np.float32),
        length=rng.integers(1, 50, count).astype(np.int32),
        metrics={
            "success": success.astype(np.float32),
            "time": np.where(success, rng.random(count), math.nan).astype(np.float32),
        },
    )


def literal_figures(parts: list[EpisodeRows]) -> dict[str, float]:
    """The same with the statistics module over the newest episodes."""

    def newest(columns: list[Any]) -> list[float]:
        return [float(x) for column in columns for x in column][-WINDOW:]

    returns = newest([part.episode_return for part in parts])
    times = [x for x in newest([part.metrics["time"] for part in parts]) if x == x]
    lengths = newest([part.length for part in parts])

    def percentile(values: list[float], p: int) -> float:
        """By linear interpolation between the two values around rank p (n - 1)."""
        ranked, rank = sorted(map(float, values)), p / 100 * (len(values) - 1)
        low = ranked[math.floor(rank)]
        return low + (ranked[math.ceil(rank)] - low) * (rank - math.floor(rank))

    return {
        **{f"return_p{p}": percentile(returns, p) for p in (10, 50, 90)},
        **{f"length_p{p}": percentile(lengths, p) for p in (10, 50, 90)},
        "episodes": len(returns),
        "return_mean": statistics.fmean(returns),
        "return_std": statistics.pstdev(returns),
        "length_mean": statistics.fmean(newest([part.length for part in parts])),
        "success_rate": statistics.fmean(newest([part.metrics["success"] for part in parts])),
        "time_median": statistics.median(times),
        "time_mean": statistics.fmean(times),
    }


@pytest.mark.parametrize("sizes", [[7], [30, 0, 20], [WINDOW], [WINDOW, 1], [90, 90, 90], [3 * WINDOW + 5]])
def test_figures_are_those_of_the_newest_episodes(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    parts = [episodes_of(rng, size) for size in sizes]
    window = EpisodeWindow(SPEC)
    for part in parts:
        window.add(part)
    assert window.figures() == pytest.approx(literal_figures(parts), rel=1e-12)


def test_before_the_first_episode_there_are_no_figures() -> None:
    window = EpisodeWindow(SPEC)
    assert window.figures() == {}
    window.add(episodes_of(np.random.default_rng(0), 0))
    assert window.figures() == {}


def test_a_metric_that_means_nothing_in_any_episode_is_left_out() -> None:
    episodes = episodes_of(np.random.default_rng(0), 5)
    episodes.metrics["time"][:] = math.nan
    window = EpisodeWindow(SPEC)
    window.add(episodes)
    assert set(window.figures()) == {"episodes", *EPISODE_FIGURES, "success_rate"}


def test_a_window_goes_on_from_its_columns() -> None:
    straight, resumed_one = EpisodeWindow(SPEC), EpisodeWindow(SPEC)
    assert EpisodeWindow(SPEC).columns() == {}
    resumed_one.set_columns({})
    assert resumed_one.figures() == {}
    rng = np.random.default_rng(0)
    straight.add(episodes_of(rng, 190))
    resumed_one.set_columns({name: column.copy() for name, column in straight.columns().items()})
    assert resumed_one.figures() == straight.figures()
    more = episodes_of(rng, 30)
    for window in (straight, resumed_one):
        window.add(more)
    assert resumed_one.figures() == straight.figures()
    assert resumed_one.figures()["episodes"] == WINDOW


@contextmanager
def log_of(run: Path, after_version: int = 0) -> Iterator[MetricsLog]:
    log = MetricsLog(run, after_version)
    try:
        yield log
    finally:
        log.close()


def row(version: int, **more: Any) -> dict[str, Any]:
    return {"policy_version": version, "steps": 100 * version, "return_mean": 0.5 * version, **more}


def rows_in(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [msgspec.json.decode(line) for line in text.splitlines()]


def test_every_row_is_a_line_and_can_be_read_at_once(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        assert rows_in(tmp_path) == []
        for version in (1, 2, 3):
            log.write(row(version, learner_s={"update": 0.25}))
            assert [r["policy_version"] for r in rows_in(tmp_path)] == list(range(1, version + 1))
    assert rows_in(tmp_path)[1] == {
        "policy_version": 2,
        "steps": 200,
        "return_mean": 1.0,
        "learner_s": {"update": 0.25},
    }


def test_numbers_that_are_not_finite_do_not_break_a_row(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        log.write(row(1, value_loss=math.nan, policy_loss=math.inf))
        log.write(row(2))
    assert [r["policy_version"] for r in rows_in(tmp_path)] == [1, 2]


def resumed(run: Path, version: int) -> list[int]:
    """Which versions have rows after the run went on from this checkpoint and wrote its next row."""
    with log_of(run, version) as log:
        log.write(row(version + 1, again=True))
    rows = rows_in(run)
    assert rows[-1]["again"]
    assert all("again" not in r for r in rows[:-1])
    return [r["policy_version"] for r in rows]


def write_rows(run: Path, *versions: int, tail: str = "") -> None:
    lines = [msgspec.json.encode(row(version)).decode() + "\n" for version in versions]
    (run / "metrics.jsonl").write_text("".join(lines) + tail, encoding="utf-8")


@pytest.mark.parametrize(("checkpoint", "left"), [(5, [1, 2, 3, 4, 5, 6]), (3, [1, 2, 3, 4]), (0, [1])])
def test_on_resume_rows_after_the_checkpoint_are_cut(tmp_path: Path, checkpoint: int, left: list[int]) -> None:
    write_rows(tmp_path, 1, 2, 3, 4, 5)
    assert resumed(tmp_path, checkpoint) == left


@pytest.mark.parametrize(
    "tail", ['{"policy_version":4,"ste', '{"policy_version":4,"steps":400', "{", "\0\0\0\0", "null"]
)
def test_a_torn_last_line_is_cut(tmp_path: Path, tail: str) -> None:
    write_rows(tmp_path, 1, 2, 3, tail=tail)
    assert resumed(tmp_path, 3) == [1, 2, 3, 4]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    write_rows(tmp_path, 1, 2, tail=msgspec.json.encode(row(3)).decode())
    assert resumed(tmp_path, 3) == [1, 2, 3, 4]


def test_resuming_leaves_no_half_written_file(tmp_path: Path) -> None:
    write_rows(tmp_path, 1, 2, 3)
    resumed(tmp_path, 2)
    assert {path.suffix for path in tmp_path.iterdir() if "tfevents" not in path.name} == {".jsonl"}


def scalars_in(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_gets_every_finite_number_under_its_name_by_steps(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        log.write(row(1, learner_s={"update": 0.25, "wait": math.nan}, note="text", value_loss=math.nan))
        log.write(row(2, learner_s={"update": 0.5}))
    assert scalars_in(tmp_path) == {
        "policy_version": [(100, 1.0), (200, 2.0)],
        "steps": [(100, 100.0), (200, 200.0)],
        "return_mean": [(100, 0.5), (200, 1.0)],
        "learner_s/update": [(100, 0.25), (200, 0.5)],
    }


def test_tensorboard_shows_no_update_twice_after_a_resume(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        for version in (1, 2, 3, 4):
            log.write(row(version))
    with log_of(tmp_path, 2) as log:
        log.write(row(3, return_mean=-7.0))
    assert scalars_in(tmp_path)["return_mean"] == [(100, 0.5), (200, 1.0), (300, -7.0)]


def test_tensorboard_begins_anew_where_no_row_is_left(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        log.write({**row(1), "steps": 0})  # a warm-up
        log.write(row(2))
    with log_of(tmp_path, 0) as log:
        log.write({**row(1, return_mean=-7.0), "steps": 0})
    assert scalars_in(tmp_path)["return_mean"] == [(0, -7.0)]


def test_bytes_that_are_no_text_are_cut_like_a_torn_line(tmp_path: Path) -> None:
    write_rows(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{")
    assert resumed(tmp_path, 2) == [1, 2, 3]


class FullDisk:
    """Stands for the file of a log: so many bytes fit, then nothing does."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room <= 0 and data:
            raise OSError(28, "No space left on device")
        written: int = self.file.write(data[: self.room])  # as a disk does that is nearly full
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_costs_rows_each_whole(tmp_path: Path, room: int) -> None:
    with log_of(tmp_path) as log:
        log.write(row(1))
        file = log._file
        log._file = FullDisk(file, room)
        for version in (2, 3):
            with pytest.raises(OSError, match="No space left"):
                log.write(row(version))
        assert log.lost == 2
        assert [r["policy_version"] for r in rows_in(tmp_path)] == [1]
        log._file = file  # there is room again
        log.write(row(4))
        assert log.lost == 2
    assert [r["policy_version"] for r in rows_in(tmp_path)] == [1, 4]
    assert [step for step, _ in scalars_in(tmp_path)["return_mean"]] == [100, 200, 300, 400]  # which had room


def test_a_row_that_is_written_in_pieces_is_whole(tmp_path: Path) -> None:
    class Short(FullDisk):
        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:7]))

    with log_of(tmp_path) as log:
        log._file = Short(log._file, 0)
        log.write(row(1))
        log.write(row(2))
    assert rows_in(tmp_path) == [row(1), row(2)]


def test_tensorboard_is_opened_again_a_while_after_its_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    opened: list[Any] = []
    with log_of(tmp_path) as log:
        open_board = log._open_board
        log._open_board = lambda step: opened.append(step) or open_board(step)
        log.write(row(1))

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(log._board, "add", full)
        with pytest.raises(OSError, match="No space left"):
            log.write(row(2))
        log.write(row(3))  # it is left alone, and the rows go on
        clock.now += REOPEN_S - 0.01
        log.write(row(4))
        assert opened == []
        clock.now += 0.02
        log.write(row(5))
        log.write(row(6))
        assert opened == [None]
        assert log.lost == 0
    assert [r["policy_version"] for r in rows_in(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars_in(tmp_path)["return_mean"]] == [100, 500, 600]
