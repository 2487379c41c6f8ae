"""The errors that a user can cause or meet, each with the exit code that the command line gives it."""

from __future__ import annotations

__all__ = ["ContractError", "RunFailedError", "UsageError", "WireError", "printable"]


def printable(text: str) -> str:
    """What others sent, for a terminal or a log: lines stay, what would steer a terminal does not."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


class UsageError(Exception):
    """Bad use: an unknown name, a wrong value, a missing package. Exit code 2."""

    exit_code = 2


class RunFailedError(Exception):
    """A run that was started properly and ended badly. Exit code 1."""

    exit_code = 1


class ContractError(Exception):
    """A world broke the environment contract, or gave numbers that nothing can be learned from. Exit code 3."""

    exit_code = 3  # of an actor, so that its launcher waits for what the learner says of it


class WireError(Exception):
    """Foreign bytes that are not what they claim to be.

    ``reason`` is a short stable word under which refusals are counted.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
