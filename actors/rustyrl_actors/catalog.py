"""From the name of an environment to the means of making one."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from rustyrl.config import nearest
from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec
from rustyrl_actors.column import ColumnEnvironment
from rustyrl_actors.environment import Environment
from rustyrl_actors.gym_environment import GYM_EVALUATION_SLOTS, GYM_SLOTS, GymEnvironment, describe_gym
from rustyrl_actors.object import ObjectEnvironment
from rustyrl_actors.world import NoParameters, WorldClass, WorldInfo, as_others_see_it, describe_world

__all__ = ["BUILT_IN", "GYM_PREFIX", "EnvironmentSource", "find_environment", "find_world"]


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """Where a built-in world is, and what is set of it unless the user says otherwise."""

    location: str
    settings: Mapping[str, Any] = field(default_factory=dict)


BUILT_IN = {
    "cartpole": BuiltIn("rustyrl_actors.worlds.cartpole:CartPoleWorld"),
    "cartpole-object": BuiltIn("rustyrl_actors.worlds.cartpole_object:CartPoleObjectWorld"),
    "drone-object": BuiltIn("rustyrl_actors.worlds.drone_object:DroneObjectWorld"),
    "drone": BuiltIn("rustyrl_actors.worlds.drone:DroneWorld"),
    "drone-windy": BuiltIn("rustyrl_actors.worlds.drone:DroneWorld", {"variation": 0.2, "gust_m_s": 5.0}),
}
GYM_PREFIX = "gym:"
_loaded: dict[Path, tuple[int, ModuleType]] = {}  # files by path, with the time of their last change
DEFAULT_SLOTS = {"column": 64, "object": 1}
OBJECT_SLOTS = 64  # of a run in object style, unless the world or the user says otherwise
EVALUATION_SLOTS = {"column": 1024, "object": 0}


@dataclass(frozen=True, slots=True)
class EnvironmentSource:
    """A found environment: its spec, and what makes any number of them.

    ``info`` is what an esper world declares, None for others; ``resizable`` is the most slots that one environment of
    this kind can well have, 0 if the number of its slots is part of the game.
    """

    spec: EnvironmentSpec
    info: WorldInfo | None
    about: str
    resizable: int
    maker: Callable[[bool], Environment]

    def make(self, *, stagger: bool = False) -> Environment:
        """Make one environment of ``spec.slots`` slots."""
        return self.maker(stagger)


def find_environment(env: str, env_config: Mapping[str, Any]) -> EnvironmentSource:
    """Find an environment by name and check what is to be set of it.

    Args:
        env: a built-in name, ``package.module:Class``, ``file.py:Class`` or ``gym:ID``.
        env_config: ``slots`` and values of the parameters that the world declares, or Gymnasium's keyword arguments.

    Raises:
        UsageError: the name leads nowhere or a value does not fit, with what would.
    """
    settings = dict(env_config)
    if env.startswith(GYM_PREFIX):
        return _find_gym(env, settings)
    built_in = BUILT_IN.get(env)
    world = find_world(env)
    settings = {**(built_in.settings if built_in else {}), **settings}
    style: str = getattr(world, "style", "column")
    if style not in DEFAULT_SLOTS:
        raise UsageError(f"environment {env!r}: its style is {style!r}; expected 'column' or 'object'")
    slots = _pop_slots(settings, getattr(world, "default_slots", DEFAULT_SLOTS[style]))
    parameters = _convert_parameters(env, settings, getattr(world, "Parameters", NoParameters))
    _check_methods(env, world, style)
    defaults = {"batch": {"worlds": max(1, OBJECT_SLOTS // slots)}} if style == "object" else {}
    info = world(slots, parameters).info
    if not isinstance(info, WorldInfo):
        raise UsageError(f"environment {env!r}: its info is {info!r}; expected a rustyrl_actors.WorldInfo")
    spec = describe_world(env, info, slots, parameters, defaults)

    def make(stagger: bool) -> Environment:
        made: Any = world(slots, parameters)
        kind = ObjectEnvironment if style == "object" else ColumnEnvironment
        return kind(made, spec, stagger=stagger)

    about = (world.__doc__ or "").strip().splitlines()
    return EnvironmentSource(spec, info, about[0] if about else "", EVALUATION_SLOTS[style], make)


def _find_gym(env: str, settings: dict[str, Any]) -> EnvironmentSource:
    resizable = 0 if "slots" in settings else GYM_EVALUATION_SLOTS  # a batch of its own may have one size only
    slots = _pop_slots(settings, GYM_SLOTS)
    spec, about = describe_gym(env, env.removeprefix(GYM_PREFIX), slots, settings)
    spec = as_others_see_it(spec)

    def make(stagger: bool) -> Environment:
        return GymEnvironment(spec, settings, stagger=stagger)

    return EnvironmentSource(spec, None, about, resizable, make)


def _pop_slots(settings: dict[str, Any], default: int) -> int:
    slots = settings.pop("slots", default)
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise UsageError(f"env.slots is {slots!r}; expected a positive number of agents for each world")
    return slots


def _convert_parameters(env: str, settings: dict[str, Any], kind: type[msgspec.Struct]) -> msgspec.Struct:
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        raise UsageError(f"environment {env!r}: its Parameters are {kind!r}; expected a class made of msgspec.Struct")
    known = kind.__struct_fields__
    for key in settings:
        if key not in known:
            raise UsageError(f"environment {env!r} has no parameter {key!r}{nearest(key, [*known, 'slots'])}")
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"environment {env!r}: {str(error).replace('`$.', '`env.')}") from None


def _check_methods(env: str, world: WorldClass, style: str) -> None:
    needed = ("reset", "observe") if style == "object" else ("build", "reset", "observe")
    if missing := [name for name in needed if not callable(getattr(world, name, None))]:
        own = [name for name in vars(world) if not name.startswith("_")]
        hints = [
            f"did you mean {close[0]!r}?" for name in missing if (close := difflib.get_close_matches(name, own, 1))
        ]
        if missing == ["build"]:
            hints.append("a world in object style says style = 'object'")
        raise UsageError(
            f"environment {env!r} is no world in {style} style, it lacks {', '.join(missing)}; "
            f"{'; '.join(hints) or 'see docs/worlds.md'}"
        )


def find_world(env: str) -> WorldClass:
    """The class that a name leads to; raises `UsageError` where it leads nowhere."""
    location = BUILT_IN[env].location if env in BUILT_IN else env
    module_name, colon, class_name = location.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(env, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"unknown environment {env!r}; {hint}built-in are {', '.join(sorted(BUILT_IN))}; "
            "your own is package.module:Class or file.py:Class, Gymnasium's are gym:ID"
        )
    module = _import_file(env, module_name) if module_name.endswith(".py") else _import_module(env, module_name)
    world = getattr(module, class_name, None)
    if world is None:
        classes = [
            name for name, value in vars(module).items() if hasattr(value, "reset") and hasattr(value, "observe")
        ]
        raise UsageError(f"environment {env!r}: {module_name} has no {class_name!r}{nearest(class_name, classes)}")
    if not callable(world):
        raise UsageError(f"environment {env!r}: {class_name} is {world!r}; expected the class of a world")
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
    known = _loaded.get(path)
    if known is not None and known[0] == path.stat().st_mtime_ns:
        return known[1]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"environment {env!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    _loaded[path] = (path.stat().st_mtime_ns, module)
    return module
