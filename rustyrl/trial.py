"""One training run in a process of its own: ``python -m rustyrl.trial``, which `rustyrl.trials` starts.

A run of its own process takes signals, crashes and ends by itself, and several go on side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rustyrl.config import build_config, read_config
from rustyrl.describe import describe
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.launch import launch
from rustyrl.parent import die_with_parent
from rustyrl.processes import spare_learner
from rustyrl.progress import make_progress

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Train as a file says, progress to standard error; why it failed, if it did, is all of standard output.

    What the world recommends is left aside: the file has to hold every setting that is not to be the default.
    """
    parser = argparse.ArgumentParser(prog="python -m rustyrl.trial")
    parser.add_argument("--parent", type=int, default=0, help="process id to die with")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    try:
        config = build_config(read_config(options.config))
        with spare_learner() as spare:
            spec, progress = describe(config.run.env, config.env), make_progress(to_stderr=True)
            launch(config, spec, options.run, resume=False, progress=progress, spare=spare)
    except (UsageError, RunFailedError) as error:
        sys.stdout.write(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
