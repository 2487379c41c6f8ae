"""An actor that was written from docs/protocol.md alone: it imports nothing of rustyrl, and plays CartPole.

``python tests/foreign_actor.py --join tcp://127.0.0.1:5555`` beside ``rustyrl learner cartpole``. It prints what it did
as a JSON object when the run is over. Where it does what others need not do, or does without, a comment says so.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import secrets
import socket
import struct
import sys
import time

import msgpack
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

WIRE_VERSION = 5
JOIN_S, AWAY_S, LEASE_S = 60.0, 300.0, 1.0
PAD_BYTES = 64
ITEMS = {"float32": "<f4", "int32": "<i4", "int64": "<i8", "uint8": "u1", "bool": "?"}
# As `rustyrl envs --json` has it.
CARTPOLE = {
    "action": [
        {"counts": [2], "high": [], "kind": "discrete", "low": [], "masked": False, "name": "main", "shape": []}
    ],
    "env": "cartpole",
    "max_episode_steps": 500,
    "metrics": [],
    "observation": [{"dtype": "float32", "name": "main", "shape": [4]}],
    "parameters": {"force_n": 10.0, "gravity_m_s2": 9.8},
    "slots": 16,
    "step_s": 0.02,
}


# The environment's fingerprint


def canonical(value):
    """JSON as the fingerprint has it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if not isinstance(value, float):
        return json.dumps(value, ensure_ascii=False)
    mantissa, _, exponent = repr(value).partition("e")
    if not exponent:
        return mantissa
    if int(exponent) == -5:
        digits = mantissa.removeprefix("-").replace(".", "")
        return f"{'-' * (value < 0)}0.0000{digits}"
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def fingerprint(spec):
    keys = ("action", "env", "max_episode_steps", "metrics", "observation", "parameters", "slots", "step_s")
    content = {key: spec[key] for key in keys} | {"env": spec["env"].rpartition("/")[2]}
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def cartpole_spec(env_config):
    """CartPole as the learner has it set."""
    settings = dict(env_config)
    slots = settings.pop("slots", CARTPOLE["slots"])
    parameters = dict(CARTPOLE["parameters"])
    for name, value in settings.items():
        parameters[name] = type(parameters[name])(value)
    return {**CARTPOLE, "slots": slots, "parameters": parameters}


# The policy


class Policy:
    """The blob of a weights message, ready to act."""

    def __init__(self, blob):
        (size,) = struct.unpack_from("<Q", blob)
        listed = json.loads(bytes(blob[8 : 8 + size]))
        self.spec = json.loads(listed.pop("__metadata__")["rustyrl.policy"])
        if self.spec["format"] != 2:
            raise ValueError(f"a policy of format {self.spec['format']}, expected 2")
        self.arrays = {}
        for name, about in listed.items():
            first, last = (8 + size + offset for offset in about["data_offsets"])
            self.arrays[name] = np.frombuffer(blob[first:last], "<f4").reshape(about["shape"])

    def outputs(self, observation):
        """Logits and means `[W, outputs]`."""
        spec, arrays = self.spec, self.arrays
        slots = len(next(iter(observation.values())))
        x = np.concatenate([observation[a["name"]].reshape(slots, -1) for a in spec["observation"]], 1)
        x = x.astype(np.float32)
        if spec["normalize"]:
            scale = np.sqrt(arrays["normalizer.variance"] + np.float32(1e-8))
            limit = np.float32(spec["observation_clip"])
            x = np.clip((x - arrays["normalizer.mean"]) / scale, -limit, limit)
        for layer in range(len(spec["hidden"]) + 1):
            x = x @ arrays[f"policy.{layer}.weight"] + arrays[f"policy.{layer}.bias"]
            if layer < len(spec["hidden"]):
                x = activated(x, spec["activation"])
        return x

    def act(self, observation, noise, masks):
        """Raw actions, what the world is given, and the log-probability `[W]`, of noise `[W, numbers]`."""
        outputs = self.outputs(observation)
        raw, given, log_prob = {}, {}, np.zeros(len(outputs), np.float32)
        column = box = start = 0
        for part in self.spec["action"]:
            name, numbers = part["name"], math.prod(part["shape"])
            drawn = noise[:, column : column + numbers]
            if part["kind"] == "box":
                log_std = self.arrays["log_std"][box : box + numbers]
                action = outputs[:, start : start + numbers] + np.exp(log_std) * drawn
                bounded, term = self.bounded(part, action)
                density = -0.5 * (drawn**2).sum(1) - log_std.sum() - 0.5 * numbers * math.log(2 * math.pi)
                log_prob += density - term
                box, start = box + numbers, start + numbers
            else:
                action = np.zeros(drawn.shape, np.int64)
                first = start
                for number, count in enumerate(part["counts"]):
                    logits = outputs[:, start : start + count]
                    if part["masked"]:
                        logits = np.where(masks[name][:, start - first : start - first + count], logits, -1e9)
                    action[:, number], chosen = choices(logits, drawn[:, number])
                    log_prob += chosen
                    start += count
                bounded = action
            raw[name], given[name] = (a.reshape(len(outputs), *part["shape"]) for a in (action, bounded))
            column += numbers
        return raw, given, log_prob

    def bounded(self, part, action):
        """A box within its bounds, and what that takes from the log-probability."""
        low, high = np.array(part["low"], np.float32), np.array(part["high"], np.float32)
        if self.spec["box"] == "clipped":
            return np.clip(action, low, high), np.float32(0)
        half = (high - low) / 2
        slope = 2 * (math.log(2) - action - np.log1p(np.exp(-2 * action)))
        return low + half + half * np.tanh(action), (slope + np.log(half)).sum(1)


