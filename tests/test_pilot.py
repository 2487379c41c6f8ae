"""The scripted pilot: how well it flies, what it may know, and that it is measured as a policy is."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from rustyrl.weights import PolicySpec, Weights, weights_layout
from rustyrl_actors import catalog
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import StepRows, allocate_rows
from rustyrl_actors.evaluate import evaluate
from rustyrl_actors.world import describe_world
from rustyrl_actors.worlds.drone import DroneParameters, DroneWorld
from rustyrl_actors.worlds.pilot import Gains, Pilot, body_axes, evaluate_pilot

WINDY = DroneParameters(variation=0.2, gust_m_s=5.0)


def make_environment(
    slots: int, parameters: DroneParameters | None = None
) -> tuple[DroneWorld, ColumnEnvironment, StepRows]:
    parameters = parameters or DroneParameters()
    world = DroneWorld(slots, parameters)
    spec = describe_world("drone", world.info, slots, parameters, {})
    return world, ColumnEnvironment(world, spec), allocate_rows(spec)


def test_the_pilot_reaches_the_target_and_stays() -> None:
    figures = evaluate_pilot("drone", {}, 200, 1)
    assert figures["success_rate"] >= 0.99
    assert figures["crash_rate"] == 0.0
    assert figures["final_distance_median"] < 0.01
    assert figures["time_to_target_median"] < 2.0
    assert 1.0 < figures["effort_mean"] < 1.3


def test_the_pilot_copes_with_other_airframes_and_wind() -> None:
    figures = evaluate_pilot("drone-windy", {}, 200, 1)
    assert figures["success_rate"] >= 0.97
    assert figures["crash_rate"] <= 0.01
    assert figures["final_distance_median"] < 0.05


def test_the_pilots_observer_takes_out_most_of_the_error_that_disturbances_make() -> None:
    with_it, without = (evaluate_pilot("drone-windy", {}, 100, 1, Gains(observer=rate)) for rate in (6.0, 0.0))
    assert without["final_distance_median"] > 5 * with_it["final_distance_median"]
    assert without["success_rate"] < with_it["success_rate"]


def test_the_observer_finds_the_acceleration_that_the_nominal_airframe_does_not_explain() -> None:
    """Held in a steady wind: what is found is what the wind does, drag over mass times its speed."""
    world, environment, rows = make_environment(4, DroneParameters(gust_m_s=5.0))
    pilot, action = Pilot(world, DroneParameters()), np.zeros((4, 4), np.float32)
    with closing(environment):
        environment.reset((2,), rows)
        world.gusts.wave[:] = 0.0
        for _ in range(500):
            pilot.act(action)
            environment.step({"main": action}, rows)
    expected = 0.1 / 0.5 * world.gusts.steady.T
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(pilot.disturbance, expected, atol=0.02)


def test_actions_are_within_their_bounds_from_any_state() -> None:
    world, environment, rows = make_environment(256)
    rng = np.random.default_rng(0)
    pilot, action = Pilot(world, DroneParameters()), np.zeros((256, 4), np.float32)
    with closing(environment):
        environment.reset((0,), rows)
        for _ in range(20):
            attitude = rng.normal(size=(256, 4))
            world.body.attitude[:] = attitude / np.linalg.norm(attitude, axis=1, keepdims=True)
            world.body.velocity[:] = rng.normal(0, 20, (256, 3))
            world.body.spin[:] = rng.normal(0, 20, (256, 3))
            world.body.position[:] = rng.normal(0, 20, (256, 3))
            pilot.act(action)
            assert np.isfinite(action).all()
            assert np.abs(action).max() <= 1.0


def test_the_pilot_knows_neither_airframe_nor_wind_before_it_feels_them() -> None:
    actions = []
    for parameters in (DroneParameters(), WINDY):
        world, environment, rows = make_environment(64, parameters)
        action = np.zeros((64, 4), np.float32)
        with closing(environment):
            environment.reset((3,), rows)
            Pilot(world, parameters).act(action)
        actions.append(action)
    np.testing.assert_array_equal(actions[0], actions[1])


def test_a_new_episode_is_flown_as_by_a_new_pilot() -> None:
    """What was found in the last episode is forgotten, in the slots that began anew alone."""
    world, environment, rows = make_environment(8, WINDY)
    pilot, action, fresh = Pilot(world, WINDY), np.zeros((8, 4), np.float32), np.zeros((8, 4), np.float32)
    with closing(environment):
        environment.reset((4,), rows)
        for step in range(100):
            if step == 99:
                world.body.position[3, 2] = -1.0
            pilot.act(action)
            environment.step({"main": action}, rows)
        np.testing.assert_array_equal(world.task.steps == 0, np.arange(8) == 3)
        pilot.act(action)
        Pilot(world, WINDY).act(fresh)
    np.testing.assert_array_equal((pilot.disturbance == 0).all(axis=0), np.arange(8) == 3)
    same = (action == fresh).all(axis=1)
    np.testing.assert_array_equal(same, np.arange(8) == 3)


def test_body_axes_are_those_of_the_quaternion() -> None:
    half = np.sqrt(0.5)
    x, y, z = body_axes(np.array([[1, 0, 0, 0], [half, 0, 0, half]], np.float32))  # level; a quarter turn left
    np.testing.assert_allclose(x.T, [[1, 0, 0], [0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(y.T, [[0, 1, 0], [-1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(z.T, [[0, 0, 1], [0, 0, 1]], atol=1e-6)


def idle_weights() -> Weights:
    """A policy that always acts 0."""
    spec = find_environment("drone", {}).spec
    policy = PolicySpec(spec.observation, spec.action, (2,), "relu", normalize=False)
    return Weights(policy, {name: np.zeros(shape, np.float32) for name, shape in weights_layout(policy).items()})


@pytest.mark.parametrize("episodes", [3, 10])
def test_pilot_and_policy_are_flown_from_the_same_starts_and_counted_alike(
    episodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pilot that does nothing, both evaluations are the same to the last digit, in several parts too."""

    def idle(self: Pilot, action: NDArray[np.float32]) -> None:
        action[:] = 0.0

    monkeypatch.setattr(Pilot, "act", idle)
    monkeypatch.setitem(catalog.EVALUATION_SLOTS, "column", 4)
    expected = evaluate("drone-windy", {"bounds_m": 12.0}, idle_weights(), episodes, 6)
    assert evaluate_pilot("drone-windy", {"bounds_m": 12.0}, episodes, 6) == expected
