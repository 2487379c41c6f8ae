"""The gate of `make check`: each thing that it is for, planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forbidden import findings

PLANTED = [
    "import pickle",
    "import pickle as innocent  # noqa: S403",
    "from pickle import loads",
    "import marshal",
    "import shelve",
    "import cloudpickle.cloudpickle",
    "import yaml",
    "import importlib\nimportlib.import_module('pickle')",
    "eval('1')",
    "import builtins\nbuiltins.exec('1')",
    "import torch\ntorch.load('x', weights_only=True)",
    "import torch\nread = torch.load",
    "from torch import load",
    "import numpy as np\nnp.load('x')",
    "from numpy.lib import npyio\nnpyio.read('x', allow_pickle=True)",
    "link.recv_pyobj()",
    "link.send_pyobj({})",
    "link.bind('tcp://*:5555')",
    "link.bind(f'tcp://*:{port}')",
]
INNOCENT = [
    "from safetensors.torch import load",
    "model.eval()",
    "def load(x):\n    return self.load(x)",
    "link.bind('tcp://0.0.0.0:5555')",
    "npyio.read('x', allow_pickle=False)",
    "from __future__ import annotations",
    "from . import wire",
]


@pytest.mark.parametrize("source", PLANTED)
def test_what_is_planted_is_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "planted.py").write_text(source + "\n")
    found = list(findings(tmp_path, ["planted.py"]))
    assert len(found) == 1
    assert found[0].startswith(f"planted.py:{len(source.splitlines())}: ")


@pytest.mark.parametrize("source", INNOCENT)
def test_what_only_looks_like_it_is_not(tmp_path: Path, source: str) -> None:
    (tmp_path / "innocent.py").write_text(source + "\n")
    assert list(findings(tmp_path, ["innocent.py"])) == []


@pytest.mark.parametrize("name", ["compose.yaml", "start.sh", "learner.Dockerfile"])
def test_other_files_listen_nowhere_either(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("first\nrustyrl learner --listen 'tcp://*:5555'\n")
    assert [found.partition(": ")[0] for found in findings(tmp_path, [name])] == [f"{name}:2"]


def test_this_project_does_none_of_it() -> None:
    script = Path(__file__).parent / "forbidden.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
