"""PufferLib's trainer on Gymnasium environments, in worker processes where there are cores for them to spin on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import sys
import tempfile
from typing import Any

import gymnasium
import numpy as np
import pufferlib
import pufferlib.emulation
import pufferlib.pytorch
import pufferlib.vector
import torch
from pufferlib.pufferl import PuffeRL
from torch import nn
from work import (
    CLIP,
    ENTROPY,
    GAE_LAMBDA,
    GAMMA,
    MAX_GRADIENT_NORM,
    RATE,
    VALUE,
    Clock,
    Work,
    print_marks,
)

WORKERS = 2


class Network(nn.Module):
    """Actor and critic apart, as PufferLib's trainer calls them."""

    def __init__(self, hidden: tuple[int, ...], inputs: int, action: Any) -> None:
        super().__init__()
        self.log_std = None if hasattr(action, "n") else nn.Parameter(torch.zeros(action.shape))
        self.actor = layers(hidden, inputs, action.n if self.log_std is None else action.shape[0], 0.01)
        self.critic = layers(hidden, inputs, 1, 1.0)

    def forward_eval(self, observation: torch.Tensor, _state: Any = None) -> tuple[Any, torch.Tensor]:
        """Logits, or a normal distribution, and values."""
        chosen = self.actor(observation)
        if self.log_std is not None:
            chosen = torch.distributions.Normal(chosen, self.log_std.exp().expand_as(chosen))
        return chosen, self.critic(observation)

    forward = forward_eval


def layers(hidden: tuple[int, ...], inputs: int, outputs: int, scale: float) -> nn.Sequential:
    """A multilayer perceptron."""
    sizes = (inputs, *hidden)
    pairs = [(pufferlib.pytorch.layer_init(nn.Linear(a, b)), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*sum(pairs, ()), pufferlib.pytorch.layer_init(nn.Linear(sizes[-1], outputs), std=scale))


def make_env(name: str, buf: Any = None, seed: int = 0) -> Any:
    """What a worker steps."""
    env = gymnasium.make(name)
    if isinstance(env.action_space, gymnasium.spaces.Box):
        env = pufferlib.ClipAction(env)
    env = pufferlib.EpisodeStats(env)
    return pufferlib.emulation.GymnasiumPufferEnv(env=env, buf=buf, seed=seed)


def vectorization(work: Work) -> dict[str, Any]:
    """Who steps the environments: half of them while the trainer acts for the rest, or this process in turn."""
    if (os.cpu_count() or 1) <= WORKERS:
        return {"backend": pufferlib.vector.Serial}
    workers = {"num_workers": WORKERS, "batch_size": work.slots // WORKERS, "overwork": True}
    return {"backend": pufferlib.vector.Multiprocessing, **workers}


def settings(work: Work, folder: str) -> dict[str, object]:
    """The ``train`` section of its configuration."""
    return {
        "env": work.env,
        "seed": work.seed,
        "device": "cpu",
        "cpu_offload": False,
        "torch_deterministic": False,
        "precision": "float32",
        "compile": False,
        "use_rnn": False,
        "total_timesteps": work.total_steps,
        "batch_size": work.batch,
        "bptt_horizon": work.unroll_length,
        "minibatch_size": work.minibatch,
        "max_minibatch_size": work.minibatch,
        "update_epochs": work.epochs,
        "optimizer": "adam",
        "learning_rate": RATE,
        "anneal_lr": False,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-5,
        "gamma": GAMMA,
        "gae_lambda": GAE_LAMBDA,
        "clip_coef": CLIP,
        "vf_clip_coef": 1e6,
        "vf_coef": VALUE,
        "ent_coef": ENTROPY,
        "max_grad_norm": MAX_GRADIENT_NORM,
        "vtrace_rho_clip": 1.0,
        "vtrace_c_clip": 1.0,
        "prio_alpha": 0.0,
        "prio_beta0": 1.0,
        "data_dir": folder,
        "checkpoint_interval": 1_000_000,
    }


def main() -> None:
    """Learn for the window's steps."""
    work = Work.parse()
    clock = Clock()
    torch.manual_seed(work.seed)
    np.random.seed(work.seed)
    returns: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        making = functools.partial(make_env, work.env)
        envs = pufferlib.vector.make(making, num_envs=work.slots, seed=work.seed, **vectorization(work))
        network = Network(work.hidden, envs.single_observation_space.shape[0], envs.single_action_space)
        trainer = PuffeRL(settings(work, folder), envs, network)
        trainer.print_dashboard = lambda *_, **__: None
        while trainer.global_step < work.total_steps:
            trainer.evaluate()
            returns += trainer.stats.get("episode_return", [])
            trainer.train()
            clock.mark(trainer.global_step)
        trainer.close()
    print_marks(clock, statistics.mean(returns[-100:]) if returns else None, "pufferlib")


if __name__ == "__main__":
    main()
