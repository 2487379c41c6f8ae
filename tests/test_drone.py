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

from rustyrl_actors.catalog import find_environment
from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import StepRows, TimeStep, allocate_rows
from rustyrl_actors.world import describe_world
from rustyrl_actors.worlds.drone import STEP_S, DroneParameters, DroneWorld, airframe_of
from rustyrl_actors.worlds.gusts import blow
from rustyrl_actors.worlds.quadrotor import GRAVITY_M_S2, Airframe, Body, Rotors, Wind, build_airframe, columns, fly

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
    body: Body,
    rotors: Rotors,
    command_n: object,
    seconds: float,
    dt_s: float,
    parameters: DroneParameters,
    wind: Wind | None = None,
) -> None:
    command = np.broadcast_to(np.asarray(command_n, np.float32), rotors.thrust.shape)
    airframe = airframe_of(parameters, dt_s)
    for _ in range(round(seconds / dt_s)):
        fly(body, rotors, airframe, command, wind)


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
    fly(body, rotors, airframe_of(parameters, dt_s), command)
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
        fly(body, rotors, airframe_of(MELLINGER, 0.005), rng.uniform(0, 2.5, (32, 4)).astype(np.float32))
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


def fly_one(state: dict[str, list[np.float32]], command: list[np.float32], dt_s: float, p: DroneParameters) -> None:
    """One drone, number by number: what `fly` must equal to the last bit, whatever it is split into."""
    f = np.float32
    gain = f(-np.expm1(-dt_s / p.rotor_lag_s))
    thrust = state["thrust"] = [now + gain * (told - now) for now, told in zip(state["thrust"], command, strict=True)]
    front, left, back, right = thrust
    (w, x, y, z), (vx, vy, vz) = state["attitude"], state["velocity"]
    lift = (front + back + left + right) * f(1.0 / p.mass_kg) * f(dt_s)
    kept = f(1.0 - dt_s * p.drag_n_s_m / p.mass_kg)
    vx = vx * kept + 2 * (x * z + w * y) * lift
    vy = vy * kept + 2 * (y * z - w * x) * lift
    vz = vz * kept + (1 - 2 * (x * x + y * y)) * lift - f(dt_s * GRAVITY_M_S2)
    state["velocity"] = [vx, vy, vz]
    state["position"] = [at + f(dt_s) * v for at, v in zip(state["position"], (vx, vy, vz), strict=True)]
    ixx, iyy, izz, (sx, sy, sz) = p.inertia_xx_kg_m2, p.inertia_yy_kg_m2, p.inertia_zz_kg_m2, state["spin"]
    sx = sx + (f(dt_s * p.arm_m / ixx) * (left - right) + f(dt_s * (iyy - izz) / ixx) * (sy * sz))
    sy = sy + (f(dt_s * p.arm_m / iyy) * (back - front) + f(dt_s * (izz - ixx) / iyy) * (sz * sx))
    sz = sz + f(dt_s * p.yaw_moment_m / izz) * (front - left + back - right)
    if ixx != iyy:
        sz = sz + f(dt_s * (ixx - iyy) / izz) * (sx * sy)
    state["spin"] = [sx, sy, sz]
    a, b, c = (f(0.5 * dt_s) * spin for spin in (sx, sy, sz))
    turned = [
        w - x * a - y * b - z * c,
        x + w * a + y * c - z * b,
        y + w * b + z * a - x * c,
        z + w * c + x * b - y * a,
    ]
    squares = [part * part for part in turned]
    scale = 1 / np.sqrt(squares[0] + squares[1] + squares[2] + squares[3])
    state["attitude"] = [part * scale for part in turned]


