"""The bytes that other implementations are held against, and their list; `python tests/test_wire.py` writes both.

A file of a wire version stays as it is for as long as that version lasts: ``--force`` is for one that no release has.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from test_wire import MESSAGES, SPEC

from rustyrl.rollout import EpisodeRows, Rollout, RolloutOrigin, Ticket, allocate_rollout
from rustyrl.weights import PolicySpec, Weights, encode_weights, weights_layout
from rustyrl.wire import WIRE_VERSION, encode_message, encode_rollout
from rustyrl_actors.inference import Policy

DATA = Path(__file__).parent / "data"
LIST = DATA / "golden.json"
ANSWER = RolloutOrigin(
    SPEC.fingerprint, "main", Ticket(70_000, 69_999, (2, 9)), 2, 3, 2**61, {"act": 0.25, "step": 1.5}, fresh=(9,)
)


def answer() -> Rollout:
    """A rollout that a learner admits: T = 4, six slots, numbers that any machine makes alike."""
    rollout = allocate_rollout(SPEC, 4, 6, ANSWER)
    assert rollout.storage is not None
    rollout.storage[:] = 0  # the padding, too
    for array in (*rollout.observation.values(), rollout.action["main"], rollout.reward, rollout.behavior_log_prob):
        array[...] = (np.arange(array.size).reshape(array.shape) % 64 - 32) / 8
    rollout.action["gait"][...] = np.arange(48).reshape(4, 6, 2) % [2, 3]
    rollout.action_mask["gait"][...] = True
    rollout.action_mask["gait"][0, 0] = True, False, False, True, False  # of its choices 0 and 1, which is what it took
    rollout.valid[...] = True
    rollout.valid[2:, 5] = False  # the agent died in step 1, and nobody followed
    rollout.terminated[1, 5] = rollout.terminated[3, 0] = True
    rollout.truncated[0, 4] = rollout.truncated[2, 1] = True
    rollout.final_index = np.array([[0, 4], [2, 1]], np.int32)
    for array in SPEC.observation:
        rollout.final_observation[array.name] = np.full((2, *array.shape), 0.5, np.float32)
    rollout.episodes = EpisodeRows(
        slot=np.array([4, 5, 1, 0], np.int32),
        episode_return=np.array([1.5, -2.0, 0.0, 8.0], np.float32),
        length=np.array([100, 2, 50, 4], np.int32),
        metrics={
            "win": np.array([0, 0, 1, 1], np.float32),
            "arrival_s": np.array([np.nan, np.nan, 1.5, 0.25], np.float32),
        },
    )
    return rollout


def policy() -> Weights:
    """A policy of everything: two observations, normalised; a squashed box and two masked choices."""
    spec = PolicySpec(SPEC.observation, SPEC.action, (5, 3), "silu", normalize=True, box="squashed")
    arrays = {}
    for name, shape in weights_layout(spec).items():
        numbers = ((np.arange(np.prod(shape)) * 37 + len(name)) % 101 - 50).reshape(shape) / 64
        arrays[name] = (np.abs(numbers) + 0.1 if name == "normalizer.variance" else numbers).astype(np.float32)
    return Weights(spec, arrays)


def evaluated(weights: Weights) -> dict[str, Any]:
    """What comes of a policy for three slots, as lists."""
    slots, spec = 3, weights.spec
    observation = {
        array.name: (np.arange(slots * array.width) / 4 - 1).reshape(slots, *array.shape).astype(np.float32)
        for array in spec.observation
    }
    mask = {"gait": np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [0, 1, 1, 0, 0]], bool)}
    noise = np.array([[0.5, -1.25, 0.1, 0.9], [2.0, 0.0, 0.75, 0.25], [-0.5, 0.5, 0.5, 0.5]], np.float32)
    acting = Policy(weights, slots)
    action, bounded = acting.allocate_action(), acting.allocate_action()
    log_prob = np.zeros(slots, np.float32)
    acting.act(observation, noise, action, log_prob, mask)
    acting.bound(action, bounded)
    found = {"observation": observation, "action_mask": mask, "action": action, "bounded": bounded}
    return {
        **{key: {name: array.tolist() for name, array in arrays.items()} for key, arrays in found.items()},
        "noise": noise.tolist(),
        "outputs": acting.forward(observation).tolist(),
        "behavior_log_prob": log_prob.tolist(),
    }


def golden() -> dict[str, bytes]:
    """What each file holds by today's code."""
    header, blob = encode_rollout(answer())
    weights = policy()
    return {
        **{f"{kind}.bin": encode_message(message) for kind, message in MESSAGES.items()},
        "answer.bin": header,
        "answer.blob": bytes(blob),
        "policy.safetensors": encode_weights(weights),
        "policy.json": msgspec.json.format(json.dumps(evaluated(weights)).encode(), indent=1) + b"\n",
    }


def changed(listed: dict[str, str], files: dict[str, bytes]) -> list[str]:
    """The files that are not, or no more, what a list says of them."""
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return sorted(name for name in listed | found if listed.get(name) != found.get(name))


def write(*, force: bool = False, data: Path = DATA) -> list[str]:
    """Write all files and list them; the names of those that would change within their wire version, and were not."""
    files, path = golden(), data / LIST.name
    lists: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    listed = lists.get(str(WIRE_VERSION), {})
    kept = [name for name in changed(listed, files) if name in listed and name != "policy.json"]  # rounded numbers
    if kept and not force:
        return kept
    for name, content in files.items():
        (data / name).write_bytes(content)
    lists[str(WIRE_VERSION)] = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    path.write_text(json.dumps(lists, indent=1) + "\n")
    return []


def main() -> None:
    """Write them, or say why not."""
    if kept := write(force="--force" in sys.argv):
        sys.exit(
            f"{', '.join(kept)} would change within wire version {WIRE_VERSION}; nothing is written. Raise "
            "rustyrl.wire.WIRE_VERSION, and say so in docs/protocol.md and the CHANGELOG; --force if no release has it"
        )
