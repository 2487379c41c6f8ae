"""Stable-Baselines3: one process, environments stepped in turn, each wrapped in a Monitor as its documentation does."""

from __future__ import annotations

import statistics

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
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


class Marks(BaseCallback):
    """Marks the clock when the next rollout begins, which is when an update has ended."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.clock.mark(self.num_timesteps)


def main() -> None:
    """Learn for the window's steps."""
    work = Work.parse()
    clock = Clock()
    model = PPO(
        "MlpPolicy",
        make_vec_env(work.env, n_envs=work.slots, seed=work.seed),
        learning_rate=RATE,
        n_steps=work.unroll_length,
        batch_size=work.minibatch,
        n_epochs=work.epochs,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_range=CLIP,
        ent_coef=ENTROPY,
        vf_coef=VALUE,
        max_grad_norm=MAX_GRADIENT_NORM,
        policy_kwargs={"net_arch": {"pi": list(work.hidden), "vf": list(work.hidden)}, "activation_fn": nn.Tanh},
        seed=work.seed,
        device="cpu",
    )
    model.learn(work.total_steps, callback=Marks(clock))
    clock.mark(model.num_timesteps)
    returns = [episode["r"] for episode in model.ep_info_buffer or ()]
    print_marks(clock, statistics.mean(returns) if returns else None, "stable-baselines3")


if __name__ == "__main__":
    main()
