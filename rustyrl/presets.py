"""Published results on public environments, and the settings that they were had with.

CleanRL's come from its benchmark of ``ppo.py`` and ``ppo_continuous_action.py``, the RL Zoo's from ``benchmark.md`` and
``hyperparams/ppo.yml`` of rl-baselines3-zoo; what the latter leaves open are Stable-Baselines3's defaults. A preset
sets everything that training depends on, so that neither defaults nor what a world recommends can reach it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rustyrl.config import Layer, nearest
from rustyrl.errors import UsageError

__all__ = ["ALL", "PRESETS", "Kind", "Preset", "choose_presets"]

ALL = "all"
Kind = Literal["training return", "greedy evaluation"]
# Their number of environments is worlds x slots here: two worlds, so that two actor processes have one each.
WORLDS = 2


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One published result.

    env: what is trained on.
    published, published_std: mean and deviation of the source; what the deviation is over is in ``note``.
    kind: what the published figure is, and so ours: the mean return of the last training episodes, which act with
        noise, or that of greedy episodes of the final policy.
    source: project and document.
    note: where this differs from what was published.
    total_steps: env steps of a run.
    layer: the configuration, without ``run.seed``, ``run.total_steps`` and ``batch.max_policy_lag``.
    packages: distributions beyond the base install that the environment imports, by the name of their module.
    least: the mean that passes; None is one published deviation below the published mean.
    """

    name: str
    env: str
    published: float
    published_std: float
    kind: Kind
    source: str
    note: str
    total_steps: int
    layer: Layer
    packages: dict[str, str] = {}
    least: float | None = None

    @property
    def required(self) -> float:
        """The mean over seeds that passes."""
        return self.published - self.published_std if self.least is None else self.least