@pytest.mark.parametrize("inertia_yy", [0.0023, 0.0031], ids=["mellinger", "uneven"])
def test_calm_flight_is_the_arithmetic_of_single_numbers_to_the_last_bit(inertia_yy: float) -> None:
    parameters = DroneParameters(inertia_yy_kg_m2=inertia_yy)
    rng, count, dt_s = np.random.default_rng(6), 5, 0.005
    body, rotors = scattered(count, rng)
    names = ("position", "velocity", "attitude", "spin")
    states = [{name: list(getattr(body, name)[row]) for name in names} for row in range(count)]
    for row, state in enumerate(states):
        state["thrust"] = list(rotors.thrust[row])
    airframe = airframe_of(parameters, dt_s)
    for _ in range(200):
        command = rng.uniform(0, 2.5, (count, 4)).astype(np.float32)
        fly(body, rotors, airframe, command)
        for row, state in enumerate(states):
            fly_one(state, list(command[row]), dt_s, parameters)
    for row, state in enumerate(states):
        for name in names:
            assert getattr(body, name)[row].tobytes() == np.array(state[name]).tobytes(), name
        assert rotors.thrust[row].tobytes() == np.array(state["thrust"]).tobytes()


# Airframes of their own


def scattered(count: int, rng: np.random.Generator) -> tuple[Body, Rotors]:
    attitude = rng.normal(size=(count, 4))
    body = make_body(
        count,
        position=rng.normal(size=(count, 3)),
        velocity=rng.normal(size=(count, 3)),
        attitude=attitude / np.linalg.norm(attitude, axis=1, keepdims=True),
        spin=rng.normal(size=(count, 3)),
    )
    rotors = Rotors(columns(count, 4))
    rotors.thrust[:] = rng.uniform(0, 2.5, (count, 4))
    return body, rotors


def rows_equal(one: tuple[Body, Rotors], row: int, other: tuple[Body, Rotors], other_row: int) -> bool:
    pairs = [(getattr(one[0], f.name), getattr(other[0], f.name)) for f in fields(Body)]
    pairs.append((one[1].thrust, other[1].thrust))
    return all((mine[row] == theirs[other_row]).all() for mine, theirs in pairs)


@pytest.mark.parametrize("rotor_lag_s", [0.03, 0.0])
def test_a_row_flies_as_the_world_whose_parameters_are_that_rows(rotor_lag_s: float) -> None:
    count, dt_s = 6, 0.005
    factor = np.random.default_rng(1).uniform(0.8, 1.2, (6, count))
    factor[:, 0] = 1.0
    nominal = DroneParameters(rotor_lag_s=rotor_lag_s)
    rows, row_airframe = scattered(count, np.random.default_rng(2)), airframe_of(nominal, dt_s, factor)
    p = nominal
    for row, (mass, ixx, iyy, izz, gain, lag) in enumerate(factor.T):
        alone = scattered(count, np.random.default_rng(2))
        airframe = build_airframe(
            dt_s,
            mass_kg=p.mass_kg * mass,
            inertia_kg_m2=(p.inertia_xx_kg_m2 * ixx, p.inertia_yy_kg_m2 * iyy, p.inertia_zz_kg_m2 * izz),
            arm_m=p.arm_m,
            yaw_moment_m=p.yaw_moment_m,
            drag_n_s_m=p.drag_n_s_m,
            rotor_lag_s=p.rotor_lag_s * lag,
            rotor_gain=gain,
        )
        rng = np.random.default_rng(3)
        for _ in range(100):
            told = rng.uniform(0, 2.5, (count, 4)).astype(np.float32)
            fly(*alone, airframe, told * airframe.rotor_gain)
            if row == 0:
                fly(*rows, row_airframe, told * row_airframe.rotor_gain)
        assert rows_equal(rows, row, alone, row)


