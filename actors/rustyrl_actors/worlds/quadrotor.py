"""The physics of quadrotors: E rigid bodies with four rotors each, advanced together by a pure function.

The body is that of Mellinger, Michael and Kumar, 'Trajectory Generation and Control for Precise Aggressive
Maneuvers with Quadrotors' (2012): rotors in a plus on the body axes, each with a thrust and a yaw moment.
World axes have z up; the body's z axis is the thrust direction; SI units throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["GRAVITY_M_S2", "Airframe", "Body", "Rotors", "Wind", "build_airframe", "columns", "fly"]

Floats = NDArray[np.float32]
Coefficient = np.float32 | Floats

GRAVITY_M_S2 = 9.81


@dataclass(slots=True)
class Body:
    """E rigid bodies.

    position: `[E, 3]` m; velocity: `[E, 3]` m/s, world axes
    attitude: `[E, 4]` unit quaternion (w, x, y, z) from body to world axes
    spin: `[E, 3]` rad/s, body axes
    """

    position: Floats
    velocity: Floats
    attitude: Floats
    spin: Floats


@dataclass(slots=True)
class Rotors:
    """thrust: `[E, 4]` N, as it is now; rotors 0 and 2 on the body's x axis, 1 and 3 on y."""

    thrust: Floats


@dataclass(slots=True)
class Wind:
    """velocity: `[E, 3]` m/s of the air, world axes."""

    velocity: Floats


@dataclass(slots=True)
class Airframe:
    """What an airframe makes of a physics step of ``dt_s``: coefficients, each one number for all E or a row for each.

    dt_s, fall_m_s: length of the step, and what gravity adds in it to the speed downwards; one number in any case
    rotor_gain: thrust that a rotor settles at, over what it is told; `[E, 1]` as rows
    rotor_share: of the way to that thrust in a step; `[E, 1]` as rows
    inverse_mass: 1/kg; `[E]` as rows, like all that follow but ``kept`` and ``carried``
    kept, carried: share of its own velocity that a body keeps, and of the air's that it takes on; `[E, 1]` as rows
    roll, pitch, yaw: rad/s for a N of difference between rotors
    roll_coupling, pitch_coupling, yaw_coupling: s, of the spins about the other two axes (Euler's equations);
        ``yaw_coupling`` is None where the inertias about x and y are one number
    """

    dt_s: np.float32
    fall_m_s: np.float32
    rotor_gain: Coefficient
    rotor_share: Coefficient
    inverse_mass: Coefficient
    kept: Coefficient
    carried: Coefficient
    roll: Coefficient
    pitch: Coefficient
    yaw: Coefficient
    roll_coupling: Coefficient
    pitch_coupling: Coefficient
    yaw_coupling: Coefficient | None

    def put(self, rows: NDArray[np.intp], other: Airframe) -> None:
        """Overwrite these rows by the n rows of another of the same ``dt_s``."""
        for field in fields(self)[2:]:
            getattr(self, field.name)[rows] = getattr(other, field.name)


def build_airframe(
    dt_s: float,
    *,
    mass_kg: ArrayLike,
    inertia_kg_m2: tuple[ArrayLike, ArrayLike, ArrayLike],
    arm_m: float,
    yaw_moment_m: float,
    drag_n_s_m: float,
    rotor_lag_s: ArrayLike,
    rotor_gain: ArrayLike = 1.0,
) -> Airframe:
    """Coefficients for physics steps of ``dt_s``, worked out in float64.

    Args:
        dt_s: length of a physics step.
        mass_kg: a number or `[E]`, as are inertia, lag and gain: all of them numbers, or all `[E]`.
        inertia_kg_m2: about the body's x, y and z axes.
        arm_m: from the middle to a rotor.
        yaw_moment_m: moment of a rotor about its axis over its thrust.
        drag_n_s_m: force over speed through the air.
        rotor_lag_s: time constant of a rotor; 0 obeys at once.
        rotor_gain: thrust that a rotor settles at, over what it is told.
    """
    mass, lag = np.asarray(mass_kg, np.float64), np.asarray(rotor_lag_s, np.float64)
    ixx, iyy, izz = (np.asarray(inertia, np.float64) for inertia in inertia_kg_m2)
    with np.errstate(divide="ignore"):
        share = -np.expm1(-np.divide(dt_s, lag))  # exact for a constant command
    even = ixx.ndim == 0 and ixx == iyy
    return Airframe(
        dt_s=np.float32(dt_s),
        fall_m_s=np.float32(dt_s * GRAVITY_M_S2),
        rotor_gain=_column(np.asarray(rotor_gain, np.float64)),
        rotor_share=_column(share),
        inverse_mass=_row(1.0 / mass),
        kept=_column(1.0 - dt_s * drag_n_s_m / mass),
        carried=_column(dt_s * drag_n_s_m / mass),
        roll=_row(dt_s * arm_m / ixx),
        pitch=_row(dt_s * arm_m / iyy),
        yaw=_row(dt_s * yaw_moment_m / izz),
        roll_coupling=_row(dt_s * (iyy - izz) / ixx),
        pitch_coupling=_row(dt_s * (izz - ixx) / iyy),
        yaw_coupling=None if even else _row(dt_s * (ixx - iyy) / izz),
    )


