"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from clusters import Cluster


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start ``rustyrl VERB ... --run DIR``; everything is killed after the test."""
    clusters: list[Cluster] = []

    def begin(
        *arguments: str,
        run: Path | None = None,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Cluster:
        run = run or tmp_path / f"run{len(clusters)}"
        cluster = Cluster(run, [*arguments, "--run", str(run)], tmp_path, environment, prefix)
        clusters.append(cluster)
        return cluster

    yield begin
    for cluster in clusters:
        cluster.kill()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes with one thread in the tests of a module, so that its sums do not depend on the cores."""
    import torch  # only where it is used: the tests of actors run without it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["compiled", "plain"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What policies say and draw is computed by compiled code, and once more without it."""
    from rustyrl import perceptron

    if request.param == "plain":
        monkeypatch.setattr(perceptron, "COMPILED", False)
    elif not perceptron.COMPILED:
        pytest.skip(perceptron.PROBLEM)