def test_a_drawn_mass_flies_as_a_world_with_that_mass() -> None:
    """Through the environment; the limit of the rotors makes the commands in N the same for both."""
    masses, limits = (0.5, 0.43, 0.59), {"thrust_to_weight": 4.0, "rotor_max_n": 2.0, "substeps": 5}
    varied, environment, rows = make_environment(3, DroneParameters(variation=0.2, **limits))
    factor = np.ones((6, 3))
    factor[0] = np.divide(masses, 0.5)
    rng = np.random.default_rng(4)
    actions = rng.uniform(-0.1, 0.4, (60, 3, 4)).astype(np.float32)
    body, rotors = scattered(3, rng)
    body.position[:, 2] += 20.0

    def flown(world: DroneWorld, environment: ColumnEnvironment, rows: StepRows) -> tuple[Body, Rotors]:
        environment.reset((0,), rows)
        if world is varied:
            world.airframe.put(np.arange(3), airframe_of(DroneParameters(**limits), STEP_S / 5, factor))
        for field in fields(Body):
            getattr(world.body, field.name)[:] = getattr(body, field.name)
        world.rotors.thrust[:] = rotors.thrust
        for action in actions:
            environment.step({"main": action}, rows)
        return world.body, world.rotors

    with closing(environment):
        together = flown(varied, environment, rows)
    for row, mass in enumerate(masses):
        world, environment, rows = make_environment(3, DroneParameters(mass_kg=mass, **limits))
        with closing(environment):
            assert rows_equal(together, row, flown(world, environment, rows), row)


def drawn_factors(airframe: Airframe, p: DroneParameters, dt_s: float) -> NDArray[np.float64]:
    """What was drawn, from the coefficients that it became: `[6, E]`."""
    found = (
        1 / (airframe.inverse_mass * p.mass_kg),
        dt_s * p.arm_m / (airframe.roll * p.inertia_xx_kg_m2),
        dt_s * p.arm_m / (airframe.pitch * p.inertia_yy_kg_m2),
        dt_s * p.yaw_moment_m / (airframe.yaw * p.inertia_zz_kg_m2),
        airframe.rotor_gain[:, 0],
        -dt_s / np.log1p(-airframe.rotor_share[:, 0]) / p.rotor_lag_s,
    )
    return np.array(found, np.float64)


def test_airframes_are_drawn_for_every_episode_within_the_variation_each_number_by_itself() -> None:
    parameters = DroneParameters(variation=0.2)
    world, environment, rows = make_environment(2048, parameters)
    with closing(environment):
        environment.reset((1,), rows)
        first = drawn_factors(world.airframe, parameters, STEP_S / 4)
        place(world, position=(0.0, 0.0, -1.0))
        environment.step({"main": np.zeros((2048, 4), np.float32)}, rows)
        second = drawn_factors(world.airframe, parameters, STEP_S / 4)
    for drawn in (first, second):
        for factor in drawn:
            assert_spread(factor, 0.8 - 1e-5, 1.2 + 1e-5)
    assert (first != second).all()
    assert np.abs(np.corrcoef([*first, *second]) - np.eye(12)).max() < 0.1


# Wind


def test_drag_is_of_the_velocity_through_the_air() -> None:
    """In a steady wind everything happens as in calm air, seen from a balloon."""
    drifting, calm = scattered(8, np.random.default_rng(7)), scattered(8, np.random.default_rng(7))
    wind = Wind(columns(8, 3))
    wind.velocity[:] = np.random.default_rng(8).normal(0, 3, (8, 3))
    drifting[0].velocity[:] += wind.velocity
    start = drifting[0].position.copy()
    parameters = DroneParameters(drag_n_s_m=0.5)
    fly_for(*drifting, 1.3, 2.0, 0.005, parameters, wind)
    fly_for(*calm, 1.3, 2.0, 0.005, parameters)
    np.testing.assert_allclose(drifting[0].velocity - wind.velocity, calm[0].velocity, atol=1e-3)
    np.testing.assert_allclose(drifting[0].position - 2 * wind.velocity, calm[0].position, atol=1e-2)
    assert np.abs(drifting[0].position - start).max() > 1


def test_no_wind_is_calm_air() -> None:
    one, other = scattered(8, np.random.default_rng(7)), scattered(8, np.random.default_rng(7))
    fly_for(*one, 1.3, 0.5, 0.005, MELLINGER, Wind(columns(8, 3)))
    fly_for(*other, 1.3, 0.5, 0.005, MELLINGER)
    assert all(rows_equal(one, row, other, row) for row in range(8))


