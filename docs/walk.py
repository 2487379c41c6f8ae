"""Follow one rollout through the system and print what it is at every stop; docs/architecture.md shows the output.

Run it with ``python docs/walk.py``. It calls the functions that the two process loops call, in their order, in one
process and without sockets.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from rustyrl.config import PPOConfig
from rustyrl.rollout import RolloutOrigin, Ticket, allocate_rollout
from rustyrl.stages import Stages
from rustyrl.weights import PolicySpec, decode_weights, encode_weights
from rustyrl.wire import RolloutHeader, decode_header, decode_rollout, encode_rollout
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.inference import Policy
from rustyrl_actors.noise import allocate_noise, fill_noise, noise_generator
from rustyrl_actors.unroll import OwnedWorld, UnrollBuffer, unroll
from rustyrl_learner.adam import Adam
from rustyrl_learner.advantage import training_batch
from rustyrl_learner.batch import BatchBuffer
from rustyrl_learner.ingest import admit
from rustyrl_learner.network import ActorCritic, export_weights
from rustyrl_learner.ppo import ppo_update

SEED, LENGTH, WORLDS, SLOTS = 1, 8, (0, 1), 4


def main() -> None:
    """Walk the eleven stops."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    source = find_environment("drone", {"slots": SLOTS})
    spec = source.spec
    policy_spec = PolicySpec(spec.observation, spec.action, (64, 64), "relu", normalize=False)
    network = ActorCritic(policy_spec, shared=False, initial_log_std=0.0)
    ticket = Ticket(batch=0, policy_version=0, worlds=WORLDS)
    print(f"ticket      batch {ticket.batch}, policy version {ticket.policy_version}, worlds {ticket.worlds}")

    policy = Policy(decode_weights(encode_weights(export_weights(network, None))), SLOTS * len(WORLDS))
    origin = RolloutOrigin(spec.fingerprint, "main", ticket, 0, 0, 7)
    rollout = allocate_rollout(spec, LENGTH, SLOTS * len(WORLDS), origin)
    columns = [slice(i * SLOTS, (i + 1) * SLOTS) for i in range(len(WORLDS))]
    noise = allocate_noise(spec, LENGTH, SLOTS * len(WORLDS))
    worlds = []
    for world, where in zip(WORLDS, columns, strict=True):
        environment = source.make(stagger=True)
        now = allocate_rows(spec)
        environment.reset((SEED, world, ticket.batch), now)
        worlds.append(OwnedWorld(world, environment, 0, now))
        fill_noise(noise, spec, where, noise_generator(SEED, world, ticket.batch))
    unroll(worlds, policy, UnrollBuffer(rollout, columns, noise), Stages())
    print(f"1 step      reward of world 0, slot 0: {floats(rollout.reward[:, 0])}")
    print(f"2 unroll    observation {rollout.observation['main'].shape}, action {rollout.action['main'].shape}")
    print(f"            raw action at t = 0, slot 0: {floats(rollout.action['main'][0, 0])}")
    print(f"            behavior_log_prob there: {rollout.behavior_log_prob[0, 0]:.3f}")

    header, blob = encode_rollout(rollout)
    print(f"3 encode    header {len(header)} bytes of msgpack, blob {blob.nbytes} bytes")
    shared = np.shares_memory(np.frombuffer(blob, np.uint8), rollout.reward)
    print(f"4 send      two frames; the blob is the rollout's own memory: {shared}")

    message = decode_header(header)
    assert isinstance(message, RolloutHeader)  # noqa: S101
    received = decode_rollout(message, blob)
    admit(received, spec, LENGTH, learner_incarnation=0)
    listed = msgspec.msgpack.decode(message.arrays)
    print(f"5 admit     {len(listed)} arrays checked, ticket {received.origin.ticket.batch} answered")

    buffer = BatchBuffer(0, spec, LENGTH, len(WORLDS))
    buffer.place(received)
    batch = buffer.to_device(torch.device("cpu"))
    print(f"6 batch     observation {tuple(batch.observation.shape)}, reward {tuple(batch.reward.shape)}")
    config = PPOConfig(minibatch_size=32)
    training = training_batch(network, batch, config)
    advantage = training.advantage.reshape(LENGTH, -1)
    print(f"7 advantage of world 0, slot 0: {floats(advantage[:, 0].numpy())}")
    before = encode_weights(export_weights(network, None))
    parameters, gradient = network.flat()
    optimizer = Adam(parameters.tensor, gradient.tensor, epsilon=config.adam_epsilon)
    losses = ppo_update(network, optimizer, training, config, 1e-3, torch.Generator().manual_seed(SEED))
    print(f"8 update    {losses.epochs} epochs, first ratio off by {losses.first_ratio_error:.0e}, ", end="")
    print(f"value loss {losses.value_loss:.3f}, approximate KL {losses.approx_kl:.4f}")

    after = encode_weights(export_weights(network, None))
    print(f"9 export    {len(after)} bytes of safetensors, changed: {before != after}")
    weights = decode_weights(after)
    print(f"10 publish  version 1: {len(weights.arrays)} arrays, the same bytes for every actor")
    policy.load(weights)
    action = policy.allocate_action()
    policy.act({name: array[-1] for name, array in rollout.observation.items()}, None, action)
    print(f"11 act      greedy under version 1, slot 0: {floats(action['main'][0])}")
    for world in worlds:
        world.environment.close()


def floats(values: np.ndarray) -> str:
    """A few numbers for people."""
    return " ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
