"""A scripted pilot for the drone: what a learned policy is measured against.

A cascade: position error to velocity, to force, to attitude, to rotor thrusts. Attitude and force are those of Lee,
Leok and McClamroch, 'Geometric Tracking Control of a Quadrotor UAV on SE(3)' (2010), with the drone's own heading as
the desired one. In place of the integral terms of Goodarzi, Lee and Lee, 'Geometric Nonlinear PID Control of a
Quadrotor UAV on SE(3)' (2013), which wind up on the long way to a target, a disturbance observer finds the acceleration
that the nominal airframe does not explain (Chen, Yang, Guo and Li, 'Disturbance-Observer-Based Control and Related
Methods', 2016).

The pilot knows the state, the target and the nominal airframe, not the drawn one and not the wind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rustyrl_actors.catalog import find_environment
from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import Arrays, StepRows
from rustyrl_actors.evaluate import first_episode_figures, first_episodes
from rustyrl_actors.joined import JoinedEnvironment
from rustyrl_actors.worlds.drone import STEP_S, DroneParameters, DroneWorld, full_thrust_n, hover_thrust_n
from rustyrl_actors.worlds.quadrotor import GRAVITY_M_S2

__all__ = ["Gains", "Pilot", "evaluate_pilot"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Gains:
    """How the pilot flies, set by hand.

    Of 300 flights each, halved or doubled one by one, 0.99 or more still succeed on both worlds; but for half of
    ``spin``, with which 0.93 do on ``drone-windy``.

    position: 1/s, desired speed over distance, near the target
    braking: m/s2, deceleration that the desired speed far from it allows for; speed: m/s, its limit
    velocity: 1/s, acceleration over error in velocity
    sink: m/s2, largest downward acceleration asked for; level: m/s2, largest horizontal one
    attitude: 1/s2, angular acceleration over angle; spin: 1/s, over angular velocity; yaw: 1/s, of the heading
    observer: 1/s, how fast an unexplained acceleration is believed
    """

    position: float = 2.0
    braking: float = 8.0
    speed: float = 10.0
    velocity: float = 3.5
    sink: float = 6.0
    level: float = 18.0
    attitude: float = 180.0
    spin: float = 22.0
    yaw: float = 2.0
    observer: float = 6.0


class Pilot:
    """Flies every drone of a world; ``act`` once before each step.

    disturbance: `[3, E]` m/s2, the acceleration that the nominal airframe in calm air does not explain, world axes
    """

    def __init__(self, world: DroneWorld, parameters: DroneParameters, gains: Gains | None = None) -> None:
        self._world, self._p, self._gains = world, parameters, gains or Gains()
        slots = len(world.task.distance)
        self._full_n, self._hover_n = full_thrust_n(parameters), hover_thrust_n(parameters)
        self._velocity = np.zeros((3, slots), np.float32)  # a step ago, as are axis and thrust
        self._axis = np.zeros((3, slots), np.float32)
        self._modeled_n = np.zeros(slots, np.float32)  # thrust of all rotors, had they the nominal gain and lag
        self._told_n = np.zeros(slots, np.float32)
        self.disturbance = np.zeros((3, slots), np.float32)

    def act(self, action: Floats) -> None:
        """Write the action `[E, 4]`, within [-1, 1], for the state that the drones are in."""
        axes = body_axes(self._world.body.attitude)
        self._observe(axes[2])
        force = self._desired_acceleration() - self.disturbance  # over mass, m/s2
        force[2] += np.float32(GRAVITY_M_S2)
        self._limit(force)
        share_n = self._torque_thrusts(axes, force)
        room = np.abs(share_n).max(axis=0)
        lift = np.einsum("ie,ie->e", force, axes[2]) * np.float32(self._p.mass_kg / 4)
        told = np.clip(lift, room, np.maximum(self._full_n - room, room)) + share_n  # attitude before height
        np.clip(told, 0, self._full_n, out=told)
        self._told_n = told.sum(axis=0)
        np.clip((told * np.float32(2 / self._full_n) - np.float32(1)).T, -1, 1, out=action)

    def _observe(self, axis: Floats) -> None:
        """Find the acceleration that the nominal airframe does not explain. axis: `[3, E]`, of the thrust, now."""
        p, velocity = self._p, self._world.body.velocity.T
        left = math.exp(-STEP_S / p.rotor_lag_s) if p.rotor_lag_s else 0.0
        lagging = self._modeled_n - self._told_n
        mean_n = self._told_n + lagging * np.float32(p.rotor_lag_s / STEP_S * (1 - left))
        self._modeled_n = self._told_n + lagging * np.float32(left)
        explained = (self._axis + axis) * (mean_n * np.float32(0.5 / p.mass_kg))
        explained[2] -= np.float32(GRAVITY_M_S2)
        unexplained = (velocity - self._velocity) * np.float32(1 / STEP_S) - explained
        self.disturbance += np.float32(-math.expm1(-STEP_S * self._gains.observer)) * (unexplained - self.disturbance)
        begun = self._world.task.steps == 0
        self.disturbance[:, begun] = 0.0
        self._modeled_n[begun] = 4 * self._hover_n
        self._velocity[:], self._axis[:] = velocity, axis

    def _desired_acceleration(self) -> Floats:
        """From where the drone is to where it should be: `[3, E]` m/s2, world axes."""
        g, world = self._gains, self._world
        error = (world.task.target - world.body.position).T
        distance = np.sqrt(np.einsum("ie,ie->e", error, error)) + np.float32(1e-6)
        far = np.sqrt(2 * np.float32(g.braking) * distance)
        speed = np.minimum(np.minimum(g.position * distance, far), np.float32(g.speed))
        desired: Floats = np.float32(g.velocity) * (error * (speed / distance) - world.body.velocity.T)
        return desired

    def _limit(self, force: Floats) -> None:
        """Bound a force over mass `[3, E]` m/s2 in place: height first, then what the rotors have left sideways."""
        most = 0.95 * 4 * self._full_n / self._p.mass_kg
        np.clip(force[2], GRAVITY_M_S2 - self._gains.sink, most, out=force[2])
        level = np.hypot(force[0], force[1]) + np.float32(1e-6)
        room = np.sqrt(np.maximum(most**2 - force[2] ** 2, 0))
        force[:2] *= np.minimum(1, np.minimum(room, np.float32(self._gains.level)) / level)

    def _torque_thrusts(self, axes: tuple[Floats, Floats, Floats], force: Floats) -> Floats:
        """What each rotor adds to its quarter of the lift to turn the thrust axis along ``force``: `[4, E]` N."""
        g, p = self._gains, self._p
        ahead, aside, along = (np.einsum("ie,ie->e", axis, force) for axis in axes)
        sine = np.hypot(ahead, aside)
        angle = np.arctan2(sine, along) / (sine + np.float32(1e-6))
        x, y, z = self._world.body.spin.T
        ixx, iyy, izz = (np.float32(i) for i in (p.inertia_xx_kg_m2, p.inertia_yy_kg_m2, p.inertia_zz_kg_m2))
        roll = ixx * (-g.attitude * angle * aside - g.spin * x) + (izz - iyy) * y * z  # N m
        pitch = iyy * (g.attitude * angle * ahead - g.spin * y) + (ixx - izz) * z * x
        yaw = -izz * np.float32(g.yaw) * z / np.float32(4 * max(p.yaw_moment_m, 1e-6))
        most = np.float32(0.5 * self._full_n)
        yaw = np.clip(yaw, -0.2 * most, 0.2 * most)
        roll = np.clip(roll / np.float32(2 * p.arm_m), -0.8 * most, 0.8 * most)
        pitch = np.clip(pitch / np.float32(2 * p.arm_m), -0.8 * most, 0.8 * most)
        return np.stack([yaw - pitch, roll - yaw, yaw + pitch, -roll - yaw]).astype(np.float32)


def body_axes(attitude: Floats) -> tuple[Floats, Floats, Floats]:
    """The body's x, y and z axes in world axes, each `[3, E]`. attitude: `[E, 4]`."""
    w, x, y, z = attitude.T
    return (
        np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]),
        np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]),
        np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]),
    )


