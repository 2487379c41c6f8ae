"""What a resumed run goes on with, and what becomes of settings that were changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from rustyrl.config import Config, PPOConfig, build_config, read_config
from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec, read_spec

__all__ = ["BEHIND_S", "RULES", "Rule", "check_resume", "resume_config", "seconds_before"]

BEHIND_S = 60.0  # of training that is given up at most so that what follows is in the same bits


@dataclass(frozen=True, slots=True)
class Rule:
    """What a resumed run does with a setting that was changed.

    kind: it is taken over, taken over with a warning, or refused
    why: it is risky, or what to do instead
    when: what the new configuration must be like for it to be risky; else it is simply taken over
    condition: that in words
    """

    kind: Literal["honoured", "risky", "refused"]
    why: str = ""
    when: Callable[[Config], bool] | None = None
    condition: str = ""

    def now(self, config: Config) -> Literal["honoured", "risky", "refused"]:
        """What it comes to with this configuration."""
        return self.kind if self.when is None or self.when(config) else "honoured"


def has_schedule(config: Config) -> bool:
    """Whether anything changes towards ``run.total_steps``."""
    ppo: PPOConfig = config.ppo
    return ppo.schedule == "linear" or max(ppo.clip_end, ppo.entropy_end, ppo.gamma_end) >= 0


def follows_kl(config: Config) -> bool:
    """Whether the learning rate follows the KL."""
    return config.ppo.schedule == "kl"


HONOURED = Rule("honoured")
OTHER_ENVIRONMENT = Rule("refused", "resume with the same environment, or start from its policy with --init")
OTHER_NETWORKS = Rule("refused", "a resumed run keeps its networks; leave out --resume to train others")
ROUNDING = Rule("risky", "another device, or other threads, round differently: not the same bits")
VALUES = Rule("risky", "the critic has learned values by the setting before, and needs a while to follow")
BATCHES = Rule("risky", "updates get batches of another size than the other settings were chosen for")
ENDS, KL = "a schedule ends there", "ppo.schedule is kl"
STRETCHED = Rule("risky", "what schedules change jumps to what it is at the new progress", has_schedule, ENDS)
RATE = Rule("risky", "without effect: the rate follows the KL and goes on from what it was", follows_kl, KL)

RULES: dict[str, Rule] = {
    "run.env": OTHER_ENVIRONMENT,
    "run.seed": Rule("risky", "noise and new episodes follow the new seed, running episodes and shuffles do not"),
    "run.total_steps": STRETCHED,
    "run.max_seconds": HONOURED,
    "run.stop_at": HONOURED,
    "run.eval_every": HONOURED,
    "run.eval_episodes": HONOURED,
    "run.device": ROUNDING,
    "run.threads": ROUNDING,
    "run.cuda_graphs": ROUNDING,
    "run.tf32": ROUNDING,
    "run.checkpoint_every": HONOURED,
    "run.checkpoint_every_s": HONOURED,
    "run.checkpoints_kept": HONOURED,
    "run.init": Rule("refused", "a resumed run goes on from its checkpoint; leave out --resume to start from a policy"),
    "env": OTHER_ENVIRONMENT,
    "actor.stagger": HONOURED,
    "actor.poison": HONOURED,
    "batch.worlds": Rule("risky", "worlds that are new begin their episodes, those beyond are gone; " + BATCHES.why),
    "batch.unroll_length": BATCHES,
    "batch.max_policy_lag": Rule("risky", "only at lag 0 are running episodes kept, and the bits the same"),
    "policy.hidden": OTHER_NETWORKS,
    "policy.activation": OTHER_NETWORKS,
    "policy.trunk": OTHER_NETWORKS,
    "policy.normalize": OTHER_NETWORKS,
    "policy.observation_clip": Rule("risky", "the networks have learned from observations clipped elsewhere"),
    "policy.box": OTHER_NETWORKS,
    "policy.initial_log_std": Rule("refused", "it is for new networks; a resumed run keeps the deviation that it has"),
    "ppo.epochs": HONOURED,
    "ppo.minibatch_size": HONOURED,
    "ppo.learning_rate": RATE,
    "ppo.schedule": HONOURED,
    "ppo.target_kl": HONOURED,
    "ppo.min_learning_rate": HONOURED,
    "ppo.max_learning_rate": HONOURED,
    "ppo.stop_kl": HONOURED,
    "ppo.optimizer": HONOURED,
    "ppo.weight_decay": HONOURED,
    "ppo.gamma": VALUES,
    "ppo.gamma_end": VALUES,
    "ppo.gae_lambda": HONOURED,
    "ppo.vtrace": HONOURED,
    "ppo.vtrace_rho": HONOURED,
    "ppo.vtrace_c": HONOURED,
    "ppo.normalize_reward": VALUES,
    "ppo.reward_clip": VALUES,
    "ppo.normalize_value": HONOURED,
    "ppo.clip": HONOURED,
    "ppo.clip_end": HONOURED,
    "ppo.value_clip": HONOURED,
    "ppo.value_coefficient": HONOURED,
    "ppo.entropy": HONOURED,
    "ppo.entropy_end": HONOURED,
    "ppo.max_gradient_norm": HONOURED,
    "ppo.normalize_advantage": HONOURED,
    "ppo.adam_epsilon": HONOURED,
    "cluster.actors": HONOURED,
    "cluster.actor_niceness": HONOURED,
    "cluster.auto": HONOURED,
    "cluster.listen": HONOURED,
    "cluster.insecure": HONOURED,
    "cluster.expect": HONOURED,
    "cluster.start_deadline_s": HONOURED,
    "cluster.restarts": HONOURED,
    "cluster.restart_window_s": HONOURED,
    "cluster.lease_s": HONOURED,
    "cluster.prometheus": HONOURED,
    "cluster.stop_s": HONOURED,
}


def check_resume(run: Path, config: Config, spec: EnvironmentSpec) -> list[str]:
    """What is to be said of settings that were changed, before anything in the folder is touched.

    Raises:
        UsageError: a checkpoint cannot go on with one of them.
    """
    before = build_config(resume_config(run))
    try:
        trained_on = read_spec((run / "spec.json").read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(
            f"{run} was not made by this version of rustyrl, and cannot be resumed by it ({error})"
        ) from None
    if trained_on.fingerprint != spec.fingerprint:
        raise UsageError(
            f"{run} was trained on {before.run.env} with {before.env or 'defaults'}, this is {config.run.env} with "
            f"{config.env or 'defaults'}: {OTHER_ENVIRONMENT.why}"
        )
    said = []
    for key, was, asked in _changed(before, config):
        rule = RULES[key]
        kind = rule.now(config)
        if kind == "refused":
            raise UsageError(f"{key} was {was!r} and is now {asked!r}; {rule.why}")
        change = f"{key} is {asked!r} and was {was!r}"
        said.append(f"warning: {change}: {rule.why}" if kind == "risky" else f"changed: {change}")
    limit_s, spent_s = config.run.max_seconds, seconds_before(run)
    if limit_s and spent_s >= limit_s:
        raise UsageError(
            f"run.max_seconds is {limit_s:g}, and the run has taken {spent_s:.1f} s already: raise it, or set it to 0"
        )
    return said


def resume_config(run: Path) -> dict[str, dict[str, Any]]:
    """The configuration that a run folder was started with, as a layer."""
    path = run / "config.toml"
    if not path.exists():
        raise UsageError(f"{run} holds no run to resume")
    layer = read_config(path)
    try:
        build_config(layer)
    except UsageError as error:
        raise UsageError(f"{path} is not of this version of rustyrl: {error}; take that key out of it") from None
    return layer


def seconds_before(run: Path) -> float:
    """How long a run had trained by the checkpoint that a resume goes on from; 0 without one that can be read."""
    newest_s: float | None = None  # of one that is incomplete
    for path in sorted((run / "checkpoints").glob("[0-9]*/manifest.json"), reverse=True):
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest)
        except (OSError, msgspec.DecodeError):
            continue  # the learner says what is wrong with it
        seconds = manifest.counters.seconds
        if newest_s is None and not manifest.incomplete:
            return seconds
        if newest_s is None:
            newest_s = seconds
        elif newest_s - seconds > BEHIND_S:
            break
        elif manifest.worlds and not manifest.incomplete:
            return seconds
    return newest_s or 0.0


class _Counters(msgspec.Struct, frozen=True):
    seconds: float


class _Manifest(msgspec.Struct, frozen=True):
    """The part of a checkpoint's manifest that is read here."""

    counters: _Counters
    worlds: dict[int, int] = {}
    incomplete: bool = False


def _changed(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of what differs; what decides about the environment is its fingerprint."""
    found = []
    for section in Config.__struct_fields__:
        if section == "env":
            continue
        old, new = getattr(before, section), getattr(now, section)
        for key in old.__struct_fields__:
            if f"{section}.{key}" != "run.env" and getattr(old, key) != getattr(new, key):
                found.append((f"{section}.{key}", getattr(old, key), getattr(new, key)))
    return found
