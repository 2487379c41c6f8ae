"""The quadrotor against closed forms, an independent integrator, and a slow reading of its task."""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.spatial.transform import Rotation

from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import StepRows, TimeStep, allocate_rows
from rustyrl_actors.world import describe_world
from rustyrl_actors.worlds.drone import GRAVITY_M_S2, STEP_S, Body, DroneParameters, DroneWorld, Rotors, columns, fly

MELLINGER = DroneParameters()
STILL_AIR = DroneParameters(drag_n_s_m=0.0)
ROUNDING = 2.0**-23  # of float32
LEVEL = (1.0, 0.0, 0.0, 0.0)


def make_body(count: int = 1, **state: object) -> Body:
    body = Body(columns(count, 3), columns(count, 3), columns(count, 4), columns(count, 3))
    body.attitude[:] = LEVEL
    for name, value in state.items():
        getattr(body, name)[:] = value
    return body


def fly_for(
    body: Body, rotors: Rotors, command_n: object, seconds: float, dt_s: float, parameters: DroneParameters
) -> None:
    command = np.broadcast_to(np.asarray(command_n, np.float32), rotors.thrust.shape)
    for _ in range(round(seconds / dt_s)):
        fly(body, rotors, command, dt_s, parameters)


def to_world(attitude: NDArray[np.floating]) -> Rotation:
    return Rotation.from_quat(np.asarray(attitude, np.float64)[..., [1, 2, 3, 0]])


# Physics


def test_free_fall_without_drag_is_g_t_and_half_g_t_squared() -> None:
    body, rotors = make_body(position=(1.0, 2.0, 50.0), velocity=(0.5, 0.0, 1.0)), Rotors(columns(1, 4))
    dt_s, seconds = 0.005, 2.0
    fly_for(body, rotors, 0.0, seconds, dt_s, STILL_AIR)
    steps = seconds / dt_s
    speed = 1.0 - GRAVITY_M_S2 * seconds
    assert body.velocity[0] == pytest.approx((0.5, 0.0, speed), abs=steps * ROUNDING * abs(speed))
    # Semi-implicit Euler falls g t dt / 2 too far, and nothing else is wrong with it.
    late = GRAVITY_M_S2 * seconds * dt_s / 2
    height = 50.0 + seconds - GRAVITY_M_S2 * seconds**2 / 2 - late
    assert body.position[0] == pytest.approx((2.0, 2.0, height), abs=steps * ROUNDING * 50)


def test_linear_drag_approaches_terminal_speed_exponentially() -> None:
    parameters = DroneParameters(drag_n_s_m=1.0)
    terminal = -parameters.mass_kg * GRAVITY_M_S2 / parameters.drag_n_s_m
    constant_s = parameters.mass_kg / parameters.drag_n_s_m
    body, rotors = make_body(velocity=(2.0, 0.0, 0.0)), Rotors(columns(1, 4))
    dt_s = 0.001
    for seconds in (0.25, 0.5, 0.75):
        fly_for(body, rotors, 0.0, 0.25, dt_s, parameters)
        left = np.exp(-seconds / constant_s)
        # (1 - x)^n against exp(-n x): at most x / 2 of n x exp(-n x), x = dt / time constant
        off = left * seconds / constant_s * dt_s / constant_s
        assert body.velocity[0, 0] == pytest.approx(2.0 * left, abs=2.0 * off)
        assert body.velocity[0, 2] == pytest.approx(terminal * (1 - left), abs=abs(terminal) * off)
    fly_for(body, rotors, 0.0, 10.0, 0.005, parameters)
    assert body.velocity[0] == pytest.approx((0.0, 0.0, terminal), rel=1e-5, abs=1e-6)


def test_a_quarter_of_the_weight_on_each_rotor_hovers() -> None:
    hover_n = MELLINGER.mass_kg * GRAVITY_M_S2 / 4
    body, rotors = make_body(position=(0.0, 0.0, 5.0)), Rotors(columns(1, 4))
    rotors.thrust[:] = hover_n
    fly_for(body, rotors, hover_n, 10.0, 0.005, MELLINGER)
    assert body.velocity[0] == pytest.approx(0.0, abs=2000 * ROUNDING * GRAVITY_M_S2 * 0.005)
    assert body.position[0] == pytest.approx((0.0, 0.0, 5.0), abs=1e-3)
    np.testing.assert_array_equal(body.spin[0], 0.0)
    np.testing.assert_array_equal(body.attitude[0], LEVEL)


