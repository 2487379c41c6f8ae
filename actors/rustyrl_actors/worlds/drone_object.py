"""The drone as an ordinary esper game: one entity is one drone, and its numbers are those of the column world.

The numbers are numpy's float32 scalars, in the order of operations of `rustyrl_actors.worlds.quadrotor.fly`, so that
both styles give the same bits. A game that need not match another would use Python's floats, which are faster.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl.errors import UsageError
from rustyrl_actors.agent import Agent
from rustyrl_actors.worlds import drone
from rustyrl_actors.worlds.drone import DroneParameters, drone_info, hover_thrust_n
from rustyrl_actors.worlds.quadrotor import Airframe

__all__ = ["DroneObjectWorld"]

F = np.float32
METRICS = ("success", "crash", "final_distance", "time_to_target", "effort")
Number = Any  # a float32 scalar: mypy takes what comes of two of them for an array


@dataclass(slots=True)
class Vector:
    """Three numbers on the world's axes, or on the body's."""

    x: Number
    y: Number
    z: Number


@dataclass(slots=True)
class Body:
    """position: m; velocity: m/s, world axes; attitude: unit quaternion (w, x, y, z); spin: rad/s, body axes."""

    position: Vector
    velocity: Vector
    attitude: tuple[Number, Number, Number, Number]
    spin: Vector


@dataclass(slots=True)
class Rotors:
    """thrust: N, as it is now; front and back on the body's x axis, left and right on y."""

    thrust: list[Number]


@dataclass(slots=True)
class Task:
    """Where to fly, and how it went so far; see `rustyrl_actors.worlds.drone.Task`."""

    target: Vector
    distance: Number
    recent: deque[Number]
    recent_sum: float = 0.0
    steps: int = 0
    near_steps: int = 0
    effort_sum: float = 0.0


def fly_one(body: Body, rotors: Rotors, airframe: Airframe, settle_n: list[Number]) -> None:
    """Advance one drone in calm air by one physics step; see `rustyrl_actors.worlds.quadrotor.fly`."""
    rotors.thrust = [t + airframe.rotor_share * (n - t) for t, n in zip(rotors.thrust, settle_n, strict=True)]
    front, left, back, right = rotors.thrust
    w, x, y, z = body.attitude
    lift = (front + back + left + right) * airframe.inverse_mass * airframe.dt_s
    velocity, position, spin = body.velocity, body.position, body.spin
    velocity.x = velocity.x * airframe.kept + 2 * (x * z + w * y) * lift
    velocity.y = velocity.y * airframe.kept + 2 * (y * z - w * x) * lift
    velocity.z = velocity.z * airframe.kept + (1 - 2 * (x * x + y * y)) * lift - airframe.fall_m_s
    position.x += airframe.dt_s * velocity.x
    position.y += airframe.dt_s * velocity.y
    position.z += airframe.dt_s * velocity.z

    spin.x += airframe.roll * (left - right) + airframe.roll_coupling * (spin.y * spin.z)
    spin.y += airframe.pitch * (back - front) + airframe.pitch_coupling * (spin.z * spin.x)
    spin.z += airframe.yaw * (front - left + back - right)
    if airframe.yaw_coupling is not None:
        spin.z += airframe.yaw_coupling * (spin.x * spin.y)

    half_s = F(0.5) * airframe.dt_s
    a, b, c = half_s * spin.x, half_s * spin.y, half_s * spin.z
    nw, nx = w - x * a - y * b - z * c, x + w * a + y * c - z * b
    ny, nz = y + w * b + z * a - x * c, z + w * c + x * b - y * a
    scale = 1 / np.sqrt(nw * nw + nx * nx + ny * ny + nz * nz)
    body.attitude = (nw * scale, nx * scale, ny * scale, nz * scale)


class FlightProcessor(esper.Processor):
    """Turns actions into rotor commands and flies one control step in several physics steps."""

    def __init__(self, parameters: DroneParameters) -> None:
        self._half_n = F(0.5 * drone.full_thrust_n(parameters))
        self._substeps = parameters.substeps
        self._airframe = drone.airframe_of(parameters, drone.STEP_S / parameters.substeps)

    def process(self) -> None:
        """Advance by one control step."""
        for _, (body, rotors, agent) in esper.get_components(Body, Rotors, Agent):
            settle_n = [(told + F(1)) * self._half_n for told in agent.action]
            for _ in range(self._substeps):
                fly_one(body, rotors, self._airframe, settle_n)


