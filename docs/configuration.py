"""Print every setting as a Markdown table, from the configuration itself; docs/configuration.md is the output."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from rustyrl.config import Config

HEADER = """# Settings

Set with `--set SECTION.KEY=VALUE` or in a TOML file given with `--config`; made by `python docs/configuration.py`.
Defaults < what suits spaces and scale ([decisions/0005](decisions/0005-trustworthy-ppo.md)) < what the world recommends
< file < flags; `config.toml` in the run folder has the outcome. The `env` section holds `slots` and the parameters that
the world declares (`rustyrl envs --json` shows them, and what each world recommends, as `spec.defaults`).

| key | default | meaning |
|---|---|---|"""


def main() -> None:
    """Print the page."""
    print(HEADER)
    for section, kind in get_type_hints(Config).items():
        if not isinstance(kind, type) or not issubclass(kind, msgspec.Struct):
            continue
        defaults = kind()
        for key, hint in get_type_hints(kind, include_extras=True).items():
            print(f"| `{section}.{key}` | `{show(getattr(defaults, key))}` | {meaning(hint)} |")


def meaning(hint: Any) -> str:
    """The help text of a field, and its choices if it has them."""
    if get_origin(hint) is not Annotated:
        return ""
    inner, meta = get_args(hint)[:2]
    choices = [str(choice) for choice in get_args(inner) if isinstance(choice, str)]
    return meta.description + (f" ({', '.join(choices)})" if choices else "")


def show(value: Any) -> str:
    """A default as TOML would have it."""
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


if __name__ == "__main__":
    main()
