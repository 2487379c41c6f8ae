"""A quadrotor that flies to a target: the flagship, an esper world in column style.

The body is that of Mellinger, Michael and Kumar, 'Trajectory Generation and Control for Precise Aggressive
Maneuvers with Quadrotors' (2012): rotors in a plus on the body axes, each with a thrust and a yaw moment.
World axes have z up; the body's z axis is the thrust direction; SI units throughout. The physics is in
`fly` (pure arrays), the task in `judge`; the processors call them on the components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import esper
import gymnasium
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from rustyrl.spec import MetricSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.world import SINGLE_ARRAY, WorldInfo

__all__ = ["Body", "DroneParameters", "DroneWorld", "Rotors", "Task", "fly"]

Floats = NDArray[np.float32]

STEP_S = 0.02  # control at 50 Hz
GRAVITY_M_S2 = 9.81
SUCCESS_RADIUS_M = 0.5
LAST_STEPS = 50  # the last second
START_RADIUS_M = 2.0
START_HEIGHT_M = (1.0, 8.0)
START_TILT_RAD = 0.3
START_SPEED_M_S = 0.5
START_SPIN_RAD_S = 0.5
TARGET_HALF_WIDTH_M = 10.0
TARGET_HEIGHT_M = (3.0, 8.0)
OBSERVATION_WIDTH = 20
# The reward of a control step; the goal does not mention it, these made it reachable in 2 M steps.
REWARD_APPROACH = 0.5  # per m
REWARD_NEAR = 0.05  # falls to 1/e at 1 m
REWARD_AT_TARGET = 0.05  # falls to 1/e at 0.125 m
PENALTY_SPIN = 0.001  # per rad2/s2
PENALTY_CRASH = 5.0

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]


class DroneParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What can be set of the world with ``--set env.NAME=VALUE``; the body's defaults are Mellinger's."""

    mass_kg: Positive = 0.5
    inertia_xx_kg_m2: Positive = 0.0023
    inertia_yy_kg_m2: Positive = 0.0023
    inertia_zz_kg_m2: Positive = 0.004
    arm_m: Positive = 0.175
    rotor_max_n: Positive = 10.0
    yaw_moment_m: NotNegative = 0.0245
    thrust_to_weight: Positive = 2.0
    rotor_lag_s: NotNegative = 0.03
    drag_n_s_m: NotNegative = 0.1
    substeps: Annotated[int, Meta(ge=4, le=1000)] = 4
    bounds_m: Positive = 30.0


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
class Task:
    """Where to fly, and how it went so far in this episode.

    target: `[E, 3]` m
    distance: `[E]` m, at the last step
    recent: `[E, 50]` m, the distances of the last second, a ring
    recent_sum: `[E]` m, their sum
    steps, near_steps: `[E]`, env steps flown, and those within 0.5 m without a break
    arrival_s: `[E]` s, when the drone first came within 0.5 m; NaN before
    """

    target: Floats
    distance: Floats
    recent: Floats
    recent_sum: NDArray[np.float64]
    steps: NDArray[np.int32]
    near_steps: NDArray[np.int32]
    arrival_s: Floats


def columns(slots: int, width: int) -> Floats:
    """Zeros `[slots, width]` whose columns are contiguous: ``array[:, i]`` is one component of every row."""
    return np.zeros((slots, width), np.float32, order="F")


