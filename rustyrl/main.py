"""What ``rustyrl`` runs: a learner imports torch from the first moment on, while this process imports all else."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import NoReturn

from rustyrl.processes import spare_learner

__all__ = ["main"]

TRAINING = ("train", "learner")  # the verbs that need one


def main() -> NoReturn:
    """Run the command line."""
    trains = sys.argv[1:2] and sys.argv[1] in TRAINING and "--help" not in sys.argv
    with spare_learner() if trains else nullcontext() as spare:
        from rustyrl.cli import main as run

        run(spare)