def wind_over(world: DroneWorld, seconds: float) -> NDArray[np.float32]:
    """`[steps, E, 3]` m/s, of an episode from its beginning."""
    found = []
    for step in range(round(seconds / STEP_S)):
        world.gusts.age_s[:] = step * STEP_S
        blow(world.gusts, world.wind)
        found.append(world.wind.velocity.copy())
    return np.array(found)


def test_the_wind_comes_near_its_largest_speed_and_never_exceeds_it() -> None:
    world, environment, rows = make_environment(512, DroneParameters(gust_m_s=5.0))
    with closing(environment):
        environment.reset((3,), rows)
        wind = wind_over(world, 20.0)
    speed = np.linalg.norm(wind.astype(np.float64), axis=2)
    assert 4.99 < speed.max() <= 5.0
    assert np.median(speed.max(axis=0)) > 3.5
    assert np.abs(wind.mean(axis=(0, 1))).max() < 0.3  # from everywhere


def test_gusts_lose_their_memory_as_drydens_do() -> None:
    world, environment, rows = make_environment(4096, DroneParameters(gust_m_s=5.0))
    with closing(environment):
        environment.reset((3,), rows)
        gust = wind_over(world, 2.0) - world.gusts.steady
    for lag_s in (0.5, 1.0):
        steps = round(lag_s / STEP_S)
        correlation = (gust[:-steps] * gust[steps:]).sum() / (gust[:-steps] ** 2).sum()
        assert correlation == pytest.approx(np.exp(-lag_s * 5.0 / 5.0), abs=0.06)  # a twentieth of the power is cut


def test_the_wind_blows_on_from_step_to_step_and_anew_in_a_new_episode() -> None:
    world, environment, rows = make_environment(4, DroneParameters(gust_m_s=5.0))
    with closing(environment):
        environment.reset((3,), rows)
        expected = wind_over(world, 1.0)
        world.gusts.age_s[:] = 0.0
        for step in range(50):
            place(world, position=(0.0, 0.0, 5.0))
            environment.step({"main": np.zeros((4, 4), np.float32)}, rows)
            pushed = STEP_S * 0.1 / 0.5 * expected[step]  # drag over mass, within this very step
            np.testing.assert_allclose(world.body.velocity, pushed, atol=3e-4)
            np.testing.assert_allclose(world.wind.velocity, expected[step], atol=1e-3)
        before = world.gusts.steady.copy()
        place(world, position=[(0.0, 0.0, -1.0), *[(0.0, 0.0, 5.0)] * 3])
        environment.step({"main": np.zeros((4, 4), np.float32)}, rows)
    assert np.ptp(expected, axis=0).max() > 0.5
    assert world.gusts.age_s.tolist() == pytest.approx([0.0, 1.02, 1.02, 1.02])
    np.testing.assert_array_equal((world.gusts.steady != before).any(axis=1), [True, False, False, False])


def test_wind_and_airframe_depend_on_the_seed_of_their_slot_alone() -> None:
    """The neighbors of one flight crash at other times and there are more of them."""
    parameters = DroneParameters(variation=0.2, gust_m_s=5.0)
    flights = []
    for slots, crash_at in ((4, ()), (4, (30, 90)), (9, (50,))):
        world, environment, rows = make_environment(slots, parameters)
        rng, flight = np.random.default_rng(2), []
        with closing(environment):
            environment.reset((7, 1), rows)
            for step in range(150):
                if step in crash_at:
                    world.body.position[np.arange(slots) != 2, 2] = -1.0
                if step == 70:
                    world.body.position[2, 2] = -1.0  # into its second episode
                action = np.broadcast_to(rng.uniform(-0.1, 0.1, 4), (slots, 4)).astype(np.float32)
                environment.step({"main": action}, rows)
                parts = (world.wind.velocity, world.body.position, world.task.target, world.airframe.rotor_gain)
                flight.append(np.concatenate([part[2] for part in parts]))
        flights.append(np.array(flight))
    np.testing.assert_array_equal(flights[0], flights[1])
    np.testing.assert_array_equal(flights[0], flights[2])
    assert not np.array_equal(flights[0][60, :3], flights[0][130, :3])


