"""Runs of ``rustyrl train`` for benchmarks that look at what was learned."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["RUSTYRL", "train"]

RUSTYRL = [sys.executable, "-c", "from rustyrl.cli import main; main()"]  # which older checkouts have, too


def train(env: str, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run from start to end in a folder of its own: its summary, and the rows of its metrics with a return."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [*RUSTYRL, "train", env, "--run", str(run), "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads(done.stdout), [row for row in rows if "return_mean" in row]
