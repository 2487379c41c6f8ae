"""From the name of an environment to the means of making one."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from rustyrl.config import nearest
from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import Environment
from rustyrl_actors.world import WorldClass, describe_world

__all__ = ["BUILT_IN", "EnvironmentSource", "find_environment"]

BUILT_IN = {
    "cartpole": "rustyrl_actors.worlds.cartpole:CartPoleWorld",
    "drone": "rustyrl_actors.worlds.drone:DroneWorld",
}


@dataclass(frozen=True, slots=True)
class EnvironmentSource:
    """A found environment: its spec, and what makes any number of them."""

    spec: EnvironmentSpec
    world: WorldClass
    parameters: msgspec.Struct

    def make(self, *, stagger: bool = False) -> Environment:
        """Make one environment: one esper world of ``spec.slots`` slots."""
        return ColumnEnvironment(self.world(self.spec.slots, self.parameters), self.spec, stagger=stagger)


def find_environment(env: str, env_config: Mapping[str, Any]) -> EnvironmentSource:
    """Find an environment by name and check what is to be set of it.

    Args:
        env: a built-in name, ``package.module:Class`` or ``file.py:Class``.
        env_config: ``slots`` and values of the parameters that the world declares.

    Raises:
        UsageError: the name leads nowhere or a value does not fit, with what would.
    """
    world = _find_world(env)
    settings = dict(env_config)
    slots = settings.pop("slots", world.default_slots)
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise UsageError(f"env.slots is {slots!r}; expected a positive number of agents for each world")
    known = world.Parameters.__struct_fields__
    for key in settings:
        if key not in known:
            raise UsageError(f"environment {env!r} has no parameter {key!r}{nearest(key, [*known, 'slots'])}")
    try:
        parameters = msgspec.convert(settings, world.Parameters)
    except msgspec.ValidationError as error:
        raise UsageError(f"environment {env!r}: {str(error).replace('`$.', '`env.')}") from None
    spec = describe_world(env, world(slots, parameters), slots, parameters)
    return EnvironmentSource(spec, world, parameters)


def _find_world(env: str) -> WorldClass:
    location = BUILT_IN.get(env, env)
    module_name, colon, class_name = location.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(env, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"unknown environment {env!r}; {hint}built-in are {', '.join(sorted(BUILT_IN))}; "
            "your own is package.module:Class or file.py:Class"
        )
    module = _import_file(env, module_name) if module_name.endswith(".py") else _import_module(env, module_name)
    world = getattr(module, class_name, None)
    if world is None:
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(f"environment {env!r}: {module_name} has no {class_name!r}{nearest(class_name, classes)}")
    for attribute in ("default_slots", "Parameters"):
        if not hasattr(world, attribute):
            raise UsageError(
                f"environment {env!r}: {class_name} is no world, it lacks {attribute!r}; see rustyrl_actors.world"
            )
    return world  # type: ignore[no-any-return]


def _import_module(env: str, name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise UsageError(f"environment {env!r}: there is no module {error.name!r} to import") from None
        raise


def _import_file(env: str, name: str) -> ModuleType:
    path = Path(name).resolve()
    if not path.is_file():
        raise UsageError(f"environment {env!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"environment {env!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module
