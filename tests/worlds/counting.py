"""A world whose numbers can be known, and that misbehaves on request: by an error, a NaN, or by being slow."""

from __future__ import annotations

import ctypes
import os
import random
import time
from pathlib import Path

import esper
import gymnasium
import msgspec
import numpy as np

from rustyrl_actors.agent import Agent
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.world import WorldInfo


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    raise_at: int = 0
    nan_at: int = 0
    sleep_ms: float = 0.0
    delay_ms: float = 0.0
    deeds: str = ""  # a folder, see `do_deeds`


HOARD: list[np.ndarray] = []  # what a world that eats memory never lets go


def do_deeds(folder: Path, index: int) -> None:
    """Do what the test asks for by the names of files: ``DEED`` once, by whoever finds it first.

    ``DEED@w3`` is done by world 3, ``DEED@p77`` by process 77, each time they step while the file is there.
    """
    for name in [path.name for path in folder.iterdir()]:
        deed, at, who = name.partition("@")
        if at and who not in (f"w{index}", f"p{os.getpid()}", "all"):
            continue
        if not at:
            try:
                (folder / name).unlink()
            except FileNotFoundError:  # another was faster
                continue
        do(deed)


def do(deed: str) -> None:
    match deed.partition("-"):
        case ("exit", _, code):
            os._exit(int(code))
        case ("leave", _, code):
            raise SystemExit(int(code))
        case ("raise", _, _):
            raise ZeroDivisionError("the world of the test fell over")
        case ("segfault", _, _):
            ctypes.string_at(0)
        case ("spin", _, _):
            spin_for_ever()
        case ("sleep", _, _):
            time.sleep(1e6)
        case ("slow", _, milliseconds):
            time.sleep(int(milliseconds) / 1000)
        case ("print", _, _):
            print("what a world has to say " * 1000)  # more than the page that its log has begun
        case ("hoard", _, megabytes):
            HOARD.append(np.ones(int(megabytes) << 17))
        case _:
            raise ValueError(f"no deed {deed!r}")


def spin_for_ever() -> None:
    while True:
        pass


class CountingProcessor(esper.Processor):
    def __init__(self, world: Counting) -> None:
        self._world = world
        self._clock = random.Random(os.getpid())  # delays are to differ from process to process

    def process(self) -> None:
        world, parameters = self._world, self._world.parameters
        world.ticks += 1
        if parameters.delay_ms:
            time.sleep(parameters.delay_ms / 1000)
        if parameters.sleep_ms:
            time.sleep(self._clock.random() * parameters.sleep_ms / 1000)
        if world.ticks == parameters.raise_at:
            raise ZeroDivisionError("the world of the test fell over")
        if parameters.deeds:
            do_deeds(Path(parameters.deeds), world.index)
        world.position += world.agent.action[:, 0] * 0.1
        world.agent.reward[:] = 1 - np.abs(world.position - world.target)
        if world.ticks == parameters.nan_at:
            world.agent.reward[-1] = np.nan


class Counting:
    """Go to a number on a line."""

    name = "counting"
    default_slots = 4
    Parameters = Parameters

    def __init__(self, slots: int, parameters: Parameters) -> None:
        self.info = WorldInfo(
            observation_space=gymnasium.spaces.Dict(
                {
                    "position": gymnasium.spaces.Box(-10, 10, (1,), np.float32),
                    "target": gymnasium.spaces.Box(-10, 10, (1,), np.float32),
                }
            ),
            action_space=gymnasium.spaces.Box(-1, 1, (1,), np.float32),
            step_s=0.1,
            max_episode_steps=25,
        )
        self.parameters = parameters
        self.ticks = 0
        self.index = -1
        self.position = np.zeros(slots, np.float32)
        self.target = np.zeros(slots, np.float32)
        self.agent = Agent()

    def build(self) -> Agent:
        esper.create_entity(self.agent)
        esper.add_processor(CountingProcessor(self))
        return self.agent

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        self.index = rng.generators[0].bit_generator.seed_seq.entropy[1]  # of (run seed, world, batch, slot)
        self.position[rows] = rng.uniform(-1, 1)
        self.target[rows] = rng.uniform(-1, 1)

    def observe(self, rows: np.ndarray | slice) -> None:
        self.agent.observation["position"][rows, 0] = self.position[rows]
        self.agent.observation["target"][rows, 0] = self.target[rows]


class Talkative(Counting):
    """A world that prints, as games do, more than a pipe holds."""

    name = "talkative"

    def reset(self, rows: np.ndarray, rng: SlotDraws) -> None:
        print("hello from the world " * 2000)
        super().reset(rows, rng)


class Aimless(Counting):
    """A world whose goal names a figure that it does not have."""

    name = "aimless"

    def __init__(self, slots: int, parameters: Parameters) -> None:
        super().__init__(slots, parameters)
        self.info = msgspec.structs.replace(self.info, goal=("sucess>=1",))