def activated(z, activation):
    if activation == "tanh":
        return np.tanh(z)
    if activation == "relu":
        return np.maximum(z, 0)
    if activation == "elu":
        return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))
    return z / (1 + np.exp(-z))


def choices(logits, uniform):
    """One choice `[W]` of each row, and its log-probability."""
    logits = logits - logits.max(1, keepdims=True)
    total = np.cumsum(np.exp(logits), 1)
    chosen = np.minimum((total <= uniform[:, None] * total[:, -1:]).sum(1), logits.shape[1] - 1)
    return chosen, logits[np.arange(len(logits)), chosen] - np.log(total[:, -1])


# The worlds


class World:
    """One world of CartPole: E carts, and the batch that they stand before."""

    def __init__(self, spec, seed, index, batch, stagger):
        self.rng = np.random.default_rng((seed, index, batch))
        self.spec, self.next_batch = spec, batch
        slots = spec["slots"]
        self.state = self.rng.uniform(-0.05, 0.05, (slots, 4))
        self.length, self.earned = np.zeros(slots, int), np.zeros(slots)
        limit = spec["max_episode_steps"]
        self.used = self.rng.integers(0, limit, slots) if stagger else np.zeros(slots, int)

    def step(self, action):
        """Reward, terminated, truncated, and what was seen before the resets, as [(slot, final, return, length)]."""
        _, v, angle, spin = self.state.T
        force = np.where(action == 1, 1.0, -1.0) * self.spec["parameters"]["force_n"]
        push = (force + 0.05 * spin**2 * np.sin(angle)) / 1.1
        turn = self.spec["parameters"]["gravity_m_s2"] * np.sin(angle) - np.cos(angle) * push
        turn /= 0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1)
        pull = push - 0.05 * turn * np.cos(angle) / 1.1
        self.state = self.state + 0.02 * np.stack([v, pull, spin, turn], 1)
        self.length, self.earned, self.used = self.length + 1, self.earned + 1, self.used + 1
        terminated = (abs(self.state[:, 0]) > 2.4) | (abs(self.state[:, 2]) > math.radians(12))
        truncated = (self.used >= self.spec["max_episode_steps"]) & ~terminated
        ends = []
        for slot in np.flatnonzero(terminated | truncated):
            ends.append((slot, self.state[slot].astype(np.float32), self.earned[slot], self.length[slot]))
            self.state[slot] = self.rng.uniform(-0.05, 0.05, 4)
            self.length[slot] = self.earned[slot] = self.used[slot] = 0
        return np.ones(len(terminated), np.float32), terminated, truncated, ends


# The link


def packed(arrays):
    """The blob of a rollout, and what its header says of it."""
    listed, pieces = [], []
    for name, array in arrays.items():
        content = np.ascontiguousarray(array.astype(ITEMS[array.dtype.name])).tobytes()
        listed.append({"name": name, "shape": list(array.shape), "dtype": array.dtype.name})
        pieces.append(content + bytes(-len(content) % PAD_BYTES))
    return listed, b"".join(pieces)