def fly(body: Body, rotors: Rotors, airframe: Airframe, settle_n: Floats, wind: Wind | None = None) -> None:
    """Advance bodies and rotors in place by one physics step of ``airframe.dt_s``.

    First-order rotor lag (exact for a constant command), then Newton's and Euler's equations with
    semi-implicit Euler: new velocities move the position, and each component of the spin is advanced with the
    newest others, which keeps the torque-free rotation of an airframe with equal x and y inertias from gaining energy.
    Drag is linear in the velocity relative to the air.

    Args:
        body: the state, changed in place.
        rotors: the state, changed in place.
        airframe: what flies.
        settle_n: `[E, 4]` thrust that each rotor goes to: what it is told, times ``airframe.rotor_gain``.
        wind: the air's motion; None is calm.
    """
    thrust = rotors.thrust
    thrust += airframe.rotor_share * (settle_n - thrust)
    _move(body, thrust, airframe, wind)
    _spin(body.spin, thrust, airframe)
    _turn(body.attitude, body.spin, np.float32(0.5) * airframe.dt_s)


def _move(body: Body, thrust: Floats, airframe: Airframe, wind: Wind | None) -> None:
    front, left, back, right = thrust.T
    w, x, y, z = body.attitude.T
    lift = (front + back + left + right) * airframe.inverse_mass
    velocity, position = body.velocity, body.position
    velocity *= airframe.kept
    if wind is not None:
        velocity += airframe.carried * wind.velocity
    lift *= airframe.dt_s
    velocity[:, 0] += 2 * (x * z + w * y) * lift
    velocity[:, 1] += 2 * (y * z - w * x) * lift
    velocity[:, 2] += (1 - 2 * (x * x + y * y)) * lift
    velocity[:, 2] -= airframe.fall_m_s
    position += airframe.dt_s * velocity


def _spin(spin: Floats, thrust: Floats, airframe: Airframe) -> None:
    front, left, back, right = thrust.T
    spin_x, spin_y, spin_z = spin.T
    spin_x += airframe.roll * (left - right) + airframe.roll_coupling * (spin_y * spin_z)
    spin_y += airframe.pitch * (back - front) + airframe.pitch_coupling * (spin_z * spin_x)
    spin_z += airframe.yaw * (front - left + back - right)
    if airframe.yaw_coupling is not None:
        spin_z += airframe.yaw_coupling * (spin_x * spin_y)


def _turn(attitude: Floats, spin: Floats, half_s: np.float32) -> None:
    w, x, y, z = attitude.T
    spin_x, spin_y, spin_z = spin.T
    a, b, c = half_s * spin_x, half_s * spin_y, half_s * spin_z
    nw, nx = w - x * a - y * b - z * c, x + w * a + y * c - z * b
    ny, nz = y + w * b + z * a - x * c, z + w * c + x * b - y * a
    scale = 1 / np.sqrt(nw * nw + nx * nx + ny * ny + nz * nz)
    np.multiply(nw, scale, out=w)
    np.multiply(nx, scale, out=x)
    np.multiply(ny, scale, out=y)
    np.multiply(nz, scale, out=z)


def columns(slots: int, width: int) -> Floats:
    """Zeros `[slots, width]` whose columns are contiguous: ``array[:, i]`` is one component of every row."""
    return np.zeros((slots, width), np.float32, order="F")


def _row(value: NDArray[np.float64]) -> Coefficient:
    """One float32, or `[E]` of them."""
    return np.float32(value) if np.ndim(value) == 0 else np.asarray(value, np.float32)


def _column(value: NDArray[np.float64]) -> Coefficient:
    """One float32, or `[E, 1]` of them."""
    return np.float32(value) if np.ndim(value) == 0 else np.asarray(value, np.float32)[:, None]