def fly(body: Body, rotors: Rotors, command_n: Floats, dt_s: float, parameters: DroneParameters) -> None:
    """Advance bodies and rotors in place by one physics step.

    First-order rotor lag (exact for a constant command), then Newton's and Euler's equations with
    semi-implicit Euler: new velocities move the position, and each component of the spin is advanced with the
    newest others, which keeps the torque-free rotation of an airframe with equal x and y inertias from gaining energy.

    Args:
        body: the state, changed in place.
        rotors: the state, changed in place.
        command_n: `[E, 4]` thrust that each rotor is told to give.
        dt_s: length of the step.
        parameters: the airframe.
    """
    p = parameters
    gain = -math.expm1(-dt_s / p.rotor_lag_s) if p.rotor_lag_s else 1.0
    thrust = rotors.thrust
    thrust += np.float32(gain) * (command_n - thrust)
    front, left, back, right = thrust.T

    w, x, y, z = body.attitude.T
    spin_x, spin_y, spin_z = body.spin.T
    lift = (front + back + left + right) * np.float32(1.0 / p.mass_kg)
    velocity, position = body.velocity, body.position
    velocity *= np.float32(1.0 - dt_s * p.drag_n_s_m / p.mass_kg)
    lift *= np.float32(dt_s)
    velocity[:, 0] += 2 * (x * z + w * y) * lift
    velocity[:, 1] += 2 * (y * z - w * x) * lift
    velocity[:, 2] += (1 - 2 * (x * x + y * y)) * lift
    velocity[:, 2] -= np.float32(dt_s * GRAVITY_M_S2)
    position += np.float32(dt_s) * velocity

    ixx, iyy, izz = p.inertia_xx_kg_m2, p.inertia_yy_kg_m2, p.inertia_zz_kg_m2
    arm, yaw = p.arm_m, p.yaw_moment_m
    spin_x += np.float32(dt_s * arm / ixx) * (left - right) + np.float32(dt_s * (iyy - izz) / ixx) * (spin_y * spin_z)
    spin_y += np.float32(dt_s * arm / iyy) * (back - front) + np.float32(dt_s * (izz - ixx) / iyy) * (spin_z * spin_x)
    spin_z += np.float32(dt_s * yaw / izz) * (front - left + back - right)
    if ixx != iyy:
        spin_z += np.float32(dt_s * (ixx - iyy) / izz) * (spin_x * spin_y)

    half = np.float32(0.5 * dt_s)
    a, b, c = half * spin_x, half * spin_y, half * spin_z
    nw, nx = w - x * a - y * b - z * c, x + w * a + y * c - z * b
    ny, nz = y + w * b + z * a - x * c, z + w * c + x * b - y * a
    scale = 1 / np.sqrt(nw * nw + nx * nx + ny * ny + nz * nz)
    np.multiply(nw, scale, out=w)
    np.multiply(nx, scale, out=x)
    np.multiply(ny, scale, out=y)
    np.multiply(nz, scale, out=z)


def reward(before: Floats, distance: Floats, spin2: Floats, crashed: NDArray[np.bool_], out: Floats) -> None:
    """What a control step was worth: coming closer, being close, flying calmly, not crashing.

    Args:
        before: `[E]` m, distance to the target a step ago.
        distance: `[E]` m, now.
        spin2: `[E]` rad2/s2, squared angular speed.
        crashed: `[E]` bool.
        out: `[E]`, written.
    """
    np.multiply(before - distance, np.float32(REWARD_APPROACH), out=out)
    out += np.float32(REWARD_NEAR) * np.exp(-distance)
    out += np.float32(REWARD_AT_TARGET) * np.exp(distance * np.float32(-8))
    out -= np.float32(PENALTY_SPIN) * spin2
    out -= np.float32(PENALTY_CRASH) * crashed


class FlightProcessor(esper.Processor):
    """Turns actions into rotor commands and flies one control step in several physics steps."""

    def __init__(self, parameters: DroneParameters) -> None:
        self._parameters = parameters
        hover_n = parameters.mass_kg * GRAVITY_M_S2 / 4
        self._full_n = min(parameters.thrust_to_weight * hover_n, parameters.rotor_max_n)

    def process(self) -> None:
        """Advance by one control step."""
        p = self._parameters
        for _, (body, rotors, agent) in esper.get_components(Body, Rotors, Agent):
            command_n = np.asfortranarray(agent.action)
            command_n = (command_n + np.float32(1)) * np.float32(0.5 * self._full_n)
            for _ in range(p.substeps):
                fly(body, rotors, command_n, STEP_S / p.substeps, p)