class Actor:
    """Joins a learner and answers its tickets until it says goodbye."""

    def __init__(self, address, index, key=None):
        self.context = zmq.Context()
        self.link = self.context.socket(zmq.DEALER)
        self.link.setsockopt(zmq.IDENTITY, b"f" + os.urandom(15))
        self.link.setsockopt(zmq.IMMEDIATE, 1)
        self.link.setsockopt(zmq.SNDTIMEO, int(AWAY_S * 1000))
        if key is not None:
            self.link.setsockopt(zmq.CURVE_SERVERKEY, key["learner"].encode())
            self.link.setsockopt(zmq.CURVE_PUBLICKEY, key["public"].encode())
            self.link.setsockopt(zmq.CURVE_SECRETKEY, key["secret"].encode())
        self.breaks = self.link.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.link.connect(address)
        host = socket.gethostname()[:255].encode("ascii", "replace").decode()
        self.hello = {"index": index, "incarnation": secrets.randbits(62), "pid": os.getpid(), "host": host}
        self.worlds, self.policy, self.version, self.welcome = {}, None, None, None
        self.steps, self.leased = 0, time.monotonic()
        self.done = {"rollouts": 0, "versions": [], "joined": 0, "states": 0, "fresh": []}

    def send(self, kind, blob=b"", **fields):
        self.link.send_multipart([msgpack.packb([WIRE_VERSION, {"type": kind, **fields}]), blob])

    def offer(self, kind, **fields):
        """Send, or not if nobody takes it now."""
        try:
            self.link.send_multipart([msgpack.packb([WIRE_VERSION, {"type": kind, **fields}]), b""], zmq.NOBLOCK)
        except zmq.Again:
            return

    def lease(self):
        if time.monotonic() - self.leased >= LEASE_S:
            self.leased = time.monotonic()
            self.offer("lease", steps=self.steps)

    def receive(self, timeout_s):
        """The next message as (type, fields, blob), None if there is none."""
        if not self.link.poll(timeout_s * 1000):
            return None
        header, blob = self.link.recv_multipart()
        version, fields = msgpack.unpackb(header)
        if version != WIRE_VERSION:
            sys.exit(f"the learner speaks wire version {version}, this actor {WIRE_VERSION}")
        return fields.pop("type"), fields, blob

    def broke(self):
        """Whether the connection broke since this was asked last."""
        found = False
        while self.breaks.poll(0):
            recv_monitor_message(self.breaks)
            found = True
        return found

    def join(self, limit_s):
        """Say hello each second until that is answered."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.offer("hello", **self.hello)
            said = time.monotonic()
            while (left := said + LEASE_S - time.monotonic()) > 0:
                kind, fields, _ = self.receive(left) or ("", {}, b"")
                if kind == "refusal":
                    sys.exit(f"refused: {fields['reason']}")
                if kind == "goodbye":
                    sys.exit("the run is over")
                if kind == "welcome":
                    return self.get_ready(fields)
        sys.exit(f"no welcome within {limit_s:.0f} s")

    def get_ready(self, welcome):
        own = ("index", "learner_incarnation")
        if self.welcome is not None and any(self.welcome[key] != welcome[key] for key in welcome if key not in own):
            sys.exit("another run has begun at this address")
        self.welcome, self.version = welcome, None
        if welcome["env"] != "cartpole":
            self.send("refusal", reason=f"this actor plays cartpole alone, not {welcome['env']!r}")
            sys.exit(f"the run is of {welcome['env']!r}")
        self.spec = cartpole_spec(welcome["env_config"])
        self.send("ready", fingerprint=fingerprint(self.spec))
        self.done["joined"] += 1

    def run(self):
        self.join(JOIN_S)
        heard = time.monotonic()
        while True:
            received = self.receive(LEASE_S)
            if received is None:
                if self.broke():
                    self.join(AWAY_S)
                    heard = time.monotonic()
                elif time.monotonic() - heard > AWAY_S:
                    sys.exit(f"nothing was heard of the learner for {AWAY_S:.0f} s")
                self.lease()
                continue
            heard = time.monotonic()
            if self.take(*received):
                return self.done

    def take(self, kind, fields, blob):
        """Do what a message says; whether the run is over."""
        if kind == "weights":
            self.policy, self.version = Policy(blob), fields["policy_version"]
            self.done["versions"].append(self.version)
        elif kind == "ticket":
            self.answer(fields)
        elif kind in ("hand-over", "snapshot"):  # it has no states to give: the worlds begin anew elsewhere
            for world in fields["worlds"]:
                if kind == "hand-over":
                    self.worlds.pop(world, None)
                self.send("world-state", world=world, next_batch=0, built=0, arrays=[])
                self.done["states"] += 1
        elif kind == "welcome":
            self.get_ready(fields)
        elif kind == "rejoin":
            self.join(AWAY_S)
        elif kind == "refusal":
            sys.exit(f"refused: {fields['reason']}")
        elif kind == "goodbye":
            self.send("goodbye")
        # Else a lease, or a world-state of another kind of actor: such a world begins anew with its ticket.
        return kind == "goodbye"

    def answer(self, ticket):
        if ticket["policy_version"] != self.version:
            sys.exit(f"a ticket for version {ticket['policy_version']}, the weights are {self.version}")
        batch, welcome = ticket["batch"], self.welcome
        fresh = []
        for index in ticket["worlds"]:
            if index not in self.worlds or self.worlds[index].next_batch != batch:
                self.worlds[index] = World(self.spec, welcome["seed"], index, batch, welcome["stagger"])
                fresh.append(index)
        started = time.monotonic()
        listed, blob = packed(self.unroll([self.worlds[index] for index in ticket["worlds"]], batch))
        for index in ticket["worlds"]:
            self.worlds[index].next_batch = batch + 1
        self.send(
            "rollout",
            blob,
            fingerprint=fingerprint(self.spec),
            policy_name="main",
            batch=batch,
            policy_version=ticket["policy_version"],
            worlds=ticket["worlds"],
            fresh=fresh,
            learner_incarnation=ticket["learner_incarnation"],
            actor_index=welcome["index"],
            actor_incarnation=self.hello["incarnation"],
            stage_s={"step": time.monotonic() - started},
            arrays=listed,
        )
        self.done["rollouts"] += 1
        self.done["fresh"].append([batch, fresh])

    def unroll(self, worlds, batch):
        """T steps of these worlds, as the arrays of a rollout."""
        length, slots = self.welcome["unroll_length"], self.spec["slots"]
        width = slots * len(worlds)
        rows = {
            "observation.main": np.zeros((length + 1, width, 4), np.float32),
            "action.main": np.zeros((length, width), np.int64),
            "behavior_log_prob": np.zeros((length, width), np.float32),
            "reward": np.zeros((length, width), np.float32),
            "terminated": np.zeros((length, width), bool),
            "truncated": np.zeros((length, width), bool),
            "valid": np.ones((length, width), bool),
        }
        cut, finals, episodes = [], [], []
        rng = np.random.default_rng((self.welcome["seed"], 1, batch, *(world.next_batch for world in worlds)))
        for t in range(length):
            for place, world in enumerate(worlds):
                rows["observation.main"][t, place * slots : (place + 1) * slots] = world.state
            noise = rng.random((width, 1), np.float32)
            seen = {"main": rows["observation.main"][t]}
            action, given, rows["behavior_log_prob"][t] = self.policy.act(seen, noise, {})
            rows["action.main"][t] = action["main"]
            for place, world in enumerate(worlds):
                self.steps += 1
                self.lease()
                here = slice(place * slots, (place + 1) * slots)
                reward, terminated, truncated, ends = world.step(given["main"][here])
                rows["reward"][t, here], rows["terminated"][t, here] = reward, terminated
                rows["truncated"][t, here] = truncated
                for slot, final, earned, steps in ends:
                    episodes.append((place * slots + slot, earned, steps))
                    if truncated[slot]:
                        cut.append((t, place * slots + slot))
                        finals.append(final)
        for place, world in enumerate(worlds):
            rows["observation.main"][length, place * slots : (place + 1) * slots] = world.state
        slot, earned, steps = zip(*episodes, strict=True) if episodes else ((), (), ())
        return {
            **rows,
            "final_index": np.array(cut, np.int32).reshape(-1, 2),
            "final_observation.main": np.array(finals, np.float32).reshape(-1, 4),
            "episode.slot": np.array(slot, np.int32),
            "episode.return": np.array(earned, np.float32),
            "episode.length": np.array(steps, np.int32),
        }

    def close(self):
        self.link.disable_monitor()
        self.breaks.close(0)
        self.link.close(linger=1000)
        self.context.term()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--join", required=True, help="tcp://HOST:PORT or ipc://PATH")
    parser.add_argument("--index", type=int, default=-1)
    parser.add_argument("--key", type=pathlib.Path, help="NAME.key, for a learner beyond loopback")
    arguments = parser.parse_args()
    key = json.loads(arguments.key.read_text()) if arguments.key else None
    actor = Actor(arguments.join, arguments.index, key)
    try:
        print(json.dumps(actor.run()))
    finally:
        actor.close()


if __name__ == "__main__":
    main()