def torque_free_drift(inertia: tuple[float, float, float], dt_s: float, seconds: float) -> tuple[float, float, float]:
    """The largest relative change of momentum, turn of its world direction in rad, relative change of energy."""
    parameters = DroneParameters(
        inertia_xx_kg_m2=inertia[0], inertia_yy_kg_m2=inertia[1], inertia_zz_kg_m2=inertia[2], drag_n_s_m=0.0
    )
    moments = np.array(inertia)
    body, rotors = make_body(spin=(3.0, 2.0, 5.0)), Rotors(columns(1, 4))
    momentum, energy = [], []
    for _ in range(round(seconds / dt_s) + 1):
        spin = body.spin[0].astype(np.float64)
        momentum.append(to_world(body.attitude[0]).apply(moments * spin))
        energy.append(float(moments @ spin**2) / 2)
        fly_for(body, rotors, 0.0, dt_s, dt_s, parameters)
    size = np.linalg.norm(momentum, axis=1)
    sine = np.linalg.norm(np.cross(momentum, momentum[0]), axis=1) / (size * size[0])
    turn = np.arctan2(sine, momentum @ momentum[0] / (size * size[0]))
    return float(np.ptp(size) / size[0]), float(turn.max()), float(np.ptp(energy) / energy[0])


@pytest.mark.parametrize("inertia", [(0.0023, 0.0023, 0.004), (0.0023, 0.0031, 0.004)], ids=["mellinger", "uneven"])
def test_torque_free_rotation_keeps_angular_momentum_and_energy(inertia: tuple[float, float, float]) -> None:
    dt_s, spin = 0.002, float(np.linalg.norm((3.0, 2.0, 5.0)))
    coarse, fine = (torque_free_drift(inertia, step_s, 2.0) for step_s in (dt_s, dt_s / 2))
    # What one step turns the body by is the most that a first-order method may be off; halves with the step.
    assert max(coarse) < spin * dt_s
    assert np.divide(coarse, fine) == pytest.approx(2.0, rel=0.1)


def test_torque_free_rotation_gains_no_energy_over_a_long_time() -> None:
    size, turn, energy = torque_free_drift((0.0023, 0.0023, 0.004), STEP_S / 4, 20.0)
    assert max(size, turn, energy) < np.linalg.norm((3.0, 2.0, 5.0)) * STEP_S / 4


def test_axisymmetric_spin_precesses_at_the_rate_of_eulers_equations() -> None:
    rate = (MELLINGER.inertia_zz_kg_m2 / MELLINGER.inertia_xx_kg_m2 - 1) * 5.0  # rad/s about the body's z axis
    body, rotors = make_body(spin=(3.0, 0.0, 5.0)), Rotors(columns(1, 4))
    dt_s, seconds = 0.0005, 1.0
    fly_for(body, rotors, 0.0, seconds, dt_s, MELLINGER)
    expected = (3.0 * np.cos(rate * seconds), 3.0 * np.sin(rate * seconds), 5.0)
    assert body.spin[0] == pytest.approx(expected, abs=3.0 * rate * dt_s)


def motion(_t: float, state: NDArray[np.float64], command_n: NDArray[np.float64], p: DroneParameters) -> list[float]:
    """Newton's and Euler's equations of one drone, written for reading: d state / dt."""
    velocity, attitude, spin, thrust = state[3:6], state[6:10], state[10:13], state[13:17]
    inertia = np.array((p.inertia_xx_kg_m2, p.inertia_yy_kg_m2, p.inertia_zz_kg_m2))
    places = np.array(((p.arm_m, 0, 0), (0, p.arm_m, 0), (-p.arm_m, 0, 0), (0, -p.arm_m, 0)))
    forces = np.outer(thrust, (0.0, 0.0, 1.0))
    torque = np.cross(places, forces).sum(axis=0)
    torque[2] += p.yaw_moment_m * (thrust @ (1, -1, 1, -1))
    acceleration = (to_world(attitude).apply(forces.sum(axis=0)) - p.drag_n_s_m * velocity) / p.mass_kg
    acceleration[2] -= GRAVITY_M_S2
    w, vector = attitude[0], attitude[1:]
    turning = np.concatenate([[-vector @ spin / 2], (w * spin + np.cross(vector, spin)) / 2])
    spin_rate = (torque - np.cross(spin, inertia * spin)) / inertia
    return [*velocity, *acceleration, *turning, *spin_rate, *((command_n - thrust) / p.rotor_lag_s)]