def _layer(
    envs: int, unroll_length: int, *, normalize: bool = False, worlds: int = WORLDS, **ppo: Any
) -> dict[str, dict[str, Any]]:
    """What all presets have in common, for ``envs`` environments; ``normalize`` is of observations and rewards."""
    return {
        # Networks of this size gain nothing from a GPU or a second thread.
        "run": {"device": "cpu", "threads": 1, "eval_episodes": 100, "checkpoint_every": 1000},
        "env": {"slots": envs // worlds},
        "actor": {"stagger": False},  # nobody else cuts first episodes short
        "batch": {"worlds": worlds, "unroll_length": unroll_length},
        "cluster": {"actors": worlds, "auto": "", "listen": "ipc"},
        "policy": {
            "hidden": [64, 64],
            "activation": "tanh",
            "trunk": "separate",
            "normalize": normalize,
            "observation_clip": 10.0,
            "box": "clipped",
            "initial_log_std": 0.0,
        },
        "ppo": {
            "schedule": "constant",
            "stop_kl": 0.0,
            "clip": 0.2,
            "clip_end": -1.0,
            "entropy": 0.0,
            "entropy_end": -1.0,
            "gamma_end": -1.0,
            "vtrace": "auto",  # from lag 2 on
            "vtrace_rho": 1.0,
            "vtrace_c": 1.0,
            "max_gradient_norm": 0.5,
            "normalize_advantage": True,
            "normalize_value": False,
            "normalize_reward": normalize,
            "reward_clip": 10.0,
            "optimizer": "adam",
            "adam_epsilon": 1e-5,
            "weight_decay": 0.0,
            **ppo,
        },
    }


def _cleanrl() -> dict[str, dict[str, Any]]:
    """``ppo.py``: 4 environments x 128 steps, 4 minibatches, 4 epochs."""
    return _layer(
        4,
        128,
        minibatch_size=128,
        epochs=4,
        learning_rate=2.5e-4,
        schedule="linear",
        gamma=0.99,
        gae_lambda=0.95,
        value_clip=0.2,
        value_coefficient=0.5,
        entropy=0.01,
    )


def _zoo(envs: int, unroll_length: int, *, normalize: bool = False, **ppo: Any) -> dict[str, dict[str, Any]]:
    """Stable-Baselines3's defaults below what the Zoo sets.

    Its value loss is the whole mean squared error, ours and CleanRL's the half: its coefficient 0.5 is 1 here.
    """
    defaults = {"minibatch_size": 64, "learning_rate": 3e-4, "value_clip": 0.0, "value_coefficient": 1.0}
    return _layer(envs, unroll_length, normalize=normalize, **{**defaults, **ppo})


CLEANRL_DEVIATION = "The published deviation is over 3 seeds."
ZOO_DEVIATION = "The published deviation is over episodes of one trained policy."
TIME_LIMITS = "Time limits bootstrap from the last observation here; ppo.py takes them for ends."

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="cartpole",
            env="gym:CartPole-v1",
            published=490.0,
            published_std=6.1,
            kind="training return",
            source="CleanRL, benchmark of ppo.py",
            note=f"{CLEANRL_DEVIATION} {TIME_LIMITS}",
            total_steps=500_000,
            layer=_cleanrl(),
        ),
        Preset(
            name="cartpole-zoo",
            env="gym:CartPole-v1",
            published=500.0,
            published_std=0.0,
            least=495.0,
            kind="greedy evaluation",
            source="RL Zoo, benchmark.md and hyperparams/ppo.yml",
            note="500 is the most there is, published without deviation; 495 passes.",
            total_steps=100_000,
            layer=_zoo(
                8,
                32,
                minibatch_size=256,
                epochs=20,
                learning_rate=1e-3,
                schedule="linear",
                gamma=0.98,
                gae_lambda=0.8,
                clip_end=0.0,
            ),
        ),
        Preset(
            name="acrobot",
            env="gym:Acrobot-v1",
            published=-86.4,
            published_std=1.3,
            kind="training return",
            source="CleanRL, benchmark of ppo.py",
            note=f"{CLEANRL_DEVIATION} {TIME_LIMITS}",
            total_steps=500_000,
            layer=_cleanrl(),
        ),
        Preset(
            name="pendulum",
            env="gym:Pendulum-v1",
            published=-172.0,
            published_std=104.0,
            kind="greedy evaluation",
            source="RL Zoo, benchmark.md and hyperparams/ppo.yml",
            note=f"The Zoo explores by gSDE, which is not there: noise is drawn anew each step. {ZOO_DEVIATION}",
            total_steps=100_000,
            layer=_zoo(4, 1024, epochs=10, learning_rate=1e-3, gamma=0.9, gae_lambda=0.95),
        ),
        Preset(
            name="mountaincar",
            env="gym:MountainCar-v0",
            published=-110.0,
            published_std=20.0,
            kind="greedy evaluation",
            source="RL Zoo, benchmark.md and hyperparams/ppo.yml",
            note=f"Observations and rewards normalized, clipped at 10. {ZOO_DEVIATION}",
            total_steps=1_000_000,
            layer=_zoo(16, 16, normalize=True, epochs=4, gamma=0.99, gae_lambda=0.98),
        ),
        Preset(
            name="lunarlander",
            env="gym:LunarLander-v3",
            published=242.0,
            published_std=32.0,
            kind="greedy evaluation",
            source="RL Zoo, benchmark.md and hyperparams/ppo.yml",
            note=f"The published figure is LunarLander-v2's. {ZOO_DEVIATION}",
            total_steps=1_000_000,
            layer=_zoo(16, 1024, epochs=4, gamma=0.999, gae_lambda=0.98, entropy=0.01),
            packages={"Box2D": "box2d"},
        ),
        Preset(
            name="hopper",
            env="gym:Hopper-v5",
            published=2383.0,
            published_std=272.0,
            kind="training return",
            source="CleanRL, benchmark of ppo_continuous_action.py",
            note=f"The published figure is Hopper-v4's. {CLEANRL_DEVIATION} One environment: one world, one actor.",
            total_steps=1_000_000,
            layer=_layer(
                1,
                2048,
                worlds=1,
                normalize=True,
                minibatch_size=64,
                epochs=10,
                learning_rate=3e-4,
                schedule="linear",
                gamma=0.99,
                gae_lambda=0.95,
                value_clip=0.2,
                value_coefficient=0.5,
            ),
            packages={"mujoco": "mujoco"},
        ),
    )
}


def choose_presets(names: list[str]) -> list[Preset]:
    """The presets of these names, each once, in the order of `PRESETS`; ``all`` is every one.

    Raises:
        UsageError: there is none of a name; it says which is nearest.
    """
    for name in names:
        if name not in PRESETS and name != ALL:
            raise UsageError(f"unknown preset {name!r}{nearest(name, [*PRESETS, ALL])}")
    return [preset for name, preset in PRESETS.items() if ALL in names or name in names]
