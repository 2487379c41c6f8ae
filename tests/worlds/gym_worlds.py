"""Gymnasium environments whose numbers can be known: one game in every way of resetting, and spaces of every kind.

Imported, they are registered as ``tests/NAME-v0``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array
from gymnasium.wrappers import FlattenObservation, FrameStackObservation
from numpy.typing import NDArray

LIMIT = 7  # steps of a climb, which is then truncated
TOP = 9  # a climb that gets here has terminated
CLIMB_SPACE = spaces.Box(-1, 1000, (3,), np.float32)
FORMS: dict[str, spaces.Space[Any]] = {
    "box": CLIMB_SPACE,
    "dict": spaces.Dict({"_place": spaces.Box(-1, 1000, (2,), np.float32), "height": spaces.Discrete(16)}),
    "tuple": spaces.Tuple((spaces.Box(-1, 1000, (2,), np.float32), spaces.Discrete(16))),
}
CALLS: list[str] = []  # what batches were asked for, in order
GIVEN: list[Any] = []  # the actions that `Actor` got


class Ladder(gymnasium.Env[Any, Any]):
    """Climb by 0 to 3 rungs a step. Sees climb, step and height in ONE array that it returns every time."""

    observation_space = CLIMB_SPACE
    action_space = spaces.Discrete(4)
    metadata: ClassVar = {"render_modes": [], "render_fps": 4}

    def __init__(self) -> None:
        self._seen = np.full(3, -1, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._seen[:] = 0 if seed is not None else self._seen[0] + 1, 0, 0
        return self._seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        assert self._seen[1] < LIMIT
        assert self._seen[2] < TOP
        self._seen[1:] += 1, action
        _, step, height = self._seen
        return self._seen, float(action + step / 4), bool(height >= TOP), bool(step == LIMIT), {}


class LadderBatch(VectorEnv[Any, Any, Any]):
    """The same climbs as a batch, in each of Gymnasium's ways of resetting.

    final: in which form a same-step reset gives final observations; silent: it does not say how it resets.
    What means nothing is filled with numbers that do harm: the reward of a resetting step, rows without a final.
    """

    def __init__(
        self, num_envs: int, mode: str = "NEXT_STEP", form: str = "box", final: str = "objects", silent: bool = False
    ) -> None:
        self.mode, self.form, self.final = AutoresetMode[mode], form, final
        self.metadata = {"render_fps": 4} if silent else {"autoreset_mode": self.mode, "render_fps": 4}
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = FORMS[form], spaces.Discrete(4)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seen = np.full((num_envs, 3), -1, np.float32)
        self._done = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        CALLS.append("reset")
        rows = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        assert rows.dtype == bool
        assert (rows == self._done)[rows].all() or seed is not None
        if seed is not None:
            super().reset(seed=seed)
            self._seen[:, 0] = -1
        self._begin(rows)
        return self._shown(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        CALLS.append("step")
        assert self.action_space.contains(actions)
        before = self._done if self.mode is AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, bool)
        assert before.any() or not self._done.any(), "stepped after an end"
        playing = ~before
        self._seen[playing, 1] += 1
        self._seen[playing, 2] += actions[playing]
        terminated, truncated = self._seen[:, 2] >= TOP, self._seen[:, 1] >= LIMIT
        reward = np.where(playing, actions + self._seen[:, 1] / 4, 1e6)
        self._begin(before)
        terminated[before] = truncated[before] = False
        done = terminated | truncated
        info: dict[str, Any] = {}
        if self.mode is AutoresetMode.SAME_STEP:
            if done.any():
                info = self._final(done)
                self._begin(done)
        else:
            self._done = done
        return self._shown(), reward, terminated, truncated, info

    def _begin(self, rows: NDArray[np.bool_]) -> None:
        self._seen[rows, 0] += 1
        self._seen[rows, 1:] = 0
        self._done = self._done & ~rows

    def _shown(self) -> Any:
        place, height = self._seen[:, :2], self._seen[:, 2].astype(np.int64)
        return {"box": self._seen, "dict": {"_place": place, "height": height}, "tuple": (place, height)}[self.form]

    def _one(self, slot: int) -> Any:
        place, height = self._seen[slot, :2].copy(), np.int64(self._seen[slot, 2])
        forms = {"box": self._seen[slot].copy(), "dict": {"_place": place, "height": height}, "tuple": (place, height)}
        return forms[self.form]

    def _final(self, done: NDArray[np.bool_]) -> dict[str, Any]:
        if self.final == "none":
            return {}
        if self.final == "objects":  # as Gymnasium's own batches have it
            info: dict[str, Any] = {}
            for slot in np.flatnonzero(done):
                info = self._add_info(info, {"final_obs": self._one(int(slot)), "final_info": {"x": 1}}, int(slot))
            return info
        seen = np.where(done[:, None], self._seen, np.nan)
        place, height = seen[:, :2], np.where(done, self._seen[:, 2].astype(np.int64), 10**9)
        batch = {"box": seen, "dict": {"_place": place, "height": height}, "tuple": (place, height)}[self.form]
        if self.final == "stack":
            return {"final_obs": batch, "_final_obs": done}
        # "info": a dict as `_add_info` makes one of values that are dicts, with a mask beside every entry
        assert isinstance(batch, dict)
        return {"final_obs": batch | {f"_{key}": done for key in batch}, "_final_obs": done}


class Zoo(gymnasium.Env[Any, Any]):
    """Sees something of every kind; all of it follows from the step of its episode, which is cut at 3 or dies at 2."""

    observation_space = spaces.Dict(
        {
            "a b/ç": spaces.Box(-9, 9, (2,), np.float32),
            "choice": spaces.Discrete(4, start=-1),
            "codes": spaces.MultiDiscrete([4, 5], start=[1, -1]),
            "grid": spaces.MultiDiscrete([[4, 5], [6, 4]]),
            "flags": spaces.MultiBinary((2, 2)),
            "image": spaces.Box(0, 255, (4, 3, 3), np.uint8),
            "exact": spaces.Box(-9, 9, (2, 1), np.float64),
            "scalar": spaces.Box(-9, 9, (), np.float32),
            "whole": spaces.Box(-9, 9, (2,), np.int32),
            "deep": spaces.Tuple((spaces.Discrete(5), spaces.Dict({"x": spaces.Box(-9, 9, (1,), np.float32)}))),
        }
    )
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self._steps = 0

    @staticmethod
    def seen(t: int) -> dict[str, Any]:
        return {
            "a b/ç": np.array([t, -t], np.float32),
            "choice": np.int64(t - 1),
            "codes": np.array([1 + t, t]),
            "grid": np.array([[t, t + 1], [5 - t, 3 - t]]),
            "flags": np.array([[t == 0, t == 1], [t == 2, t == 3]], np.int8),
            "image": np.full((4, 3, 3), 200 + t, np.uint8),
            "exact": np.array([[t / 3], [-t / 3]]),
            "scalar": np.array(t / 2, np.float32),
            "whole": np.array([-t, t], np.int32),
            "deep": (np.int64(t), {"x": np.array([t + 0.25], np.float32)}),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self.seen(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return self.seen(self._steps), 1.0, bool(action and self._steps == 2), self._steps == 3, {"steps": self._steps}


def zoo_batch(num_envs: int, mode: str = "NEXT_STEP") -> VectorEnv[Any, Any, Any]:
    return SyncVectorEnv([Zoo] * num_envs, autoreset_mode=AutoresetMode[mode])


ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "discrete-from-5": spaces.Discrete(3, start=5),
    "discrete-uint8": spaces.Discrete(3, start=7, dtype=np.uint8),
    "only-choice": spaces.Discrete(1),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-discrete-from": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, -2], [0, 9]]),
    "multi-binary": spaces.MultiBinary(4),
    "multi-binary-2d": spaces.MultiBinary((2, 2)),
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "box-scalar": spaces.Box(-1, 1, (), np.float32),
    "box-2d": spaces.Box(-1, np.array([[1, 2, 3], [4, 5, 6]], np.float32), (2, 3), np.float32),
    "box-float64": spaces.Box(np.array([-0.1, 0.3]), np.array([0.1, 0.7]), dtype=np.float64),  # no float32 is 0.1
    "box-endless": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "box-half-endless": spaces.Box(np.array([0, -np.inf]), np.array([np.inf, 0.1]), dtype=np.float64),
    "dict": spaces.Dict(
        {
            "steer": spaces.Box(-0.3, 0.1, (2,), np.float64),
            "gear": spaces.Discrete(4, start=-1),
            "horn": spaces.Tuple((spaces.MultiBinary(2), spaces.MultiDiscrete([2, 5]))),
        }
    ),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 5, (1,), np.float32))),
}


class Actor(gymnasium.Env[Any, Any]):
    """Holds what it is given against its action space, and notes it."""

    observation_space = spaces.Box(-9, 9, (1,), np.float32)

    def __init__(self, kind: str = "discrete") -> None:
        self.action_space = ACTIONS[kind]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        GIVEN.append(action)
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), 0.0, False, False, {}


class ActorBatch(VectorEnv[Any, Any, Any]):
    """The same, given all actions at once."""

    metadata: ClassVar = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, kind: str = "discrete") -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Actor.observation_space, ACTIONS[kind]
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return create_empty_array(self.single_observation_space, self.num_envs), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        assert self.action_space.contains(actions), actions
        GIVEN.append(actions)
        no = [False] * self.num_envs
        return self.reset()[0], [0] * self.num_envs, no, no, {}


UNSUPPORTED: dict[str, spaces.Space[Any]] = {
    "text": spaces.Text(5),
    "sequence": spaces.Sequence(spaces.Discrete(2)),
    "graph": spaces.Graph(spaces.Box(-1, 1, (2,)), None),
    "one-of": spaces.OneOf((spaces.Discrete(2), spaces.Box(-1, 1, (2,)))),
    "deep-text": spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), spaces.Text(3)))}),
    "huge": spaces.Discrete(10**6),
    "whole-box": spaces.Box(0, 9, (2,), np.int64),
}


class Odd(gymnasium.Env[Any, Any]):
    """Has a space that no policy here is for."""

    def __init__(self, observation: str = "", action: str = "") -> None:
        self.observation_space = UNSUPPORTED[observation] if observation else CLIMB_SPACE
        self.action_space = UNSUPPORTED[action] if action else spaces.Discrete(2)


LOOSE_REWARDS: dict[str, Callable[[], Any]] = {
    "float": lambda: 1.0,
    "int": lambda: 1,
    "bool": lambda: True,
    "float64": lambda: np.float64(1),
    "float32": lambda: np.float32(1),
    "array-0": lambda: np.array(1.0),
    "array-1": lambda: np.array([1.0]),
    "list": lambda: [1],
}
LOOSE_OBSERVATIONS: dict[str, Callable[[float], Any]] = {
    "list": lambda x: [x, 2],
    "tuple": lambda x: (x, 2),
    "float64": lambda x: np.array([x, 2.0]),
    "int64": lambda x: np.array([int(x), 2]),
    "column": lambda x: np.array([[x], [2.0]], np.float32),
    "read-only": lambda x: np.broadcast_to(np.float32(2), 2) if x == 2 else np.array([x, 2], np.float32),
}
SPOILT_OBSERVATIONS: dict[str, Callable[[float], Any]] = {
    "none": lambda x: None,
    "short": lambda x: np.zeros(1, np.float32),
    "transposed": lambda x: np.zeros((2, 2), np.float32),
    "ragged": lambda x: [[1.0], [2.0, 3.0]],
    "words": lambda x: ["one", "two"],
    "dict": lambda x: {"main": np.zeros(2)},
}


class Loose(gymnasium.Env[Any, Any]):
    """Takes liberties: rewards, observations, flags and infos that are not quite what Gymnasium asks for."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, reward: str = "float", observation: str = "list", spoil: str = "") -> None:
        self._reward, self._show = LOOSE_REWARDS.get(reward, lambda: None), LOOSE_OBSERVATIONS[observation]
        self._spoil = spoil
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = int(self.np_random.integers(3))  # so that infos differ from copy to copy
        return self._show(0), {"legal": np.arange(self._steps), 7: "seven"}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[Any, Any]]:
        self._steps += 1
        show = SPOILT_OBSERVATIONS[self._spoil] if self._spoil else self._show
        info = {
            "legal": np.arange(self._steps % 3),
            "winner": None if self._steps % 2 else 1.5,
            "note": {"a": 1} if self._steps % 2 else "text",
            7: object(),
            ("a", "tuple"): [1, [2]],
        }
        return show(1), self._reward(), int(self._steps > 8), np.bool_(False), info


