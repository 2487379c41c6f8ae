"""One game in both styles gives the same numbers: a column world of one slot and its object twin, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from numpy.typing import NDArray

from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.catalog import BUILT_IN, find_environment
from rustyrl_actors.environment import Arrays, StepRows, TimeStep, allocate_rows

SUFFIX = "-object"
TWINS = sorted(name.removesuffix(SUFFIX) for name in BUILT_IN if name.endswith(SUFFIX))
STEPS = {"cartpole": 2500}
OTHER_STEPS = 700
SEEDS = (0, 1, 2)


def random_actions(spec: EnvironmentSpec, seed: int) -> Iterator[Arrays]:
    """Actions without end; numbers are small most of the time, so that what flies does not fall at once."""
    rng = np.random.default_rng(seed)
    while True:
        action: Arrays = {}
        for part in spec.action:
            if part.kind == "discrete":
                counts = np.reshape(part.counts, part.shape)
                action[part.name] = np.asarray(rng.integers(0, counts), np.int64)[None]
            else:
                low, high = (np.reshape(bound, part.shape) for bound in (part.low, part.high))
                number = rng.normal(0, rng.choice([0.1, 0.3, 2.0]), part.shape)
                action[part.name] = np.clip(number, low, high).astype(np.float32)[None]
        yield action


def assert_bits_are_equal(one: NDArray[np.generic], other: NDArray[np.generic], what: str) -> None:
    assert one.dtype == other.dtype, what
    if one.tobytes() != other.tobytes():
        np.testing.assert_array_equal(one, other, what)
        raise AssertionError(f"{what}: {one} against {other}")


def assert_rows_are_equal(one: StepRows, other: StepRows, where: str) -> None:
    for kind in ("observation", "action_mask"):
        assert getattr(one, kind).keys() == getattr(other, kind).keys()
        for name, array in getattr(one, kind).items():
            assert_bits_are_equal(array, getattr(other, kind)[name], f"{kind} {name!r} {where}")
    for name in ("reward", "terminated", "truncated", "valid"):
        assert_bits_are_equal(getattr(one, name), getattr(other, name), f"{name} {where}")


def assert_ends_are_equal(one: TimeStep, other: TimeStep, where: str) -> None:
    assert (one.episodes is None) == (other.episodes is None), where
    if one.episodes is None or other.episodes is None:
        return
    for name in ("slot", "length", "episode_return"):
        assert_bits_are_equal(getattr(one.episodes, name), getattr(other.episodes, name), f"{name} {where}")
    assert one.episodes.metrics.keys() == other.episodes.metrics.keys()
    for name, values in one.episodes.metrics.items():
        assert_bits_are_equal(values, other.episodes.metrics[name], f"metric {name!r} {where}")
    assert one.final_observation is not None
    assert other.final_observation is not None
    for name, array in one.final_observation.items():
        assert_bits_are_equal(array, other.final_observation[name], f"final observation {name!r} {where}")


@pytest.mark.parametrize("name", TWINS)
def test_twins_describe_themselves_alike(name: str) -> None:
    one, other = find_environment(name, {"slots": 1}).spec, find_environment(name + SUFFIX, {"slots": 1}).spec
    for field in ("observation", "action", "slots", "step_s", "max_episode_steps", "metrics", "goal", "evaluate_from"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.parameters == other.parameters


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TWINS)
def test_twins_give_the_same_bits(name: str, seed: int) -> None:
    sources = [find_environment(twin, {"slots": 1}) for twin in (name, name + SUFFIX)]
    rows = [allocate_rows(source.spec) for source in sources]
    ends = 0
    with ExitStack() as stack:
        environments = [stack.enter_context(closing(source.make())) for source in sources]
        for environment, written in zip(environments, rows, strict=True):
            environment.reset((seed, 7, 3), written)
        assert_rows_are_equal(*rows, "after the reset")
        for t, action in zip(range(STEPS.get(name, OTHER_STEPS)), random_actions(sources[0].spec, seed), strict=False):
            one, other = (environment.step(action, out) for environment, out in zip(environments, rows, strict=True))
            assert_rows_are_equal(*rows, f"in step {t}")
            assert_ends_are_equal(one, other, f"in step {t}")
            ends += one.episodes is not None
    assert ends >= 3


def test_cartpole_has_a_twin() -> None:
    assert "cartpole" in TWINS
