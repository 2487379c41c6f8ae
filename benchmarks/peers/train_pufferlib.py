"""PufferLib's trainer on Gymnasium environments, in worker processes where there are cores for them to spin on."""

from __future__ import annotations

import contextlib
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
    ENV,
    EPOCHS,
    GAE_LAMBDA,
    GAMMA,
    HIDDEN,
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

    def __init__(self, inputs: int, actions: int) -> None:
        super().__init__()
        self.actor = layers(inputs, actions, 0.01)
        self.critic = layers(inputs, 1, 1.0)

    def forward_eval(self, observation: torch.Tensor, _state: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and values."""
        return self.actor(observation), self.critic(observation)

    forward = forward_eval


def layers(inputs: int, outputs: int, scale: float) -> nn.Sequential:
    """A multilayer perceptron."""
    sizes = (inputs, *HIDDEN)
    hidden = [(pufferlib.pytorch.layer_init(nn.Linear(a, b)), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*sum(hidden, ()), pufferlib.pytorch.layer_init(nn.Linear(sizes[-1], outputs), std=scale))


def make_env(buf: Any = None, seed: int = 0) -> Any:
    """What a worker steps."""
    env = pufferlib.EpisodeStats(gymnasium.make(ENV))
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
        "env": ENV,
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
        "update_epochs": EPOCHS,
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
        envs = pufferlib.vector.make(make_env, num_envs=work.slots, seed=work.seed, **vectorization(work))
        network = Network(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
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