class TaskProcessor(esper.Processor):
    """Judges every drone against its task: reward, end, and the metrics of the episode."""

    def __init__(self, parameters: DroneParameters) -> None:
        self._bounds_m2 = F(parameters.bounds_m**2)
        self._effort = (0.5 * drone.full_thrust_n(parameters) / hover_thrust_n(parameters)) ** 2 / 4

    def process(self) -> None:
        """Judge one control step."""
        for _, (body, task, agent) in esper.get_components(Body, Task, Agent):
            at, target, spin = body.position, task.target, body.spin
            distance = _length(target.x - at.x, target.y - at.y, target.z - at.z)
            crashed = bool(at.z <= 0 or at.x * at.x + at.y * at.y + at.z * at.z > self._bounds_m2)
            gained = (task.distance - distance) * F(drone.REWARD_APPROACH)
            gained += F(drone.REWARD_NEAR) * np.exp(-distance)
            gained += F(drone.REWARD_AT_TARGET) * np.exp(distance * F(-8))
            gained -= F(drone.PENALTY_SPIN) * (spin.x * spin.x + spin.y * spin.y + spin.z * spin.z)
            agent.reward = gained - F(drone.PENALTY_CRASH) * crashed
            agent.terminated = crashed
            self._record(task, distance, crashed, agent)
            task.distance = distance

    def _record(self, task: Task, distance: Number, crashed: bool, agent: Agent) -> None:
        task.recent_sum = task.recent_sum + float(distance) - float(task.recent.popleft())
        task.recent.append(distance)
        task.steps += 1
        near = bool(distance < drone.SUCCESS_RADIUS_M)
        task.near_steps = (task.near_steps + 1) * near
        metrics = agent.episode_metrics
        if near and np.isnan(metrics["time_to_target"]):
            metrics["time_to_target"] = task.steps * float(F(drone.STEP_S))
        told = agent.action[None] + F(1)
        task.effort_sum += float(np.einsum("ij,ij->i", told, told)[0])
        metrics["effort"] = task.effort_sum / task.steps * self._effort
        metrics["crash"] = crashed
        metrics["success"] = task.near_steps >= drone.LAST_STEPS and not crashed
        metrics["final_distance"] = task.recent_sum / min(task.steps, drone.LAST_STEPS)


