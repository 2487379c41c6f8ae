"""The contract between actors and learner, and what the command line does, for scripts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rustyrl.config import Config
    from rustyrl.describe import configure
    from rustyrl.errors import ContractError, RunFailedError, UsageError
    from rustyrl.launch import train

__all__ = ["Config", "ContractError", "RunFailedError", "UsageError", "configure", "train"]

# Loaded when first asked for: actors and learners import this package too, and need no launcher.
_HOMES = {
    "Config": "config",
    "ContractError": "errors",
    "RunFailedError": "errors",
    "UsageError": "errors",
    "configure": "describe",
    "train": "launch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