class TaskProcessor(esper.Processor):
    """Judges every drone against its task: reward, end, and the metrics of the episode."""

    def __init__(self, parameters: DroneParameters) -> None:
        self._bounds_m2 = np.float32(parameters.bounds_m**2)
        self._tick = 0

    def process(self) -> None:
        """Judge one control step."""
        self._tick = (self._tick + 1) % LAST_STEPS
        for _, (body, task, agent) in esper.get_components(Body, Task, Agent):
            error = task.target - body.position
            distance = np.sqrt(error[:, 0] ** 2 + error[:, 1] ** 2 + error[:, 2] ** 2)
            spin2 = body.spin[:, 0] ** 2 + body.spin[:, 1] ** 2 + body.spin[:, 2] ** 2
            out2 = body.position[:, 0] ** 2 + body.position[:, 1] ** 2 + body.position[:, 2] ** 2
            crashed = np.logical_or(body.position[:, 2] <= 0, out2 > self._bounds_m2, out=agent.terminated)
            self._record(task, distance, crashed, agent)
            reward(task.distance, distance, spin2, crashed, out=agent.reward)
            task.distance[:] = distance

    def _record(self, task: Task, distance: Floats, crashed: NDArray[np.bool_], agent: Agent) -> None:
        column = task.recent[:, self._tick]
        task.recent_sum += distance
        task.recent_sum -= column
        column[:] = distance
        task.steps += 1
        near = distance < SUCCESS_RADIUS_M
        task.near_steps += 1
        task.near_steps *= near
        arrived = near & np.isnan(task.arrival_s)
        if arrived.any():
            task.arrival_s[arrived] = task.steps[arrived] * np.float32(STEP_S)
        metrics = agent.episode_metrics
        metrics["crash"][:] = crashed
        np.logical_and(task.near_steps >= LAST_STEPS, ~crashed, out=metrics["success"], casting="unsafe")
        np.divide(
            task.recent_sum,
            np.minimum(task.steps, LAST_STEPS),
            out=metrics["final_distance"],
            casting="unsafe",
        )


