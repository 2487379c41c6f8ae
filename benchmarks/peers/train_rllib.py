"""RLlib on its newer stack of modules and connectors: env runners are processes, the learner is this one."""

from __future__ import annotations

import os

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
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

RUNNERS = 2


def main() -> None:
    """Learn for the window's steps."""
    work = Work.parse()
    clock = Clock()
    cpus = max(RUNNERS + 1, os.cpu_count() or 1)  # else it waits for a core that it thinks it needs
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    config = (
        PPOConfig()
        .environment(work.env)
        .env_runners(
            num_env_runners=RUNNERS,
            num_envs_per_env_runner=work.slots // RUNNERS,
            rollout_fragment_length=work.unroll_length,
        )
        .training(
            train_batch_size_per_learner=work.batch,
            minibatch_size=work.minibatch,
            num_epochs=work.epochs,
            lr=RATE,
            gamma=GAMMA,
            lambda_=GAE_LAMBDA,
            clip_param=CLIP,
            vf_clip_param=float("inf"),
            vf_loss_coeff=VALUE,
            entropy_coeff=ENTROPY,
            grad_clip=MAX_GRADIENT_NORM,
            use_kl_loss=False,
        )
        .rl_module(
            model_config=DefaultModelConfig(
                fcnet_hiddens=list(work.hidden), fcnet_activation="tanh", head_fcnet_hiddens=[], vf_share_layers=False
            )
        )
        .debugging(seed=work.seed, log_level="ERROR")
    )
    algorithm = config.build_algo()
    steps, return_mean = 0, None
    while steps < work.total_steps:
        result = algorithm.train()
        steps = int(result["num_env_steps_sampled_lifetime"])
        if "episode_return_mean" in result["env_runners"]:  # an episode has ended by now
            return_mean = float(result["env_runners"]["episode_return_mean"])
        clock.mark(steps)
    print_marks(clock, return_mean, "ray")
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