def evaluate_pilot(
    env: str, env_config: Mapping[str, Any], episodes: int, seed: int, gains: Gains | None = None
) -> dict[str, float]:
    """Fly the first episode of each of ``episodes`` slots: the very ones of `rustyrl_actors.evaluate.evaluate`.

    Args:
        env: ``drone`` or ``drone-windy``.
        env_config: values of its parameters.
        episodes: how many.
        seed: that of the other evaluation.
        gains: of the pilot.

    Returns:
        ``episodes, return_mean, return_std, length_mean`` and the metrics that the world declares.
    """
    source = find_environment(env, env_config)
    parameters = msgspec.convert(source.spec.parameters, DroneParameters)
    parts: list[dict[str, Any]] = []
    for left in range(episodes, 0, -source.resizable):
        slots = min(left, source.resizable)
        world, spec = DroneWorld(slots, parameters), find_environment(env, {**env_config, "slots": slots}).spec
        pilot = Pilot(world, parameters, gains)

        def act(_rows: StepRows, action: Arrays, pilot: Pilot = pilot) -> None:
            pilot.act(action["main"])  # type: ignore[arg-type]

        environment = JoinedEnvironment([ColumnEnvironment(world, spec)])
        parts.append(first_episodes(environment, act, seed, left))
    return first_episode_figures(source.spec, parts)