@pytest.mark.parametrize("inertia_yy", [0.0023, 0.0031], ids=["mellinger", "uneven"])
def test_halving_the_step_halves_the_distance_to_the_exact_flight(inertia_yy: float) -> None:
    parameters = DroneParameters(inertia_yy_kg_m2=inertia_yy)
    rng = np.random.default_rng(3)
    count, seconds = 6, 0.4
    hover_n = parameters.mass_kg * GRAVITY_M_S2 / 4
    attitude = rng.normal(size=(count, 4))
    start = np.concatenate(
        [
            rng.normal(size=(count, 6)),
            attitude / np.linalg.norm(attitude, axis=1, keepdims=True),
            rng.normal(size=(count, 3)),
            hover_n * rng.uniform(0.5, 1.5, (count, 4)),
        ],
        axis=1,
    ).astype(np.float32)
    command = (hover_n * rng.uniform(0.95, 1.05, (count, 4))).astype(np.float32)
    exact = np.array(
        [
            solve_ivp(motion, (0, seconds), row, args=(told, parameters), rtol=1e-9, atol=1e-9).y[:, -1]
            for row, told in zip(start.astype(np.float64), command.astype(np.float64), strict=True)
        ]
    )
    errors = []
    for dt_s in (0.01, 0.005, 0.0025):
        body, rotors = make_body(count), Rotors(columns(count, 4))
        parts = (body.position, body.velocity, body.attitude, body.spin)
        for part, value in zip((*parts, rotors.thrust), np.split(start, (3, 6, 10, 13), axis=1), strict=True):
            part[:] = value
        fly_for(body, rotors, command, seconds, dt_s, parameters)
        wanted = np.split(exact, (3, 6, 10, 13), axis=1)[:4]
        errors.append([np.linalg.norm(part - value) for part, value in zip(parts, wanted, strict=True)])
    ratios = np.divide(errors[:-1], errors[1:])
    assert ratios == pytest.approx(2.0, rel=0.15), f"errors by step and quantity: {errors}"


@pytest.mark.parametrize(
    ("rotor", "axis", "sign"),
    [(0, 1, -1), (1, 0, +1), (2, 1, +1), (3, 0, -1)],
    ids=["front", "left", "back", "right"],
)
def test_a_rotor_lifts_its_own_side_and_turns_the_body_against_its_blades(rotor: int, axis: int, sign: int) -> None:
    parameters = DroneParameters(rotor_lag_s=0.0)
    body, rotors, dt_s, thrust_n = make_body(), Rotors(columns(1, 4)), 0.001, 2.0
    command = np.zeros((1, 4), np.float32)
    command[0, rotor] = thrust_n
    fly(body, rotors, command, dt_s, parameters)
    spin = np.zeros(3)
    spin[axis] = sign * dt_s * parameters.arm_m * thrust_n / parameters.inertia_xx_kg_m2
    yaw = +1 if rotor in (0, 2) else -1
    spin[2] = yaw * dt_s * parameters.yaw_moment_m * thrust_n / parameters.inertia_zz_kg_m2
    assert body.spin[0] == pytest.approx(spin, rel=1e-5)


