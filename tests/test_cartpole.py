"""CartPole in column style against the Gymnasium environment that it repeats."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import StepRows, allocate_rows
from rustyrl_actors.world import describe_world
from rustyrl_actors.worlds.cartpole import CartPoleParameters, CartPoleWorld

LIMIT = 12 * 2 * np.pi / 360


class SeenWorld(CartPoleWorld):
    """Remembers the state in which a step left every cart, before any reset."""

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        if isinstance(rows, slice):
            self.seen = self._cart.state.copy()
        super().observe(rows)

    def place(self, state: object) -> None:
        self._cart.state[:] = state


def make_environment(slots: int) -> tuple[SeenWorld, ColumnEnvironment, StepRows]:
    world = SeenWorld(slots, CartPoleParameters())
    spec = describe_world("cartpole", world.info, slots, CartPoleParameters(), {})
    return world, ColumnEnvironment(world, spec), allocate_rows(spec)


def gymnasium_cartpole() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1", disable_env_checker=True)


def test_spaces_and_step_limit_are_gymnasiums() -> None:
    with closing(gymnasium_cartpole()) as reference:
        info = CartPoleWorld(1, CartPoleParameters()).info
        assert info.observation_space == reference.observation_space
        assert info.action_space == reference.action_space
        assert reference.spec is not None
        assert info.max_episode_steps == reference.spec.max_episode_steps


def test_one_step_from_any_state_is_gymnasiums() -> None:
    count = 1000
    rng = np.random.default_rng(0)
    states = rng.uniform((-2.5, -4, -1.1 * LIMIT, -4), (2.5, 4, 1.1 * LIMIT, 4), (count, 4))
    actions = rng.integers(0, 2, count)
    world, environment, rows = make_environment(count)
    with closing(environment), closing(gymnasium_cartpole()) as reference:
        environment.reset((0,), rows)
        world.place(states)
        environment.step({"main": actions}, rows)
        reference.reset(seed=0)
        for row, (state, action) in enumerate(zip(states, actions, strict=True)):
            reference.reset()
            reference.unwrapped.state = state.copy()
            _, reward, terminated, _, _ = reference.step(int(action))
            np.testing.assert_allclose(world.seen[row], reference.unwrapped.state, rtol=1e-12, atol=1e-14)
            assert rows.reward[row] == reward
            assert rows.terminated[row] == terminated
    assert 0 < rows.terminated.sum() < count


def test_observation_is_gymnasiums() -> None:
    world, environment, rows = make_environment(1)
    with closing(environment), closing(gymnasium_cartpole()) as reference:
        expected, _ = reference.reset(seed=3)
        environment.reset((0,), rows)
        for action in (0, 1, 1):
            world.place(reference.unwrapped.state)
            expected, *_ = reference.step(action)
            environment.step({"main": np.array([action])}, rows)
            assert rows.observation["main"].dtype == expected.dtype
            np.testing.assert_allclose(rows.observation["main"][0], expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_episode_goes_and_ends_as_gymnasiums(seed: int) -> None:
    """Both fly free from the same start; they part by rounding alone, which an episode this short hardly grows."""
    rng = np.random.default_rng(seed)
    world, environment, rows = make_environment(1)
    with closing(environment), closing(gymnasium_cartpole()) as reference:
        reference.reset(seed=seed)
        environment.reset((seed,), rows)
        world.place(reference.unwrapped.state)
        terminated, length = False, 0
        while not terminated:
            action = int(rng.integers(2))
            _, reward, terminated, truncated, _ = reference.step(action)
            outcome = environment.step({"main": np.array([action])}, rows)
            length += 1
            np.testing.assert_allclose(world.seen[0], reference.unwrapped.state, rtol=1e-8, atol=1e-10)
            assert (rows.reward[0], rows.terminated[0], rows.truncated[0]) == (reward, terminated, truncated)
        assert outcome.episodes is not None
        assert outcome.episodes.length.tolist() == [length]
        assert outcome.episodes.episode_return.tolist() == [float(length)]


def test_a_balanced_episode_is_truncated_at_step_500_as_gymnasiums() -> None:
    world, environment, rows = make_environment(1)
    with closing(environment), closing(gymnasium_cartpole()) as reference:
        reference.reset(seed=1)
        environment.reset((0,), rows)
        for step in range(1, 501):
            state = reference.unwrapped.state
            world.place(state)  # an upright pole is unstable: rounding would grow without bound in 500 steps
            action = int(np.dot(state, (0.1, 0.3, 3.0, 1.0)) > 0)
            _, reward, terminated, truncated, _ = reference.step(action)
            outcome = environment.step({"main": np.array([action])}, rows)
            np.testing.assert_allclose(world.seen[0], reference.unwrapped.state, rtol=1e-12, atol=1e-14)
            assert (rows.reward[0], rows.terminated[0], rows.truncated[0]) == (reward, terminated, truncated)
            assert truncated == (step == 500)
        assert outcome.final_observation is not None
        np.testing.assert_allclose(outcome.final_observation["main"][0], reference.unwrapped.state, rtol=1e-6)


def test_starts_are_drawn_from_gymnasiums_range() -> None:
    world, environment, rows = make_environment(4096)
    with closing(environment):
        environment.reset((5,), rows)
        start = world.seen
    assert (np.abs(start) <= 0.05).all()
    np.testing.assert_allclose(start.min(axis=0), -0.05, atol=0.001)
    np.testing.assert_allclose(start.max(axis=0), 0.05, atol=0.001)
