"""The configuration: frozen, typed, with help and range beside each field.

Defaults < what the world recommends < a TOML file < flags. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import tomli_w
from msgspec import Meta

from rustyrl.errors import UsageError

__all__ = [
    "ActorConfig",
    "BatchConfig",
    "ClusterConfig",
    "Config",
    "PPOConfig",
    "PolicyConfig",
    "RunConfig",
    "build_config",
    "config_to_toml",
    "parse_assignments",
    "read_config",
]


def _help(text: str, **limits: Any) -> Meta:
    return Meta(description=text, **limits)


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is trained, how long, and what is kept."""

    env: Annotated[str, _help("built-in name, package.module:Class, file.py:Class or gym:ID")] = ""
    seed: Annotated[int, _help("of worlds, noise, initialisation and shuffles", ge=0, le=2**62)] = 1
    total_steps: Annotated[int, _help("stop after so many trained env steps; 0 is no limit", ge=0)] = 0
    max_seconds: Annotated[float, _help("stop after so long; 0 is no limit", ge=0)] = 0.0
    stop_at: Annotated[
        tuple[str, ...], _help("stop when an evaluation meets all of these, like 'return_mean>=475'")
    ] = ()
    eval_every: Annotated[int, _help("updates between evaluated versions", ge=1)] = 5
    eval_episodes: Annotated[int, _help("greedy episodes of an evaluation", ge=1)] = 400
    device: Annotated[Literal["auto", "cpu", "cuda"], _help("where the learner computes")] = "auto"
    threads: Annotated[int, _help("threads of the learner on the CPU; 0 lets it choose", ge=0)] = 0
    cuda_graphs: Annotated[bool, _help("on a GPU, whether epochs are captured once and replayed")] = True
    tf32: Annotated[bool, _help("on a GPU, whether products of matrices may round what goes in to TF32")] = False
    checkpoint_every: Annotated[int, _help("updates between checkpoints", ge=1)] = 100
    checkpoint_every_s: Annotated[float, _help("seconds until one is due in any case", gt=0)] = 5.0
    checkpoints_kept: Annotated[int, _help("how many of the newest checkpoints stay", ge=1)] = 3
    init: Annotated[str, _help("policy file to start from: weights and normaliser only")] = ""


class ActorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an actor steps its worlds."""

    stagger: Annotated[
        bool,
        _help("first episodes have a random part of their step limit only, so that ends spread out"),
    ] = True
    poison: Annotated[bool, _help("fill new rollouts with a pattern that no step writes (tests)")] = False


class BatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The shape of a batch: T x worlds x slots env steps, however many actors there are."""

    worlds: Annotated[int, _help("worlds of the run", ge=1, le=65536)] = 4
    unroll_length: Annotated[int, _help("T, env steps of a rollout", ge=1, le=65536)] = 32
    max_policy_lag: Annotated[int, _help("L: batch k is collected under version max(0, k - L)", ge=0, le=64)] = 1


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The networks."""

    hidden: Annotated[tuple[Annotated[int, Meta(ge=1, le=65536)], ...], _help("widths of the hidden layers")] = (
        64,
        64,
    )
    activation: Annotated[Literal["tanh", "relu", "elu", "silu"], _help("of the hidden layers")] = "tanh"
    trunk: Annotated[Literal["separate", "shared"], _help("whether actor and critic share hidden layers")] = "separate"
    normalize: Annotated[bool, _help("normalise observations by running mean and variance")] = True
    observation_clip: Annotated[float, _help("normalised observations are clipped to +- this", gt=0)] = 10.0
    box: Annotated[
        Literal["clipped", "squashed"],
        _help("Gaussian samples of box actions are clipped to the bounds, or squashed into them by a tanh"),
    ] = "clipped"
    initial_log_std: Annotated[float, _help("of box actions", ge=-20, le=5)] = 0.0


class PPOConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Proximal policy optimization (Schulman et al. 2017)."""

    epochs: Annotated[int, _help("passes over a batch", ge=1, le=1000)] = 4
    minibatch_size: Annotated[int, _help("env steps of a minibatch, as near as the batch divides", ge=1)] = 4096
    learning_rate: Annotated[float, _help("of Adam, at the start", gt=0)] = 1e-3
    schedule: Annotated[
        Literal["constant", "linear", "kl"],
        _help("of the learning rate; linear goes to 0 at run.total_steps"),
    ] = "kl"
    target_kl: Annotated[float, _help("what the kl schedule steers to, per epoch", gt=0)] = 0.01
    min_learning_rate: Annotated[float, _help("lower end of the kl schedule", gt=0)] = 1e-5
    max_learning_rate: Annotated[float, _help("upper end of the kl schedule", gt=0)] = 1e-2
    stop_kl: Annotated[float, _help("end the epochs of a batch when its KL exceeds this; 0 never", ge=0)] = 0.0
    optimizer: Annotated[Literal["adam", "adamw"], _help("adamw decays the weights of all layers")] = "adam"
    weight_decay: Annotated[float, _help("of adamw, an optimiser step takes off rate x this", ge=0)] = 0.0
    gamma: Annotated[float, _help("discount of an env step", ge=0, le=1)] = 0.99
    gamma_end: Annotated[float, _help("reached in even steps at run.total_steps; -1: gamma stays", ge=-1, le=1)] = -1
    gae_lambda: Annotated[float, _help("of generalized advantage estimation", ge=0, le=1)] = 0.95
    vtrace: Annotated[
        Literal["auto", "on", "off"],
        _help("correct advantages and value targets for policy lag; auto: if batch.max_policy_lag is above 1"),
    ] = "auto"
    vtrace_rho: Annotated[float, _help("truncates the weight of a step's own error in V-trace", gt=0)] = 1.0
    vtrace_c: Annotated[float, _help("truncates the weight of later errors in V-trace", gt=0)] = 1.0
    normalize_reward: Annotated[
        bool, _help("divide rewards by the running deviation of the discounted return so far")
    ] = False
    reward_clip: Annotated[float, _help("rewards so normalised are clipped to +- this", gt=0)] = 10.0
    normalize_value: Annotated[
        bool, _help("the critic learns value targets in units in which they have mean 0 and deviation 1")
    ] = False
    clip: Annotated[float, _help("epsilon of the policy ratio", gt=0)] = 0.2
    clip_end: Annotated[float, _help("reached in even steps at run.total_steps; -1: clip stays", ge=-1)] = -1
    value_clip: Annotated[
        float, _help("largest rewarded change of a value, in the critic's units; 0 switches off", ge=0)
    ] = 0.0
    value_coefficient: Annotated[float, _help("weight of the value loss", ge=0)] = 0.5
    entropy: Annotated[float, _help("weight of the entropy bonus", ge=0)] = 0.0
    entropy_end: Annotated[float, _help("reached in even steps at run.total_steps; -1: entropy stays", ge=-1)] = -1
    max_gradient_norm: Annotated[float, _help("gradients are scaled down to this norm", gt=0)] = 0.5
    normalize_advantage: Annotated[bool, _help("to mean 0 and deviation 1 in each minibatch")] = True
    adam_epsilon: Annotated[float, _help("Adam's epsilon", gt=0)] = 1e-5


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processes and the link between them."""

    actors: Annotated[int, _help("actor processes to start; -1 chooses by the cores", ge=-1, le=1000)] = -1
    actor_niceness: Annotated[
        int, _help("how far actors step back behind the learner where cores are few (Unix)", ge=0, le=19)
    ] = 0
    auto: Annotated[str, _help("'MIN:MAX' lets the number of actors follow the learner's wait; '' does not")] = ""
    listen: Annotated[
        str, _help("'ipc' or tcp://HOST:PORT (port 0 or *: any free one); beyond loopback, actors join with keys")
    ] = "ipc"
    insecure: Annotated[
        bool, _help("beyond loopback, neither encrypt the link nor ask who joins: for networks that nobody else is on")
    ] = False
    expect: Annotated[int, _help("actors that batch 0 waits for; -1 those that are started, at least 1", ge=-1)] = -1
    start_deadline_s: Annotated[
        float, _help("how long batch 0 waits for them, and an actor may take to start", gt=0)
    ] = 60.0
    restarts: Annotated[
        int, _help("an actor, those that have a world, or the learner end the run if they die more often", ge=0)
    ] = 5
    restart_window_s: Annotated[float, _help("within this time, see restarts", gt=0)] = 60.0
    lease_s: Annotated[
        float, _help("an actor that gives no sign of life for so long, as in one step of a world, is replaced", gt=0)
    ] = 30.0
    prometheus: Annotated[
        str, _help("HOST:PORT of this machine where Prometheus can scrape the run, such as 127.0.0.1:9095; '' is off")
    ] = ""
    stop_s: Annotated[float, _help("grace before what still runs is killed", gt=0)] = 5.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that decides a run. ``env`` holds ``slots`` and the parameters that the world declares."""

    run: RunConfig = RunConfig()
    env: dict[str, bool | int | float | str] = {}
    actor: ActorConfig = ActorConfig()
    batch: BatchConfig = BatchConfig()
    policy: PolicyConfig = PolicyConfig()
    ppo: PPOConfig = PPOConfig()
    cluster: ClusterConfig = ClusterConfig()


Layer = Mapping[str, Mapping[str, Any]]


def build_config(*layers: Layer) -> Config:
    """Join layers of ``{section: {key: value}}``, later ones winning, and check the result.

    Raises:
        UsageError: naming the key, what was expected, and the nearest known name.
    """
    joined: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            _check_names(section, values)
            joined.setdefault(section, {}).update(values)
    try:
        return msgspec.convert(joined, Config)
    except msgspec.ValidationError as error:
        raise UsageError(f"configuration: {error}".replace("`$.", "`")) from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Turn ``SECTION.KEY=VALUE`` into a layer; values are TOML, bare words are strings."""
    layer: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot or not key:
            raise UsageError(f"--set takes SECTION.KEY=VALUE, got {assignment!r}")
        layer.setdefault(section, {})[key] = _parse_value(value.strip())
    return layer


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read a TOML file as a layer."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of ValueError are what is no TOML, and what is no text
        raise UsageError(f"{path} is not TOML: {error}") from None
    for section, values in content.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {section!r} stands outside a section; sections are {_sections()}")
    return content


def config_to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `read_config` reads back."""
    content: dict[str, Any] = msgspec.to_builtins(config)
    return tomli_w.dumps(content)


def _sections() -> list[str]:
    return list(Config.__struct_fields__)


def _check_names(section: str, values: Mapping[str, Any]) -> None:
    if section not in _sections():
        raise UsageError(f"unknown section {section!r}{nearest(section, _sections())}")
    if section == "env":  # what a world declares is checked by its own process, which alone may import it
        for key, value in values.items():
            if not isinstance(value, bool | int | float | str):
                raise UsageError(
                    f"configuration: expected a number, a string, true or false, got {value!r} - at `env.{key}`"
                )
        return
    known = list(get_type_hints(Config)[section].__struct_fields__)
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {section}.{key}{nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest of the known names, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names) or 'none'}"


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text  # a line break would bring more keys