class DroneObjectWorld:
    """Fly a quadrotor to its target and stay there, as ordinary esper objects."""

    style = "object"
    default_slots = 1
    Parameters = DroneParameters

    def __init__(self, slots: int, parameters: DroneParameters) -> None:
        if parameters.variation or parameters.gust_m_s:
            raise UsageError("drone-object flies one airframe in calm air; variation and gust_m_s are for drone")
        self.info = drone_info(parameters)
        self._slots = slots
        self._parameters = parameters

    def reset(self, rng: np.random.Generator) -> None:
        """Draw a start and a target for each drone."""
        self._add_processors()
        for _ in range(self._slots):
            esper.create_entity(*_draw_drone(self._parameters, rng))

    def _add_processors(self) -> None:
        esper.add_processor(FlightProcessor(self._parameters), priority=2)
        esper.add_processor(TaskProcessor(self._parameters), priority=1)

    def save_state(self) -> dict[str, NDArray[Any]]:
        """Every drone, in the order of the entities; single precision where the game has it."""
        found = sorted(esper.get_components(Body, Rotors, Task, Agent), key=lambda drone: drone[0])
        drones = [components for _, components in found]
        return {
            "vector": np.array(
                [[(v.x, v.y, v.z) for v in (b.position, b.velocity, b.spin, t.target)] for b, _, t, _ in drones], F
            ),
            "attitude": np.array([body.attitude for body, _, _, _ in drones], F),
            "thrust": np.array([rotors.thrust for _, rotors, _, _ in drones], F),
            "distance": np.array([task.distance for _, _, task, _ in drones], F),
            "recent": np.array([list(task.recent) for _, _, task, _ in drones], F),
            "sum": np.array([(task.recent_sum, task.effort_sum) for _, _, task, _ in drones]),
            "steps": np.array([(task.steps, task.near_steps) for _, _, task, _ in drones]),
            "crashed": np.array([agent.terminated for _, _, _, agent in drones]),
            "metric": np.array(
                [[agent.episode_metrics.get(m, 0) for m in METRICS] for _, _, _, agent in drones], float
            ),
        }

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """Make the drones anew."""
        self._add_processors()
        for row, crashed in enumerate(state["crashed"]):
            position, velocity, spin, target = (Vector(*vector) for vector in state["vector"][row])
            recent_sum, effort_sum = state["sum"][row].tolist()
            steps, near_steps = state["steps"][row].tolist()
            recent = deque(state["recent"][row])
            esper.create_entity(
                Body(position, velocity, tuple(state["attitude"][row]), spin),
                Rotors(list(state["thrust"][row])),
                Task(target, state["distance"][row], recent, recent_sum, steps, near_steps, effort_sum),
                Agent(
                    terminated=bool(crashed),
                    episode_metrics=dict(zip(METRICS, state["metric"][row].tolist(), strict=True)),
                ),
            )

    def observe(self) -> None:
        """Write what a drone can sense; see `rustyrl_actors.worlds.drone.DroneWorld.observe`."""
        per_hover = F(1 / hover_thrust_n(self._parameters))
        for _, (body, rotors, task, agent) in esper.get_components(Body, Rotors, Task, Agent):
            w, x, y, z = body.attitude
            axes = (
                (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
                (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
                (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
            )
            at, target, velocity, spin = body.position, task.target, body.velocity, body.spin
            ex, ey, ez = target.x - at.x, target.y - at.y, target.z - at.z
            near = F(1) / (F(0.5) + _length(ex, ey, ez))
            along = [ex * ax + ey * ay + ez * az for ax, ay, az in axes]
            agent.observation[:] = [
                *(error * F(0.1) for error in along),
                *(error * near for error in along),
                *((velocity.x * ax + velocity.y * ay + velocity.z * az) * F(1 / 3) for ax, ay, az in axes),
                *(az for _, _, az in axes),
                spin.x * F(0.2),
                spin.y * F(0.2),
                spin.z * F(0.2),
                *(thrust * per_hover - F(1) for thrust in rotors.thrust),
                at.z * F(0.2),
            ]


def _draw_drone(parameters: DroneParameters, rng: np.random.Generator) -> tuple[Body, Rotors, Task, Agent]:
    """The components of one drone, drawn as the column world draws a row."""
    radius = drone.START_RADIUS_M * np.sqrt(rng.random())
    bearing = rng.uniform(-np.pi, np.pi)
    position = _vector(radius * np.cos(bearing), radius * np.sin(bearing), rng.uniform(*drone.START_HEIGHT_M))
    velocity = _vector(*rng.normal(0.0, drone.START_SPEED_M_S, 3))
    spin = _vector(*rng.normal(0.0, drone.START_SPIN_RAD_S, 3))
    w, x, y, z = drone._quaternion(rng.normal(0.0, drone.START_TILT_RAD, (1, 3)))[0].astype(F)
    half = drone.TARGET_HALF_WIDTH_M
    target_x, target_y = rng.uniform(-half, half, 2)
    target = _vector(target_x, target_y, rng.uniform(*drone.TARGET_HEIGHT_M))
    distance = _length(target.x - position.x, target.y - position.y, target.z - position.z)
    return (
        Body(position, velocity, (w, x, y, z), spin),
        Rotors([F(hover_thrust_n(parameters))] * 4),
        Task(target, distance, deque([F(0)] * drone.LAST_STEPS)),
        Agent(episode_metrics={"time_to_target": np.nan}),
    )


def _vector(x: float, y: float, z: float) -> Vector:
    return Vector(F(x), F(y), F(z))


def _length(x: Number, y: Number, z: Number) -> Number:
    return np.sqrt(x * x + y * y + z * z)