def test_drone_is_calm_and_nominal_and_drone_windy_is_not() -> None:
    calm, windy = (find_environment(name, {}).spec for name in ("drone", "drone-windy"))
    assert (calm.parameters["variation"], calm.parameters["gust_m_s"]) == (0.0, 0.0)
    assert (windy.parameters["variation"], windy.parameters["gust_m_s"]) == (0.2, 5.0)
    assert (calm.observation, calm.action) == (windy.observation, windy.action)
    assert calm.goal[0] == "success_rate>=0.995"
    assert windy.goal[0] == "success_rate>=0.98"


def test_disturbances_do_not_change_what_an_undisturbed_drone_draws() -> None:
    starts = []
    for parameters in (MELLINGER, DroneParameters(variation=0.2, gust_m_s=5.0)):
        world, environment, rows = make_environment(16, parameters)
        with closing(environment):
            environment.reset((5,), rows)
            starts.append((rows.observation["main"].copy(), world.task.target.copy()))
    np.testing.assert_array_equal(starts[0][0], starts[1][0])  # nothing of the airframe or the wind is seen
    np.testing.assert_array_equal(starts[0][1], starts[1][1])


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
        environment.reset((0,), rows)
        environment.step({"main": np.full((1, 4), action, np.float32)}, rows)
    assert world.rotors.thrust[0] == pytest.approx(thrust_n, rel=1e-6)


def test_effort_is_one_for_hovering_and_four_for_twice_that_thrust() -> None:
    world, environment, rows = make_environment(3, max_episode_steps=4)
    action = np.repeat(np.array([[-1.0], [0.0], [1.0]], np.float32), 4, axis=1)
    with closing(environment):
        environment.reset((0,), rows)
        for _ in range(8):  # two episodes
            place(world, position=(0.0, 0.0, 5.0))
            outcome = environment.step({"main": action}, rows)
    assert outcome.episodes is not None
    assert outcome.episodes.metrics["effort"] == pytest.approx([0.0, 1.0, 4.0], rel=1e-6)


def test_substeps_refine_a_control_step_and_do_not_lengthen_it() -> None:
    heights = []
    for substeps in (4, 400):
        world, environment, rows = make_environment(1, DroneParameters(substeps=substeps, drag_n_s_m=0.0))
        with closing(environment):
            environment.reset((0,), rows)
            place(world, position=(0.0, 0.0, 5.0))
            world.rotors.thrust[:] = 0.0
            for _ in range(25):
                environment.step({"main": np.full((1, 4), -1.0, np.float32)}, rows)
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
    spec = msgspec.structs.replace(describe_world("drone", world.info, slots, parameters, {}), **changes)
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
        environment.reset((1, 2, 3), rows)
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
        environment.reset((0,), rows)
        first = world.task.target.copy()
        place(world, position=(0.0, 0.0, -1.0))
        step = environment.step({"main": np.zeros((256, 4), np.float32)}, rows)
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
        environment.reset((0,), rows)
        place(world, position=positions)
        step = environment.step({"main": np.zeros((5, 4), np.float32)}, rows)
    np.testing.assert_array_equal(rows.terminated, [True, False, True, False, True])
    assert not rows.truncated.any()
    assert step.episodes is not None
    np.testing.assert_array_equal(step.episodes.metrics["crash"], 1.0)
    np.testing.assert_array_equal(step.episodes.metrics["success"], 0.0)


def test_bounds_follow_their_parameter() -> None:
    world, environment, rows = make_environment(1, DroneParameters(bounds_m=12.0))
    with closing(environment):
        environment.reset((0,), rows)
        place(world, position=(0.0, 12.1, 1.0))
        environment.step({"main": np.zeros((1, 4), np.float32)}, rows)
    assert rows.terminated.all()


