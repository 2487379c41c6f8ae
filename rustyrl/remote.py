"""A conversation with a launcher that never waits: its status from time to time, and orders that it answers later."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rustyrl.control import ControlClient
from rustyrl.run_folder import ClusterFile

__all__ = ["Remote", "describe_answer"]

PATIENCE_S = 60.0  # for the answer to an order; a checkpoint waits for the end of an update


class Remote:
    """The control socket of one run, from the side of somebody who looks at it and gives orders."""

    def __init__(self, path: Path, cluster: ClusterFile, every_s: float) -> None:
        self.path = path
        self.cluster = cluster
        self.status: dict[str, Any] | None = None
        self.said = ""  # the answer to the newest order
        self.said_at = 0.0
        self._every_s = every_s
        self._asked_at = self._due_at = 0.0
        self._waits = False
        self._outdated = False  # the status that is waited for may be from before an order was carried out
        self._client = ControlClient(cluster.control)
        self._orders: list[tuple[float, dict[str, Any], ControlClient]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        for client in [self._client, *(client for *_, client in self._orders)]:
            client.close()
        self._orders.clear()

    @property
    def silent_s(self) -> float:
        """How long the launcher has owed an answer to the question for its status."""
        return time.monotonic() - self._asked_at if self._waits else 0.0

    def turn(self) -> bool:
        """Hear what came and ask for the next status when it is time; whether there is anything new."""
        news = self._hear_orders()
        if self._waits:
            answer = self._client.receive(0)
            if answer is not None:
                self._waits = False
                if not self._outdated:
                    self.status, news = answer, True
                self._outdated = False
        elif time.monotonic() >= self._due_at:
            self._asked_at = time.monotonic()
            self._due_at = self._asked_at + self._every_s
            self._waits = True
            self._client.send({"kind": "status"})
        return news

    def order(self, request: dict[str, Any]) -> None:
        """Ask for something; what the launcher says to it will be in ``said``."""
        client = ControlClient(self.cluster.control)
        client.send(request)
        self._orders.append((time.monotonic(), request, client))
        self.say(f"{request['kind']}: asked for")

    def _hear_orders(self) -> bool:
        left, news = [], False
        for since, request, client in self._orders:
            answer = client.receive(0)
            if answer is None and time.monotonic() - since < PATIENCE_S:
                left.append((since, request, client))
                continue
            client.close()
            news = True
            self._due_at, self._outdated = 0.0, self._waits  # what that changed is to be seen at once
            if answer is not None and "state" in answer and self.status is not None:
                self.status = {**self.status, "state": answer["state"]}
            self.say(f"{request['kind']}: {describe_answer(answer or {'error': 'no answer came'})}")
        self._orders = left
        return news

    def say(self, text: str) -> None:
        """Have a text stand where answers do."""
        self.said, self.said_at = text, time.monotonic()


def describe_answer(answer: dict[str, Any]) -> str:
    """The launcher's answer to an order, in words."""
    match answer:
        case {"error": problem}:
            return str(problem)
        case {"before": before, "actors": actors, "worlds": worlds, "note": note}:
            return f"from {before} to {actors} actors for {worlds} worlds{'; ' + note if note else ''}"
        case {"checkpoint": path, "version": version}:
            return f"version {version} is in {'/'.join(Path(path).parts[-2:])}"
        case {"index": index, "worlds": worlds}:
            return f"actor {index} gives its worlds, {worlds}, to the others"
        case {"stopping": True}:
            return "the run ends after a last checkpoint"
        case {"state": state}:
            return f"the run is {state}"
    return str(answer)