class SpoiltChoice(gymnasium.Env[Any, Any]):
    """Sees a choice that is not one of those it declared."""

    observation_space = spaces.MultiDiscrete([2, 3])
    action_space = spaces.Discrete(2)

    def __init__(self, choice: int = 0) -> None:
        self._choice = choice

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.array([0, 0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.array([self._choice, 0]), 0.0, False, False, {}


class Turned(gymnasium.Env[Any, Any]):
    """Sees as many numbers as it declared, in another order."""

    observation_space = spaces.Box(-9, 9, (2, 3), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros((3, 2), np.float32), {}


class Sized(gymnasium.Env[Any, Any]):
    """Cannot be made without its size, and not with every size; can be rendered. Draws from its generator."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    action_space = spaces.Discrete(2)

    def __init__(self, size: int, gain: float = 1.0, render_mode: str | None = None) -> None:
        if size < 1:
            raise ValueError(f"a size of {size}")
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-9, 9, (size,), np.float32)
        self._gain = gain

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._seen(), self._gain, False, False, {}

    def _seen(self) -> NDArray[np.float32]:
        return self.np_random.uniform(-1, 1, self.observation_space.shape).astype(np.float32)

    def render(self) -> NDArray[np.uint8]:
        return np.zeros((2, 2, 3), np.uint8)


class Fragile(gymnasium.Env[Any, Any]):
    """Its constructor has a bug that is nobody's setting."""

    def __init__(self) -> None:
        raise ZeroDivisionError("a bug of its own")


OPEN: set[int] = set()  # copies of `Counted` that are not closed


class Counted(Ladder):
    """Keeps count of who is open; the third copy falls over when told to."""

    def __init__(self, break_third: bool = False) -> None:
        super().__init__()
        if break_third and len(OPEN) == 2:
            raise ValueError("no third one")
        OPEN.add(id(self))

    def close(self) -> None:
        OPEN.discard(id(self))


def fixed_batch(num_envs: int) -> VectorEnv[Any, Any, Any]:
    """Always three, whatever is asked for."""
    return LadderBatch(3)


def register() -> None:
    """Register them all."""
    here = "worlds.gym_worlds"
    stacked = FlattenObservation.wrapper_spec(), FrameStackObservation.wrapper_spec(stack_size=3)
    gymnasium.register("tests/Ladder-v0", f"{here}:Ladder", reward_threshold=12.3456789)
    gymnasium.register("tests/LadderBatch-v0", vector_entry_point=f"{here}:LadderBatch")
    gymnasium.register("tests/Zoo-v0", f"{here}:Zoo")
    gymnasium.register("tests/ZooBatch-v0", f"{here}:Zoo", vector_entry_point=f"{here}:zoo_batch")
    gymnasium.register("tests/Actor-v0", f"{here}:Actor", max_episode_steps=9)
    gymnasium.register("tests/ActorBatch-v0", vector_entry_point=f"{here}:ActorBatch")
    gymnasium.register("tests/Odd-v0", f"{here}:Odd")
    gymnasium.register("tests/Loose-v0", f"{here}:Loose")
    gymnasium.register("tests/SpoiltChoice-v0", f"{here}:SpoiltChoice")
    gymnasium.register("tests/Turned-v0", f"{here}:Turned")
    gymnasium.register("tests/Sized-v0", f"{here}:Sized")
    gymnasium.register("tests/Fragile-v0", f"{here}:Fragile")
    gymnasium.register("tests/Counted-v0", f"{here}:Counted")
    gymnasium.register("tests/Fixed-v0", f"{here}:Ladder", vector_entry_point=f"{here}:fixed_batch")
    gymnasium.register("tests/Nowhere-v0", "no_such_module_of_tests:Env")
    gymnasium.register(
        "tests/Stacked-v0",
        "gymnasium.envs.classic_control.cartpole:CartPoleEnv",
        vector_entry_point="gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv",
        additional_wrappers=stacked,
        max_episode_steps=20,
    )


register()
