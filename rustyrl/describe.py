"""Ask the actor package what an environment is: it alone may import worlds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rustyrl.config import Config, Layer, build_config
from rustyrl.defaults import recommend
from rustyrl.errors import UsageError
from rustyrl.processes import actor_environment, ask_child
from rustyrl.spec import EnvironmentSpec, read_spec

__all__ = ["check", "configure", "describe", "evaluate", "evaluate_arguments", "list_environments"]

TIMEOUT_S = 120.0


def env_arguments(verb: str, env: str, env_config: Mapping[str, Any]) -> list[str]:
    """The arguments of ``python -m rustyrl_actors`` for a verb about an environment."""
    return [verb, env, "--env-config", msgspec.json.encode(dict(env_config)).decode()]


def evaluate_arguments(env: str, env_config: Mapping[str, Any], policy: Path, episodes: int, seed: int) -> list[str]:
    """The arguments of ``python -m rustyrl_actors`` for an evaluation."""
    about = env_arguments("evaluate", env, env_config)
    return [*about, "--policy", str(policy), "--episodes", str(episodes), "--seed", str(seed)]


def describe(env: str, env_config: Mapping[str, Any]) -> EnvironmentSpec:
    """The spec of an environment, from a process that imports it.

    Raises:
        UsageError: there is no such environment, or a setting does not fit it.
        RunFailedError: its own code raised; the message is its traceback.
    """
    return read_spec(_actors(*env_arguments("describe", env, env_config)))


def list_environments() -> list[dict[str, Any]]:
    """The built-in environments: ``env``, ``about``, ``fingerprint``, ``spec``."""
    return msgspec.json.decode(_actors("envs"), type=list[dict[str, Any]])


def configure(*layers: Layer) -> tuple[Config, EnvironmentSpec]:
    """Join configuration layers on top of what suits their world and what its author recommends; describe that world.

    Raises:
        UsageError: no environment is named, or anything in the layers does not fit.
    """
    asked = build_config(*layers)
    if not asked.run.env:
        raise UsageError("no environment is named; `rustyrl envs` lists the built-in ones")
    env = anchored(asked.run.env)
    spec = describe(env, asked.env)
    asked_for = build_config(spec.defaults, *layers)
    config = build_config(recommend(spec, asked_for), spec.defaults, *layers, {"run": {"env": env}})
    return config, spec


def anchored(env: str) -> str:
    """``file.py:Class`` with the file's whole path, so that a run can be resumed and evaluated from any folder."""
    file, colon, name = env.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).resolve()}:{name}"
    if env.endswith(".py"):
        raise UsageError(f"{env!r} names a file; add the class of its world, like {env}:Class")
    return env


def evaluate(env: str, env_config: Mapping[str, Any], policy: Path, episodes: int, seed: int) -> dict[str, Any]:
    """The figures of a policy over greedy episodes; errors as of `describe`."""
    content = _actors(*evaluate_arguments(env, env_config, policy, episodes, seed), limit_s=None)
    return msgspec.json.decode(content, type=dict[str, Any])


def check(env: str, env_config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What the conformance kit finds: ``findings`` of ``check, passed, problem, remedy``, and ``speed`` by part."""
    content = _actors(*env_arguments("check", env, env_config), "--seed", str(seed), limit_s=None)
    return msgspec.json.decode(content, type=dict[str, Any])


def _actors(*arguments: str, limit_s: float | None = TIMEOUT_S) -> bytes:
    return ask_child("the environment's own code", "rustyrl_actors", arguments, actor_environment(), limit_s)