@pytest.mark.parametrize(
    ("order", "mirror", "yaw_moment_m"),
    [
        ([0, 3, 2, 1], (1, -1, 1), 0.0),  # a mirror image turns its blades the other way: without their moment
        ([2, 1, 0, 3], (-1, 1, 1), 0.0),
        ([2, 3, 0, 1], (-1, -1, 1), 0.0245),
    ],
    ids=["left-right", "front-back", "half-turn"],
)
def test_exchanged_rotors_fly_the_mirrored_path(order: list[int], mirror: tuple[int, ...], yaw_moment_m: float) -> None:
    command = np.array((1.2, 1.3, 1.1, 1.4), np.float32)
    body, rotors = make_body(2), Rotors(columns(2, 4))
    parameters = DroneParameters(yaw_moment_m=yaw_moment_m)
    fly_for(body, rotors, [command, command[order]], 0.5, 0.005, parameters)
    assert np.abs(body.spin[0, :2]).min() > 0.5
    axial = np.prod(mirror) * np.array(mirror)  # spin is a pseudovector
    np.testing.assert_allclose(body.position[1], body.position[0] * mirror, atol=1e-5)
    np.testing.assert_allclose(body.velocity[1], body.velocity[0] * mirror, atol=1e-5)
    np.testing.assert_allclose(body.spin[1], body.spin[0] * axial, atol=1e-5)


def test_attitude_stays_a_unit_quaternion() -> None:
    rng = np.random.default_rng(5)
    body, rotors = make_body(32, spin=rng.normal(0, 20, (32, 3))), Rotors(columns(32, 4))
    for _ in range(1000):
        fly(body, rotors, rng.uniform(0, 2.5, (32, 4)).astype(np.float32), 0.005, MELLINGER)
        size = np.linalg.norm(body.attitude.astype(np.float64), axis=1)
        assert size == pytest.approx(1.0, abs=4 * ROUNDING)


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_rotor_lag_is_exact_for_any_step(steps: int) -> None:
    body, rotors, seconds = make_body(), Rotors(columns(1, 4)), 0.04
    start, command = np.array((0.0, 1.0, 2.0, 3.0)), np.array((3.0, 1.0, 0.0, 1.0))
    rotors.thrust[:] = start
    fly_for(body, rotors, command, seconds, seconds / steps, MELLINGER)
    expected = command + (start - command) * np.exp(-seconds / MELLINGER.rotor_lag_s)
    assert rotors.thrust[0] == pytest.approx(expected, abs=steps * ROUNDING * 3)


def test_rotors_without_lag_obey_at_once() -> None:
    body, rotors = make_body(), Rotors(columns(1, 4))
    fly_for(body, rotors, (1.0, 2.0, 3.0, 4.0), 0.005, 0.005, DroneParameters(rotor_lag_s=0.0))
    np.testing.assert_array_equal(rotors.thrust[0], (1.0, 2.0, 3.0, 4.0))


# Actions


@pytest.mark.parametrize(
    ("action", "rotor_max_n", "thrust_n"),
    [
        (-1.0, 10.0, 0.0),
        (0.0, 10.0, 0.5 * GRAVITY_M_S2 / 4),
        (1.0, 10.0, 2 * 0.5 * GRAVITY_M_S2 / 4),
        (1.0, 1.5, 1.5),
    ],
    ids=["off", "hover", "twice-the-weight", "limited-by-the-rotor"],
)
def test_action_is_thrust_from_none_to_the_declared_ratio(action: float, rotor_max_n: float, thrust_n: float) -> None:
    world, environment, rows = make_environment(1, DroneParameters(rotor_lag_s=0.0, rotor_max_n=rotor_max_n))
    with closing(environment):
        environment.reset((0,), rows.observation)
        environment.step(np.full((1, 4), action, np.float32), rows)
    assert world.rotors.thrust[0] == pytest.approx(thrust_n, rel=1e-6)


def test_substeps_refine_a_control_step_and_do_not_lengthen_it() -> None:
    heights = []
    for substeps in (4, 400):
        world, environment, rows = make_environment(1, DroneParameters(substeps=substeps, drag_n_s_m=0.0))
        with closing(environment):
            environment.reset((0,), rows.observation)
            place(world, position=(0.0, 0.0, 5.0))
            world.rotors.thrust[:] = 0.0
            for _ in range(25):
                environment.step(np.full((1, 4), -1.0, np.float32), rows)
        heights.append(world.body.position[0, 2])
    assert heights == pytest.approx([5.0 - GRAVITY_M_S2 * 0.5**2 / 2] * 2, abs=GRAVITY_M_S2 * 0.5 * 0.005)


