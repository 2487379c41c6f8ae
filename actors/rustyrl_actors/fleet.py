"""The worlds that an actor owns: answering tickets with them, giving them away, taking them over."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import msgspec

from rustyrl.channels import Sent
from rustyrl.errors import RunFailedError, WireError
from rustyrl.rollout import Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.spec import spaces_text
from rustyrl.stages import Stages
from rustyrl.weights import Weights
from rustyrl.wire import (
    Welcome,
    WorldState,
    decode_world_state,
    encode_world_state,
)
from rustyrl_actors.catalog import EnvironmentSource
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.pulse import Pulse
from rustyrl_actors.states import place_into
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll

__all__ = ["Fleet", "Recording"]

log = logging.getLogger(__name__)

BUFFERS = 2  # one is sent while the next is written
STALE_BATCHES = 65  # one more than the largest policy lag: a world left behind so far has another owner
TAKE_S = 300.0  # how long a rollout may take to leave, while a learner restarts or a link is broken


@dataclass(slots=True)
class Recording:
    """A buffer and, once its rollout is on its way out, what tells when it has left."""

    buffer: UnrollBuffer
    sent: Sent | None = None

    @property
    def rollout(self) -> Rollout:
        """What was recorded last."""
        return self.buffer.rollout


class Fleet:
    """The worlds that this actor owns, its policy, and the buffers that it records into."""

    def __init__(self, source: EnvironmentSource, welcome: Welcome, incarnation: int, pulse: Pulse) -> None:
        self.pulse = pulse
        self._source = source
        self._welcome = welcome
        self._incarnation = incarnation
        self._worlds: dict[int, OwnedWorld] = {}
        self._recordings: dict[tuple[int, ...], list[Recording]] = {}
        self._weights: Weights | None = None
        self._version = -1
        self._policies: dict[int, Policy] = {}
        self._cpu_s = time.process_time()

    @property
    def fingerprint(self) -> str:
        """The environment's."""
        return self._source.spec.fingerprint

    @property
    def spaces(self) -> str:
        """Those of its environment, in words."""
        return spaces_text(self._source.spec.observation, self._source.spec.action)

    def follow(self, welcome: Welcome) -> None:
        """Belong to another learner of the same run, or to the same one anew."""
        same = msgspec.structs.replace(
            welcome, index=self._welcome.index, learner_incarnation=self._welcome.learner_incarnation
        )
        if same != self._welcome:
            raise RunFailedError("another run has begun at this address; start this actor anew to join it")
        if welcome.learner_incarnation < self._welcome.learner_incarnation:
            raise RunFailedError(
                f"learner incarnation {welcome.learner_incarnation} answered, an older one than "
                f"{self._welcome.learner_incarnation}"
            )
        self._welcome = welcome
        self._version = -1  # its weights come ahead of its tickets
        self.pulse.rest(answered=False)

    def load(self, weights: Weights, policy_version: int) -> None:
        """Act under these weights from now on."""
        if (weights.spec.observation, weights.spec.action) != (self._source.spec.observation, self._source.spec.action):
            raise RunFailedError("the learner sent a policy for another environment")
        self._weights, self._version = weights, policy_version
        for policy in self._policies.values():
            policy.load(weights)

    def answer(self, ticket: Ticket, stages: Stages) -> Recording:
        """Unroll the worlds of a ticket."""
        if ticket.policy_version != self._version:
            raise RunFailedError(f"a ticket names version {ticket.policy_version}, the weights are {self._version}")
        with stages("prepare"):
            worlds = [self._world(index, ticket.batch) for index in ticket.worlds]
            recording = self._recording(ticket.worlds)
            if recording.sent is not None:
                recording.sent.wait(TAKE_S)
            buffer = recording.buffer
            for world, columns in zip(worlds, buffer.columns, strict=True):
                generator = noise_generator(self._welcome.seed, world.index, ticket.batch)
                fill_noise(buffer.noise, self._source.spec, columns, generator)
        unroll(worlds, self._policy(buffer.rollout.slots), buffer, stages, self.pulse)
        for world in worlds:
            world.next_batch = ticket.batch + 1
        before, self._cpu_s = self._cpu_s, time.process_time()
        stages.add("cpu", self._cpu_s - before)
        buffer.rollout.origin = RolloutOrigin(
            fingerprint=self._source.spec.fingerprint,
            policy_name="main",
            ticket=ticket,
            learner_incarnation=self._welcome.learner_incarnation,
            actor_index=self._welcome.index,
            actor_incarnation=self._incarnation,
            stage_s=stages.take(),
            fresh=tuple(world.index for world in worlds if world.built == ticket.batch),
        )
        return recording

    def give(self, index: int) -> tuple[WorldState, bytes]:
        """Part with a world: its state as a message, without arrays if it cannot be had."""
        try:
            return self.copy(index)
        finally:
            if (world := self._worlds.pop(index, None)) is not None:
                world.environment.close()

    def copy(self, index: int) -> tuple[WorldState, bytes]:
        """The state of a world as a message, without arrays if it cannot be had; the world stays as it is."""
        world = self._worlds.get(index)
        if world is None:
            return encode_world_state(index, 0, 0, {})
        try:
            arrays = world.environment.save() or {}
            if arrays:
                arrays |= {f"now.observation.{name}": array for name, array in world.now.observation.items()}
                arrays |= {f"now.action_mask.{name}": mask for name, mask in world.now.action_mask.items()}
            return encode_world_state(index, world.next_batch, world.built, arrays)
        except WireError as error:
            log.warning("the state of world %d cannot be had: %s", index, error)
            return encode_world_state(index, 0, 0, {})

    def take(self, message: WorldState, blob: memoryview) -> None:
        """Go on with a world that another actor had; one whose state is of no use begins anew with its ticket."""
        if not message.arrays:
            return
        if (old := self._worlds.pop(message.world, None)) is not None:
            old.environment.close()
        self.pulse.build(message.world, message.next_batch)
        environment, now = self._source.make(stagger=self._welcome.stagger), allocate_rows(self._source.spec)
        try:
            state = decode_world_state(message, blob)
            environment.load(state)
            for name, array in now.observation.items():
                place_into(array, state, f"now.observation.{name}")
            for name, mask in now.action_mask.items():
                place_into(mask, state, f"now.action_mask.{name}")
        except (ValueError, KeyError, WireError) as error:
            log.warning("world %d begins anew: the state that came does not fit: %s", message.world, error)
            environment.close()
            return
        self._worlds[message.world] = OwnedWorld(message.world, environment, message.next_batch, now, message.built)

    def close(self) -> None:
        """Close every world."""
        for world in self._worlds.values():
            world.environment.close()
        self._worlds.clear()

    def _world(self, index: int, batch: int) -> OwnedWorld:
        for other in [w for w in self._worlds.values() if w.next_batch + STALE_BATCHES < batch]:
            self._worlds.pop(other.index).environment.close()
        world = self._worlds.get(index)
        if world is None or world.next_batch != batch:
            self.pulse.build(index, batch)
        if world is None:
            environment = self._source.make(stagger=self._welcome.stagger)
            world = OwnedWorld(index, environment, -1, allocate_rows(self._source.spec))
            self._worlds[index] = world
        if world.next_batch != batch:  # new here, or it ran on elsewhere: new episodes
            world.environment.reset((self._welcome.seed, index, batch), world.now)
            world.next_batch = world.built = batch
        return world

    def _recording(self, worlds: tuple[int, ...]) -> Recording:
        ring = self._recordings.get(worlds)
        if ring is None:
            self._recordings.clear()  # ownership changed: the old shapes do not come back
            ring = self._recordings[worlds] = self._ring(worlds)
        ring.append(ring.pop(0))
        return ring[-1]

    def _ring(self, worlds: tuple[int, ...]) -> list[Recording]:
        """Buffers for these worlds, which share the memory of the actions that a step is given."""
        spec, length = self._source.spec, self._welcome.unroll_length
        slots = spec.slots * len(worlds)
        columns = [slice(i * spec.slots, (i + 1) * spec.slots) for i in range(len(worlds))]
        origin = RolloutOrigin(spec.fingerprint, "main", Ticket(0, 0, worlds), 0, 0, 0)
        poison = self._welcome.poison
        rollouts = [allocate_rollout(spec, length, slots, origin, poison=poison) for _ in range(BUFFERS)]
        row = {name: array[0] for name, array in rollouts[0].action.items()}
        bounded = self.pulse.actions(row, dict(zip(worlds, columns, strict=True)))
        return [
            Recording(UnrollBuffer(rollout, columns, allocate_noise(spec, length, slots), bounded))
            for rollout in rollouts
        ]

    def _policy(self, slots: int) -> Policy:
        if self._weights is None:
            raise RunFailedError("the learner sent a ticket before any weights")
        if slots not in self._policies:
            self._policies = {slots: Policy(self._weights, slots)}
        return self._policies[slots]
