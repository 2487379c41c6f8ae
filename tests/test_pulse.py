"""What an actor does is told before it is done: to the launcher's black box, and to the learner by leases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clusters import poll

from rustyrl.black_box import BlackBox, Deed
from rustyrl.channels import Received, RolloutReceiver, RolloutSender
from rustyrl.rollout import RolloutOrigin, Ticket, allocate_rollout
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, Weights, weights_layout
from rustyrl.wire import Hello, Lease
from rustyrl_actors import pulse as module
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.pulse import LEASE_S, Pulse
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Ward:
    """An actor's pulse, and all who feel it."""

    def __init__(self, folder: Path, clock: Clock, box: BlackBox | None) -> None:
        self.clock, self.box = clock, box
        self.receiver = RolloutReceiver(f"ipc://{folder}/link")
        self.link = RolloutSender(self.receiver.address)
        self.link.send(Hello(0, 1, 2, "here"))
        poll(lambda: list(self.receiver.receive(1.0)), "the link")
        self.pulse = Pulse(self.link, box)

    def leases(self) -> list[int]:
        """What the learner has been told since the last call: of how many steps."""
        self.link.send(Hello(0, 1, 2, "here"))  # after all that was sent before
        heard: list[Received] = []
        poll(lambda: heard.extend(self.receiver.receive(1.0)) or isinstance(heard[-1].message, Hello), "the leases")
        return [received.message.steps for received in heard[:-1] if isinstance(received.message, Lease)]

    def close(self) -> None:
        self.link.close()
        self.receiver.close()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def ward(tmp_path, clock) -> Iterator[Ward]:
    box = BlackBox.create()
    ward = Ward(tmp_path, clock, box)
    yield ward
    ward.close()
    if box is not None:
        box.close()


def test_each_thing_is_noted_as_it_is_begun(ward):
    ward.pulse.build(3, 12)
    assert ward.box.deed() == Deed(3, 12, 12, -1)
    ward.pulse.step(3, 12, 7, 0)
    assert ward.box.deed() == Deed(3, 12, 7, 0)
    ward.pulse.step(4, 12, 12, 5)
    assert ward.box.deed() == Deed(4, 12, 12, 5)
    ward.pulse.rest(answered=True)
    assert ward.box.deed().idle
    assert ward.box.answered == 1
    ward.pulse.rest(answered=False)  # its ticket is of no account
    assert ward.box.answered == 1
    ward.pulse.rest(answered=True)
    assert ward.box.answered == 2


def test_a_long_unroll_is_told_of_by_leases_that_count_its_steps(ward, clock):
    for t in range(10):
        clock.now += LEASE_S / 4
        ward.pulse.step(0, 0, 0, t)
    assert ward.leases() == [5, 10]  # once more than a lease is over since the last
    for t in range(3):
        clock.now += LEASE_S / 4
        ward.pulse.step(0, 0, 0, t)
    assert ward.leases() == []
    ward.pulse.lease()
    clock.now += LEASE_S
    ward.pulse.step(0, 0, 0, 0)
    assert ward.leases() == [13]
    clock.now += 0.001
    ward.pulse.step(0, 0, 0, 0)
    assert ward.leases() == [15]


def test_without_a_learner_a_lease_is_not_waited_for(tmp_path, clock):
    with RolloutSender(f"ipc://{tmp_path}/nobody") as link:
        Pulse(link, None).lease()


def test_without_a_box_the_learner_is_told_all_the_same(tmp_path, clock):
    ward = Ward(tmp_path, clock, None)
    ward.pulse.build(0, 0)
    clock.now += 2 * LEASE_S
    ward.pulse.step(0, 0, 0, 0)
    ward.pulse.rest(answered=True)
    assert ward.leases() == [1]
    arrays = ward.pulse.actions({"turn": np.full((3,), 7, np.int32)}, {0: slice(0, 3)})
    assert (arrays["turn"].tolist(), arrays["turn"].dtype) == ([0, 0, 0], np.int32)
    ward.close()


def test_the_last_actions_are_where_the_box_is_read(ward):
    arrays = ward.pulse.actions({"turn": np.zeros((3,), np.int32)}, {0: slice(0, 1), 5: slice(1, 3)})
    arrays["turn"][...] = [4, 5, 6]
    ward.pulse.step(5, 0, 0, 0)
    last = ward.box.last_action()
    assert last is not None
    assert last["turn"].tolist() == [5, 6]


def cartpoles(pulse: Pulse | None) -> tuple[list[OwnedWorld], Policy, UnrollBuffer]:
    """Worlds 7 and 8 of two slots each, ready for five steps of batch 6; their episodes began with batch 2."""
    spec = (source := find_environment("cartpole", {"slots": 2})).spec
    columns = {7: slice(0, 2), 8: slice(2, 4)}
    origin = RolloutOrigin(spec.fingerprint, "main", Ticket(6, 6, (7, 8)), 0, 0, 0)
    rollout, noise = allocate_rollout(spec, 5, 4, origin), allocate_noise(spec, 5, 4)
    policy_spec = PolicySpec(spec.observation, spec.action, (4,), "tanh", normalize=False)
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in weights_layout(policy_spec).items()}
    worlds = [OwnedWorld(index, source.make(), 6, allocate_rows(spec), built=2) for index in columns]
    for world, part in zip(worlds, columns.values(), strict=True):
        world.environment.reset((0, world.index, 2), world.now)
        fill_noise(noise, spec, part, noise_generator(0, world.index, 6))
    row = {name: array[0] for name, array in rollout.action.items()}
    bounded = {} if pulse is None else pulse.actions(row, columns)
    return worlds, Policy(Weights(policy_spec, arrays), 4), UnrollBuffer(rollout, [*columns.values()], noise, bounded)


def test_a_world_that_raises_in_a_step_leaves_that_step_in_the_box(ward):
    """By a real unroll: what is noted is the world, the step and the actions that it was given."""
    worlds, policy, buffer = cartpoles(ward.pulse)
    box, raised_at = ward.box, 3
    step = worlds[1].environment.step

    def break_down(action, rows):
        if box.deed().step == raised_at:
            raise RuntimeError("the world broke")
        return step(action, rows)

    worlds[1].environment.step = break_down
    with pytest.raises(RuntimeError, match="the world broke") as caught:
        unroll(worlds, policy, buffer, Stages(), ward.pulse)
    assert caught.value.__notes__ == ["raised by world 8 of 'cartpole' in step 3 of batch 6"]
    assert box.deed() == Deed(8, 6, 2, raised_at)
    last = box.last_action()
    assert last is not None
    for name, array in buffer.rollout.action.items():
        assert last[name].tolist() == array[raised_at, buffer.columns[1]].tolist()


def test_an_unroll_is_the_same_with_and_without_a_pulse(ward):
    found = []
    for pulse in (None, ward.pulse):
        worlds, policy, buffer = cartpoles(pulse)
        rollout = unroll(worlds, policy, buffer, Stages(), pulse)
        found.append([array.tobytes() for array in (rollout.reward, *rollout.action.values())])
    assert found[0] == found[1]
    assert ward.box.deed() == Deed(8, 6, 2, 4)  # the last world's last step
    assert ward.leases() == []
    ward.pulse.lease()
    assert ward.leases() == [10]  # each world's steps