# Task


class SeenWorld(DroneWorld):
    """Remembers where every drone and target was when a step was judged."""

    def __init__(self, slots: int, parameters: DroneParameters) -> None:
        super().__init__(slots, parameters)
        self.seen: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        if isinstance(rows, slice):
            self.seen.append((self.body.position.copy(), self.task.target.copy()))
        super().observe(rows)


def make_environment(
    slots: int, parameters: DroneParameters = MELLINGER, *, stagger: bool = False, **changes: object
) -> tuple[SeenWorld, ColumnEnvironment, StepRows]:
    """An environment of drones; ``changes`` are to its spec."""
    world = SeenWorld(slots, parameters)
    spec = msgspec.structs.replace(describe_world("drone", world, slots, parameters), **changes)
    return world, ColumnEnvironment(world, spec, stagger=stagger), allocate_rows(spec)


def place(world: DroneWorld, **state: object) -> None:
    """Put every drone level, at rest and hovering, but for what ``state`` says."""
    rest = {"velocity": 0.0, "spin": 0.0, "attitude": LEVEL}
    for name, value in {**rest, **state}.items():
        getattr(world.body, name)[:] = value
    world.rotors.thrust[:] = world.body.position.dtype.type(0.5 * GRAVITY_M_S2 / 4)


def assert_spread(values: NDArray[np.floating], low: float, high: float) -> None:
    """All within the range, and reaching within a twentieth of both its ends."""
    edge = (high - low) / 20
    assert low <= values.min() < low + edge
    assert high - edge < values.max() <= high


def test_starts_and_targets_are_drawn_from_the_documented_ranges() -> None:
    world, environment, rows = make_environment(2048)
    with closing(environment):
        environment.reset((1, 2, 3), rows.observation)
        x, y, z = world.body.position.T
        assert_spread(z, 1.0, 8.0)
        assert_spread(np.hypot(x, y), 0.0, 2.0)
        assert_spread(world.task.target[:, 0], -10.0, 10.0)
        assert_spread(world.task.target[:, 1], -10.0, 10.0)
        assert_spread(world.task.target[:, 2], 3.0, 8.0)
        assert_spread(np.arctan2(y, x), -np.pi, np.pi)


def test_episodes_after_the_first_start_in_the_same_ranges() -> None:
    world, environment, rows = make_environment(256)
    with closing(environment):
        environment.reset((0,), rows.observation)
        first = world.task.target.copy()
        place(world, position=(0.0, 0.0, -1.0))
        step = environment.step(np.zeros((256, 4), np.float32), rows)
        assert step.episodes is not None
        assert len(step.episodes.slot) == 256
        x, y, z = world.body.position.T
        assert z.min() >= 1.0
        assert z.max() <= 8.0
        assert np.hypot(x, y).max() <= 2.0
        assert np.abs(world.task.target[:, :2]).max() <= 10.0
        assert world.task.target[:, 2].min() >= 3.0
        assert world.task.target[:, 2].max() <= 8.0
        assert (world.task.target != first).all()


def test_the_ground_and_the_bounds_terminate_and_count_as_a_crash() -> None:
    positions = [(1.0, 2.0, -0.01), (1.0, 2.0, 0.05), (0.0, 30.01, 1.0), (0.0, 29.9, 1.0), (0.0, 0.0, 30.1)]
    world, environment, rows = make_environment(5)
    with closing(environment):
        environment.reset((0,), rows.observation)
        place(world, position=positions)
        step = environment.step(np.zeros((5, 4), np.float32), rows)
    np.testing.assert_array_equal(rows.terminated, [True, False, True, False, True])
    assert not rows.truncated.any()
    assert step.episodes is not None
    np.testing.assert_array_equal(step.episodes.metrics["crash"], 1.0)
    np.testing.assert_array_equal(step.episodes.metrics["success"], 0.0)


def test_bounds_follow_their_parameter() -> None:
    world, environment, rows = make_environment(1, DroneParameters(bounds_m=12.0))
    with closing(environment):
        environment.reset((0,), rows.observation)
        place(world, position=(0.0, 12.1, 1.0))
        environment.step(np.zeros((1, 4), np.float32), rows)
    assert rows.terminated.all()


