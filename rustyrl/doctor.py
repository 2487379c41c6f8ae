"""What this machine offers a run, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from typing import Any

import msgspec
import psutil

from rustyrl import perceptron
from rustyrl.installed import installed_version
from rustyrl.processes import available_cores

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

__all__ = ["examine"]

BASE = (
    "esper",
    "gymnasium",
    "msgspec",
    "numpy",
    "psutil",
    "pyzmq",
    "rich",
    "safetensors",
    "tomli-w",
    "typer",
)
LEARNER = ("torch", "tensorboard")
MIN_DESCRIPTORS = 1024
MIN_FREE_BYTES = 1 << 30


def examine() -> dict[str, Any]:
    """Versions, device, cores, memory, limits; ``problems`` is what is wrong, in words with a remedy."""
    problems: list[str] = []
    packages = {name: installed_version(name) or "missing" for name in (*BASE, *LEARNER)}
    for name in BASE:
        if packages[name] == "missing":
            problems.append(f"{name} is missing: pip install rustyrl")
    if missing := [name for name in LEARNER if packages[name] == "missing"]:
        problems.append(
            f"{' and '.join(missing)} missing, so this machine can only act: pip install 'rustyrl[learner]'"
        )
    torch = _ask_torch() if not missing else {}
    if torch.get("error"):
        problems.append(f"torch does not import: {torch['error']}")
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    if 0 <= descriptors < MIN_DESCRIPTORS:
        problems.append(f"only {descriptors} files may be open, large clusters need more: ulimit -n {MIN_DESCRIPTORS}")
    free_disk = psutil.disk_usage(".").free
    if free_disk < MIN_FREE_BYTES:
        problems.append(f"only {free_disk >> 20} MiB are free here for run folders")
    if not os.access(".", os.W_OK):
        problems.append("this folder is not writable: name a run folder elsewhere with --run")
    return {
        "rustyrl": installed_version("rustyrl") or "missing",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "torch": torch,
        "device": torch.get("device", "none"),
        "perceptrons": perceptron.PROBLEM or "compiled",
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "disk_free_gib": round(free_disk / 2**30, 1),
        "open_files_limit": descriptors,
        "temporary_folder": tempfile.gettempdir(),
        "problems": problems,
    }


def _ask_torch() -> dict[str, Any]:
    """What torch sees, from a process of the learner package, which alone may import it."""
    command = [sys.executable, "-m", "rustyrl_learner", "--parent", str(os.getpid()), "doctor"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "it takes more than 60 s"}
    if done.returncode:
        return {"error": done.stderr.decode(errors="replace").strip().splitlines()[-1]}
    return msgspec.json.decode(done.stdout, type=dict[str, Any])
