"""A world that moves to another actor goes on there in the same bits, or begins anew and says so."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import WORLDS, rustyrl

from rustyrl.channels import RolloutSender
from rustyrl.rollout import Rollout, Ticket, rollout_arrays
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, Weights, weights_layout
from rustyrl.wire import Welcome, WorldState, decode_header, encode_message
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.fleet import Fleet
from rustyrl_actors.pulse import Pulse

BATCHES, MOVED_AT, LENGTH = 8, 3, 30
ENVIRONMENTS = {
    "cartpole": {"slots": 4},
    "cartpole-object": {"slots": 2},
    "drone-windy": {"slots": 3},
    "drone-object": {"slots": 2},
    f"{WORLDS}/faulty.py:ObjectWalk": {"slots": 3},
}


@pytest.fixture
def link(tmp_path: Path) -> Iterator[RolloutSender]:
    with RolloutSender(f"ipc://{tmp_path}/nobody") as link:
        yield link


class Crew:
    """Fleets of one run, without a learner: the test hands out the tickets."""

    def __init__(self, env: str, config: dict[str, Any], link: RolloutSender) -> None:
        self.source = find_environment(env, config)
        self.spec = self.source.spec
        policy = PolicySpec(self.spec.observation, self.spec.action, (8,), "tanh", normalize=False)
        rng = np.random.default_rng(0)
        arrays = {n: rng.normal(0, 0.5, shape).astype(np.float32) for n, shape in weights_layout(policy).items()}
        self.weights = Weights(policy, arrays)
        self.welcome = Welcome(0, 0, env, config, 5, LENGTH, stagger=True, poison=True)
        self.link = link

    def fleet(self) -> Fleet:
        fleet = Fleet(self.source, self.welcome, 1, Pulse(self.link, None))
        fleet.load(self.weights, 0)
        return fleet

    def answer(self, fleet: Fleet, batch: int, *worlds: int) -> Rollout:
        """What the fleet records for a ticket, copied: its buffers are used again."""
        return copy.deepcopy(fleet.answer(Ticket(batch, 0, worlds), Stages()).rollout)

    def columns(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """What the worlds of a rollout did, where anybody was there."""
        taken = {f"observation {name}": array for name, array in rollout.observation.items()}
        taken |= {f"mask {name}": array for name, array in rollout.action_mask.items()}
        for array in taken.values():
            array[:-1][~rollout.valid] = 0
        return taken | {name: getattr(rollout, name) for name in ("reward", "terminated", "truncated", "valid")}


def sent(state: WorldState, blob: bytes) -> tuple[WorldState, memoryview]:
    """A message as it comes out of the wire."""
    header = decode_header(encode_message(state))
    assert isinstance(header, WorldState)
    return header, memoryview(blob)


@pytest.mark.parametrize(("env", "config"), ENVIRONMENTS.items(), ids=[env.rpartition(":")[2] for env in ENVIRONMENTS])
def test_a_world_that_moves_goes_on_in_the_same_bits(env: str, config: dict[str, Any], link: RolloutSender) -> None:
    crew = Crew(env, config, link)
    stays, gives, takes = crew.fleet(), crew.fleet(), crew.fleet()
    ended = 0
    for batch in range(BATCHES):
        expected = crew.columns(crew.answer(stays, batch, 1))
        ended += int(expected["terminated"].sum() + expected["truncated"].sum())
        if batch < MOVED_AT:
            crew.answer(gives, batch, 1)
            continue
        if batch == MOVED_AT:
            state, blob = gives.give(1)
            assert (state.world, state.next_batch, state.built) == (1, MOVED_AT, 0)
            takes.take(*sent(state, blob))
        found = crew.columns(crew.answer(takes, batch, 1))
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{name} of batch {batch}")
    assert ended or env.startswith("drone")
    for fleet in (stays, gives, takes):
        fleet.close()


@pytest.mark.parametrize("env", ["cartpole", "drone-object"])
def test_a_world_that_is_copied_stays_as_it_is(env: str, link: RolloutSender) -> None:
    crew = Crew(env, {"slots": 2}, link)
    stays, copied, takes = crew.fleet(), crew.fleet(), crew.fleet()
    for batch in range(4):
        expected = crew.columns(crew.answer(stays, batch, 1))
        twins = [copied] if batch < 2 else [copied, takes]
        for fleet in twins:
            found = crew.columns(crew.answer(fleet, batch, 1))
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{name} of batch {batch}")
        if batch == 1:
            assert copied.copy(1) == copied.copy(1)
            takes.take(*sent(*copied.copy(1)))
    assert not copied.copy(7)[0].arrays  # which it never had
    for fleet in (stays, copied, takes):
        fleet.close()


def test_what_cannot_be_saved_or_does_not_fit_begins_anew(
    link: RolloutSender, caplog: pytest.LogCaptureFixture
) -> None:
    crew = Crew("gym:CartPole-v1", {"slots": 2}, link)
    fleet, other = crew.fleet(), crew.fleet()
    crew.answer(fleet, 0, 0)
    assert not fleet.give(0)[0].arrays
    assert not fleet.give(7)[0].arrays  # which it never had
    crew = Crew("cartpole", {"slots": 2}, link)
    fleet, other, anew = crew.fleet(), crew.fleet(), crew.fleet()
    crew.answer(fleet, 0, 0)
    state, blob = fleet.give(0)
    for damaged in (blob[:-1], blob + b"\0", b""):
        other.take(*sent(state, damaged))
    too_small, bytes_of_it = Crew("cartpole", {"slots": 1}, link), b""
    small = too_small.fleet()
    too_small.answer(small, 0, 0)
    state, bytes_of_it = small.give(0)
    other.take(*sent(state, bytes_of_it))
    assert caplog.text.count("begins anew") == 4
    found, expected = (crew.answer(who, 1, 0) for who in (other, anew))
    np.testing.assert_array_equal(found.observation["main"], expected.observation["main"])


@pytest.mark.slow
def test_a_run_that_is_scaled_learns_what_one_that_is_not_learns(start, tmp_path: Path) -> None:
    """The same numbers up to rounding, which the size of an actor's share changes."""
    settings = ("--seed", "3", "--max-policy-lag", "0", "--total-steps", "73728", "--stop-at", "return_mean>=100000")
    settings += ("--set", "batch.worlds=8", "--set", "run.threads=1")
    fixed = start("train", "cartpole", "--actors", "1", *settings)
    assert fixed.wait()[0] == 0
    scaled = start("train", "cartpole", "--actors", "1", *settings)
    for version, actors in ((2, "3"), (6, "2"), (9, "4")):
        scaled.await_version(version)
        code, _, err = rustyrl("scale", actors, "--run", str(scaled.run))
        assert code == 0, err
    code, _, err = rustyrl("status", "--run", str(scaled.run), "--json")
    assert scaled.wait()[0] == 0
    summary = json.loads((scaled.run / "summary.json").read_text())
    assert summary["tickets"]["lost"] == 0
    for row, other in zip(fixed.rows(), scaled.rows(), strict=True):
        for name in ("return_mean", "length_mean", "value_loss", "entropy"):
            if name in row:
                assert other[name] == pytest.approx(row[name], rel=0.02), (row["policy_version"], name)


def test_every_array_of_a_rollout_is_compared() -> None:
    """Lest a new field of rollouts be forgotten above."""
    spec = find_environment("cartpole", {}).spec
    names = {array.name.partition(".")[0] for array in rollout_arrays(spec, 1, spec.slots)}
    assert names == {"observation", "action", "behavior_log_prob", "reward", "terminated", "truncated", "valid"}