def test_an_episode_is_truncated_after_a_thousand_steps() -> None:
    world, environment, rows = make_environment(2)
    with closing(environment):
        environment.reset((0,), rows.observation)
        for step in range(1, 1001):
            place(world, position=(0.0, 0.0, 5.0))
            outcome = environment.step(np.zeros((2, 4), np.float32), rows)
            assert (outcome.episodes is not None) == (step == 1000)
        assert rows.truncated.all()
        assert not rows.terminated.any()
        assert outcome.episodes is not None
        np.testing.assert_array_equal(outcome.episodes.length, 1000)


@pytest.mark.parametrize(
    ("steps", "far_at", "success"),
    [(50, 0, True), (49, 0, False), (50, 1, False), (51, 1, True), (60, 30, False)],
)
def test_success_is_a_whole_last_second_near_the_target(steps: int, far_at: int, success: bool) -> None:
    """In each of two episodes, so that the nearness of the first does not count for the second."""
    world, environment, rows = make_environment(1, max_episode_steps=steps)
    with closing(environment):
        environment.reset((0,), rows.observation)
        for step in [*range(1, steps + 1)] * 2:
            away = (0.0, 0.51 if step == far_at else 0.49, 0.0)
            place(world, position=np.add(world.task.target, away))
            outcome = environment.step(np.zeros((1, 4), np.float32), rows)
            if outcome.episodes is not None:
                assert outcome.episodes.metrics["success"].tolist() == [success]
                assert step == steps


def literal_metrics(path: NDArray[np.float32], target: NDArray[np.float32], *, crashed: bool) -> dict[str, float]:
    """The metrics of one episode as the words say it. path: `[steps, 3]` m, after each step."""
    distance = [float(np.linalg.norm(point.astype(np.float64) - target)) for point in path]
    near = [step for step, d in enumerate(distance, 1) if d < 0.5]
    last_second = distance[-50:]
    return {
        "crash": float(crashed),
        "success": float(not crashed and len(distance) >= 50 and max(last_second) < 0.5),
        "final_distance": sum(last_second) / len(last_second),
        "time_to_target": near[0] * 0.02 if near else float("nan"),
    }


def test_episode_metrics_equal_a_slow_literal_recomputation() -> None:
    """Drones are carried along random paths around their targets, so that every kind of ending occurs."""
    slots, steps = 48, 1300
    rng = np.random.default_rng(11)
    world, environment, rows = make_environment(slots, stagger=True)
    amplitude = np.where(rng.random(slots) < 0.3, 0.4, rng.uniform(0.4, 4.0, slots))
    phase, rate = rng.uniform(0, np.pi, slots), rng.uniform(0.001, 0.02, slots)
    bearing = rng.normal(size=(slots, 3)) * (1.0, 1.0, 0.2)
    bearing /= np.linalg.norm(bearing, axis=1, keepdims=True)
    paths: list[list[NDArray[np.float32]]] = [[] for _ in range(slots)]
    results: list[dict[str, float]] = []
    with closing(environment):
        environment.reset((4,), rows.observation)
        for step in range(steps):
            distance = amplitude * np.abs(np.cos(phase + rate * step))
            position = world.task.target + bearing * distance[:, None]
            position[rng.random(slots) < 0.002, 2] = -1.0
            place(world, position=position)
            outcome = environment.step(rng.uniform(-0.2, 0.2, (slots, 4)).astype(np.float32), rows)
            seen, target = world.seen[-1]
            for slot in range(slots):
                paths[slot].append(seen[slot])
            check_episodes(outcome, rows, paths, target, results)
    count = {name: sum(result[name] for result in results) for name in ("success", "crash")}
    assert count["success"] > 5
    assert count["crash"] > 5
    assert any(result["length"] < 50 for result in results)
    assert any(np.isnan(result["time_to_target"]) for result in results)
    assert any(not result["success"] and not result["crash"] and result["time_to_target"] > 0 for result in results)


