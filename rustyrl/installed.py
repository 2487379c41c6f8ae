"""What is installed beside us."""

from __future__ import annotations

import functools

__all__ = ["installed_version"]


@functools.cache
def installed_version(package: str) -> str:
    """The version of a package; "" if it is not installed, as we are not where we run from a copy of the sources."""
    import importlib.metadata  # takes 30 ms, which an actor that starts has no use for

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
