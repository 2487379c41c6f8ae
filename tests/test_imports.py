"""The process boundary is the import boundary: what an actor or the command line loads, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

ACTOR = ("rustyrl_actors", "rustyrl_actors.actor", "rustyrl_actors.worlds.drone", "rustyrl_actors.__main__")


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages in sys.modules after importing these."""
    imports = "; ".join(f"import {module}" for module in modules)
    script = f"{imports}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("modules", [ACTOR, ("rustyrl.cli",), ("rustyrl",)], ids=["actor", "command-line", "contract"])
def test_torch_is_loaded_by_the_learner_alone(modules: tuple[str, ...]) -> None:
    loaded = loaded_by(*modules)
    assert "rustyrl" in loaded
    assert not loaded & {"torch", "tensorboard", "rustyrl_learner"}


def test_the_command_line_loads_neither_worlds_nor_what_they_are_made_of() -> None:
    assert not loaded_by("rustyrl.cli") & {"rustyrl_actors", "esper", "gymnasium"}


def test_the_learner_loads_no_world() -> None:
    loaded = loaded_by("rustyrl_learner.learner")
    assert "torch" in loaded
    assert not loaded & {"rustyrl_actors", "esper", "gymnasium"}
