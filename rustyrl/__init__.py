"""The contract between actors and learner, and what the command line does, for scripts."""

from rustyrl.config import Config
from rustyrl.describe import configure
from rustyrl.errors import ContractError, RunFailedError, UsageError
from rustyrl.train import train

__all__ = ["Config", "ContractError", "RunFailedError", "UsageError", "configure", "train"]
