"""Make a small project around a new world: one that trains and passes its tests as it is."""

from __future__ import annotations

import importlib.util
import keyword
import re
import string
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from rustyrl.errors import UsageError

__all__ = ["STYLES", "Style", "new_project"]

Style = Literal["object", "column"]
STYLES: tuple[str, ...] = get_args(Style)


def new_project(name: str, style: str, parent: Path) -> tuple[Path, str]:
    """Write the project ``parent/name``; returns its folder and the name of its world within it.

    Args:
        name: letters, digits, ``-`` and ``_``; the module and the class of the world are named after it.
        style: ``object`` (one entity is one thing of the game) or ``column`` (one entity stands for many).
        parent: where.

    Raises:
        UsageError: the name does not serve as a module, something is there already, or there is no such style.
    """
    module = name.replace("-", "_")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", module) or keyword.iskeyword(module):
        raise UsageError(f"{name!r} does not serve as the name of a module; expected letters, digits, '-' and '_'")
    if style not in STYLES:
        raise UsageError(f"there is no style {style!r}; expected {' or '.join(STYLES)}")
    if importlib.util.find_spec(module) is not None:
        raise UsageError(f"there is a module {module!r} already, which this one would hide; choose another name")
    folder = parent / name
    if folder.exists():
        raise UsageError(f"{folder} exists already")
    words = [word for word in re.split(r"[-_]", name) if word]
    values = {
        "module": module,
        "world": "".join(word[0].upper() + word[1:] for word in words) + "World",
        "title": " ".join(words).capitalize(),
        "style": style,
    }
    sources = {
        f"{module}.py": f"{style}/world.py",
        f"test_{module}.py": "both/test_world.py",
        "config.toml": "both/config.toml",
        "README.md": "both/README.md",
    }
    templates = files("rustyrl") / "templates"
    folder.mkdir(parents=True)
    for target, source in sources.items():
        template = string.Template((templates / f"{source}.template").read_text(encoding="utf-8"))
        (folder / target).write_text(template.substitute(values), encoding="utf-8")
    return folder, f"{module}.py:{values['world']}"
