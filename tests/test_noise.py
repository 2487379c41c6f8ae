"""Action noise depends on (seed, world, batch) and on nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rustyrl.spec import ActionSpec, EnvironmentSpec
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator


def spec_of(*action: ActionSpec) -> EnvironmentSpec:
    return EnvironmentSpec("test", (), action, slots=4, step_s=0.1, max_episode_steps=10)


BOX = spec_of(ActionSpec("box", shape=(3,), low=(-1.0,) * 3, high=(1.0,) * 3))
DISCRETE = spec_of(ActionSpec("discrete", counts=(5,)))
HYBRID = spec_of(
    ActionSpec("discrete", "gait", shape=(2,), counts=(5, 2)),
    ActionSpec("box", "push", shape=(3, 1), low=(-1.0,) * 3, high=(1.0,) * 3),
    ActionSpec("discrete", "call", counts=(4,), masked=True),
)
SPECS = pytest.mark.parametrize("spec", [BOX, DISCRETE, HYBRID], ids=["box", "discrete", "hybrid"])
T, SLOTS = 8, 4


def draw(spec: EnvironmentSpec, seed: int, world: int, batch: int) -> NDArray[np.float32]:
    noise = allocate_noise(spec, T, SLOTS)
    fill_noise(noise, spec, slice(0, SLOTS), noise_generator(seed, world, batch))
    return noise


@SPECS
def test_same_key_same_noise(spec: EnvironmentSpec) -> None:
    np.testing.assert_array_equal(draw(spec, 1, 2, 3), draw(spec, 1, 2, 3))


@SPECS
def test_any_other_key_gives_other_noise(spec: EnvironmentSpec) -> None:
    keys = list(itertools.product((0, 1, 2**62), (0, 1, 2, 255, 256, 65535), (0, 1, 2, 1000)))
    assert len({draw(spec, *key).tobytes() for key in keys}) == len(keys)


def test_streams_of_neighboring_worlds_and_batches_do_not_overlap() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2)))
    values = np.concatenate([noise_generator(*key).integers(0, 2**63, 4096) for key in keys])
    assert len(np.unique(values)) == len(values)


@SPECS
def test_noise_of_a_world_does_not_depend_on_who_owns_it_beside_which_worlds(spec: EnvironmentSpec) -> None:
    alone = draw(spec, 7, 5, 9)
    together = allocate_noise(spec, T, 3 * SLOTS)
    for place, world in enumerate((8, 5, 2)):
        columns = slice(place * SLOTS, (place + 1) * SLOTS)
        fill_noise(together, spec, columns, noise_generator(7, world, 9))
    np.testing.assert_array_equal(together[:, SLOTS : 2 * SLOTS], alone)


def test_filling_a_world_leaves_the_columns_of_others_alone() -> None:
    noise = allocate_noise(BOX, T, 3 * SLOTS)
    noise.fill(7.0)
    fill_noise(noise, BOX, slice(SLOTS, 2 * SLOTS), noise_generator(0, 0, 0))
    assert (noise[:, :SLOTS] == 7.0).all()
    assert (noise[:, 2 * SLOTS :] == 7.0).all()
    assert (noise[:, SLOTS : 2 * SLOTS] != 7.0).all()


def test_box_noise_is_standard_normal_and_discrete_noise_uniform() -> None:
    normal = np.concatenate([draw(BOX, 1, world, 0).ravel() for world in range(100)])
    uniform = np.concatenate([draw(DISCRETE, 1, world, 0).ravel() for world in range(300)])
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_noise_has_a_number_for_every_number_of_an_action() -> None:
    assert allocate_noise(BOX, T, SLOTS).shape == (T, SLOTS, 3)
    assert allocate_noise(DISCRETE, T, SLOTS).shape == (T, SLOTS, 1)
    assert allocate_noise(HYBRID, T, SLOTS).shape == (T, SLOTS, 6)


def test_every_column_of_a_hybrid_action_has_the_noise_of_its_part() -> None:
    noise = np.concatenate([draw(HYBRID, 1, world, 0).reshape(-1, 6) for world in range(100)])
    for column, distribution in enumerate(["uniform", "uniform", "norm", "norm", "norm", "uniform"]):
        assert stats.kstest(noise[:, column], distribution).pvalue > 0.01
    assert np.abs(np.corrcoef(noise.T) - np.eye(6)).max() < 0.1  # no two columns are the same numbers