class DroneWorld:
    """Fly a quadrotor to its target and stay there."""

    name = "drone"
    default_slots = 256
    Parameters = DroneParameters

    def __init__(self, slots: int, parameters: DroneParameters) -> None:
        limit = np.full(OBSERVATION_WIDTH, np.inf, np.float32)
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Box(-limit, limit, dtype=np.float32),
            action_space=gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32),
            step_s=STEP_S,
            max_episode_steps=1000,
            metrics=(
                MetricSpec("success_rate", "success", "mean"),
                MetricSpec("crash_rate", "crash", "mean"),
                MetricSpec("final_distance_median", "final_distance", "median"),
                MetricSpec("time_to_target_median", "time_to_target", "median"),
            ),
            goal=("success_rate>=0.995", "crash_rate<=0.005", "final_distance_median<=0.08"),
            evaluate_from=("length_mean>=150",),  # most stay in the air for 3 s; training noise hides the rest
            defaults={
                "run": {"eval_every": 8},
                "policy": {"activation": "relu", "normalize": False},  # observations are of order one already
                "ppo": {"target_kl": 0.02},
            },
        )
        self._parameters = parameters
        self.body = Body(columns(slots, 3), columns(slots, 3), columns(slots, 4), columns(slots, 3))
        self.rotors = Rotors(columns(slots, 4))
        self.task = Task(
            target=columns(slots, 3),
            distance=np.zeros(slots, np.float32),
            recent=columns(slots, LAST_STEPS),
            recent_sum=np.zeros(slots, np.float64),
            steps=np.zeros(slots, np.int32),
            near_steps=np.zeros(slots, np.int32),
            arrival_s=np.full(slots, np.nan, np.float32),
        )
        self.agent = Agent(
            episode_metrics={
                "success": np.zeros(slots, np.float32),
                "crash": np.zeros(slots, np.float32),
                "final_distance": np.zeros(slots, np.float32),
                "time_to_target": self.task.arrival_s,
            }
        )

    def build(self) -> Agent:
        """Create the one entity that stands for every drone, and the processors that fly and judge it."""
        esper.create_entity(self.body, self.rotors, self.task, self.agent)
        esper.add_processor(FlightProcessor(self._parameters), priority=2)
        esper.add_processor(TaskProcessor(self._parameters), priority=1)
        return self.agent

    def reset(self, rows: NDArray[np.intp], rng: np.random.Generator) -> None:
        """Draw a start and a target for each of these drones."""
        count = len(rows)
        body, task = self.body, self.task
        radius = START_RADIUS_M * np.sqrt(rng.random(count))
        bearing = rng.uniform(-np.pi, np.pi, count)
        body.position[rows, 0] = radius * np.cos(bearing)
        body.position[rows, 1] = radius * np.sin(bearing)
        body.position[rows, 2] = rng.uniform(*START_HEIGHT_M, count)
        body.velocity[rows] = rng.normal(0.0, START_SPEED_M_S, (count, 3))
        body.spin[rows] = rng.normal(0.0, START_SPIN_RAD_S, (count, 3))
        body.attitude[rows] = _quaternion(rng.normal(0.0, START_TILT_RAD, (count, 3)))
        self.rotors.thrust[rows] = self._parameters.mass_kg * GRAVITY_M_S2 / 4
        half = TARGET_HALF_WIDTH_M
        task.target[rows, :2] = rng.uniform(-half, half, (count, 2))
        task.target[rows, 2] = rng.uniform(*TARGET_HEIGHT_M, count)
        task.distance[rows] = np.linalg.norm(task.target[rows] - body.position[rows], axis=1)
        task.recent[rows] = 0.0
        task.recent_sum[rows] = 0.0
        task.steps[rows] = 0
        task.near_steps[rows] = 0
        task.arrival_s[rows] = np.nan

    def observe(self, rows: NDArray[np.intp] | slice) -> None:
        """Write what a drone can sense, in body axes (so that heading does not matter), scaled to order one.

        Columns: 0-2 position error / 10 m; 3-5 position error, saturating at about 1 m; 6-8 velocity / 3 m/s;
        9-11 the world's up direction; 12-14 spin / 5 rad/s; 15-18 thrust over hover thrust - 1; 19 height / 5 m.
        """
        body = self.body
        w, x, y, z = body.attitude[rows].T
        axes = (
            (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
            (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
            (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
        )  # the body's axes in world axes
        velocity = body.velocity[rows].T
        error = (self.task.target[rows] - body.position[rows]).T
        near = np.float32(1) / (np.float32(0.5) + np.sqrt(error[0] ** 2 + error[1] ** 2 + error[2] ** 2))
        out = np.empty((OBSERVATION_WIDTH, len(w)), np.float32)
        for index, (ax, ay, az) in enumerate(axes):
            along = error[0] * ax + error[1] * ay + error[2] * az
            out[index] = along * np.float32(0.1)
            out[3 + index] = along * near
            out[6 + index] = (velocity[0] * ax + velocity[1] * ay + velocity[2] * az) * np.float32(1 / 3)
            out[9 + index] = az
        out[12:15] = body.spin[rows].T * np.float32(0.2)
        hover_n = self._parameters.mass_kg * GRAVITY_M_S2 / 4
        out[15:19] = self.rotors.thrust[rows].T * np.float32(1 / hover_n) - np.float32(1)
        out[19] = body.position[rows, 2] * np.float32(0.2)
        self.agent.observation[SINGLE_ARRAY][rows] = out.T


def _quaternion(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit quaternions `[n, 4]` of the rotation vectors `[n, 3]` in rad."""
    angle = np.linalg.norm(rotation, axis=1, keepdims=True)
    scale = 0.5 * np.sinc(angle / (2 * np.pi))  # sin(angle / 2) / angle
    return np.concatenate([np.cos(angle / 2), rotation * scale], axis=1)
