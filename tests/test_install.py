"""A base install is a complete actor, without torch and small."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

LIMIT_BYTES = 120_000_000


def closure(name: str) -> set[str]:
    """The distributions that installing this one without extras brings along, itself included."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if current in found:
            continue
        try:
            requires = importlib.metadata.requires(current) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        found.add(current)
        waiting += [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in requires if "extra ==" not in line]
    return found


def size_bytes(name: str) -> int:
    files = importlib.metadata.files(name) or []
    return sum(Path(f.locate()).stat().st_size for f in files if Path(f.locate()).is_file() and f.suffix != ".pyc")


def test_a_base_install_brings_no_torch_and_stays_under_120_mb():
    names = closure("rustyrl")
    assert {"esper", "numpy", "pyzmq", "msgspec", "gymnasium", "safetensors"} <= names
    assert not {"torch", "tensorboard", "scipy"} & names
    assert sum(map(size_bytes, names)) < LIMIT_BYTES