def check_episodes(
    outcome: TimeStep,
    rows: StepRows,
    paths: list[list[NDArray[np.float32]]],
    target: NDArray[np.float32],
    results: list[dict[str, float]],
) -> None:
    if outcome.episodes is None:
        return
    for index, slot in enumerate(outcome.episodes.slot):
        expected = literal_metrics(np.array(paths[slot]), target[slot], crashed=bool(rows.terminated[slot]))
        got = {name: float(values[index]) for name, values in outcome.episodes.metrics.items()}
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)
        assert outcome.episodes.length[index] == len(paths[slot])
        results.append({**expected, "length": len(paths[slot])})
        paths[slot].clear()


# Observation


def scatter(world: DroneWorld, rng: np.random.Generator) -> None:
    """Random states, far from those that episodes start in."""
    count = len(world.task.distance)
    world.body.position[:] = rng.uniform((-9, -9, 1), (9, 9, 12), (count, 3))
    world.body.velocity[:] = rng.normal(0, 3, (count, 3))
    world.body.spin[:] = rng.normal(0, 5, (count, 3))
    world.body.attitude[:] = Rotation.random(count, rng=rng).as_quat()[:, [3, 0, 1, 2]]
    world.rotors.thrust[:] = rng.uniform(0, 2.5, (count, 4))
    world.task.target[:] = rng.uniform((-9, -9, 3), (9, 9, 8), (count, 3))


def literal_observation(world: DroneWorld, row: int) -> NDArray[np.float64]:
    to_body = to_world(world.body.attitude[row]).inv()
    error = (world.task.target[row] - world.body.position[row]).astype(np.float64)
    hover_n = 0.5 * GRAVITY_M_S2 / 4
    return np.concatenate(
        [
            to_body.apply(error) / 10,
            to_body.apply(error) / (0.5 + np.linalg.norm(error)),
            to_body.apply(world.body.velocity[row].astype(np.float64)) / 3,
            to_body.apply((0.0, 0.0, 1.0)),
            world.body.spin[row] / 5,
            world.rotors.thrust[row] / hover_n - 1,
            [world.body.position[row, 2] / 5],
        ]
    )


def test_observation_columns_are_as_documented() -> None:
    world, environment, rows = make_environment(64)
    with closing(environment):
        environment.reset((0,), rows.observation)
        scatter(world, np.random.default_rng(8))
        world.observe(slice(None))
    expected = [literal_observation(world, row) for row in range(64)]
    np.testing.assert_allclose(rows.observation["main"], expected, atol=2e-6)


def test_observing_some_rows_writes_those_rows_alone() -> None:
    world, environment, rows = make_environment(8)
    with closing(environment):
        environment.reset((0,), rows.observation)
        before = rows.observation["main"].copy()
        scatter(world, np.random.default_rng(8))
        world.observe(np.array([1, 6]))
    changed = (rows.observation["main"] != before).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [1, 6])
    np.testing.assert_allclose(rows.observation["main"][6], literal_observation(world, 6), atol=2e-6)


def test_turning_the_whole_scene_about_the_vertical_changes_no_observation() -> None:
    world, environment, rows = make_environment(64)
    with closing(environment):
        environment.reset((0,), rows.observation)
        scatter(world, np.random.default_rng(9))
        world.observe(slice(None))
        before = rows.observation["main"].copy()
        turn = Rotation.from_euler("z", np.random.default_rng(1).uniform(-np.pi, np.pi, (64, 1)))
        for vectors in (world.body.position, world.body.velocity, world.task.target):
            vectors[:] = turn.apply(vectors)
        world.body.attitude[:] = (turn * to_world(world.body.attitude)).as_quat()[:, [3, 0, 1, 2]]
        world.observe(slice(None))
    np.testing.assert_allclose(rows.observation["main"], before, atol=5e-6)


def test_same_seed_same_flight() -> None:
    flights = []
    for _ in range(2):
        world, environment, rows = make_environment(16)
        rng = np.random.default_rng(2)
        with closing(environment):
            environment.reset((7, 1, 0), rows.observation)
            for _ in range(120):  # long enough for crashes and the episodes after them
                environment.step(rng.uniform(-1, 0, (16, 4)).astype(np.float32), rows)
        flights.append([getattr(world.body, field.name).copy() for field in fields(Body)] + [rows.observation["main"]])
    for one, other in zip(*flights, strict=True):
        np.testing.assert_array_equal(one, other)