def test_an_episode_is_truncated_after_a_thousand_steps() -> None:
    world, environment, rows = make_environment(2)
    with closing(environment):
        environment.reset((0,), rows)
        for step in range(1, 1001):
            place(world, position=(0.0, 0.0, 5.0))
            outcome = environment.step({"main": np.zeros((2, 4), np.float32)}, rows)
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
        environment.reset((0,), rows)
        for step in [*range(1, steps + 1)] * 2:
            away = (0.0, 0.51 if step == far_at else 0.49, 0.0)
            place(world, position=np.add(world.task.target, away))
            outcome = environment.step({"main": np.zeros((1, 4), np.float32)}, rows)
            if outcome.episodes is not None:
                assert outcome.episodes.metrics["success"].tolist() == [success]
                assert step == steps


def literal_metrics(
    path: NDArray[np.float32], target: NDArray[np.float32], actions: list[NDArray[np.float32]], *, crashed: bool
) -> dict[str, float]:
    """The metrics of one episode as the words say it. path: `[steps, 3]` m, after each step."""
    distance = [float(np.linalg.norm(point.astype(np.float64) - target)) for point in path]
    near = [step for step, d in enumerate(distance, 1) if d < 0.5]
    last_second = distance[-50:]
    return {
        "crash": float(crashed),
        "success": float(not crashed and len(distance) >= 50 and max(last_second) < 0.5),
        "final_distance": sum(last_second) / len(last_second),
        "time_to_target": near[0] * 0.02 if near else float("nan"),
        "effort": float(np.mean([np.mean((action.astype(np.float64) + 1) ** 2) for action in actions])),
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
    actions: list[list[NDArray[np.float32]]] = [[] for _ in range(slots)]
    results: list[dict[str, float]] = []
    with closing(environment):
        environment.reset((4,), rows)
        for step in range(steps):
            distance = amplitude * np.abs(np.cos(phase + rate * step))
            position = world.task.target + bearing * distance[:, None]
            position[rng.random(slots) < 0.002, 2] = -1.0
            place(world, position=position)
            action = rng.uniform(-0.2, 0.2, (slots, 4)).astype(np.float32)
            outcome = environment.step({"main": action}, rows)
            seen, target = world.seen[-1]
            for slot in range(slots):
                paths[slot].append(seen[slot])
                actions[slot].append(action[slot])
            check_episodes(outcome, rows, paths, actions, target, results)
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
    actions: list[list[NDArray[np.float32]]],
    target: NDArray[np.float32],
    results: list[dict[str, float]],
) -> None:
    if outcome.episodes is None:
        return
    for index, slot in enumerate(outcome.episodes.slot):
        crashed = bool(rows.terminated[slot])
        expected = literal_metrics(np.array(paths[slot]), target[slot], actions[slot], crashed=crashed)
        got = {name: float(values[index]) for name, values in outcome.episodes.metrics.items()}
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)
        assert outcome.episodes.length[index] == len(paths[slot])
        results.append({**expected, "length": len(paths[slot])})
        paths[slot].clear()
        actions[slot].clear()


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
        environment.reset((0,), rows)
        scatter(world, np.random.default_rng(8))
        world.observe(slice(None))
    expected = [literal_observation(world, row) for row in range(64)]
    np.testing.assert_allclose(rows.observation["main"], expected, atol=2e-6)


def test_observing_some_rows_writes_those_rows_alone() -> None:
    world, environment, rows = make_environment(8)
    with closing(environment):
        environment.reset((0,), rows)
        before = rows.observation["main"].copy()
        scatter(world, np.random.default_rng(8))
        world.observe(np.array([1, 6]))
    changed = (rows.observation["main"] != before).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [1, 6])
    np.testing.assert_allclose(rows.observation["main"][6], literal_observation(world, 6), atol=2e-6)


def test_turning_the_whole_scene_about_the_vertical_changes_no_observation() -> None:
    world, environment, rows = make_environment(64)
    with closing(environment):
        environment.reset((0,), rows)
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
            environment.reset((7, 1, 0), rows)
            for _ in range(120):  # long enough for crashes and the episodes after them
                environment.step({"main": rng.uniform(-1, 0, (16, 4)).astype(np.float32)}, rows)
        flights.append([getattr(world.body, field.name).copy() for field in fields(Body)] + [rows.observation["main"]])
    for one, other in zip(*flights, strict=True):
        np.testing.assert_array_equal(one, other)
