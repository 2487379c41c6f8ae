"""How fast a world is, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import esper

from rustyrl_actors.catalog import EnvironmentSource
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.testing.trial import ActionDraws

__all__ = ["measure_speed"]

BUDGET_S = 0.5
BLOCK = 32


def measure_speed(source: EnvironmentSource, seed: int) -> dict[str, float]:
    """Step one environment for about half a second.

    Returns:
        ``env_sps`` (env steps of all slots in a second) and, in us for each step of the environment, ``step_us`` and
        its parts: ``tick_us`` (the game), ``observe_us``, ``reset_us`` and ``framework_us`` (the rest, which is ours).
        Of a Gymnasium environment only the whole is known.
    """
    spent = {"tick": 0.0, "observe": 0.0, "reset": 0.0}
    environment, rows = source.make(), allocate_rows(source.spec)
    draws = ActionDraws(source.spec, BLOCK, seed)
    steps = 0
    try:
        environment.reset((seed, 0), rows)
        with _timed(environment, spent):
            started = time.perf_counter()
            whole_s = 0.0
            while whole_s < BUDGET_S and time.perf_counter() - started < 2 * BUDGET_S:
                for t in range(BLOCK):
                    action = draws.at(t, rows.action_mask)
                    before = time.perf_counter()
                    environment.step(action, rows)
                    whole_s += time.perf_counter() - before
                steps += BLOCK
    finally:
        environment.close()
    speed = {"env_sps": source.spec.slots * steps / whole_s, "step_us": whole_s / steps * 1e6}
    if source.info is not None:
        speed |= {f"{part}_us": seconds / steps * 1e6 for part, seconds in spent.items()}
        speed["framework_us"] = speed["step_us"] - sum(spent.values()) / steps * 1e6
    return {name: round(value, 3) for name, value in speed.items()}


@contextmanager
def _timed(environment: Any, spent: dict[str, float]) -> Iterator[None]:
    """Time the parts of a world while the block runs."""
    world = getattr(environment, "_world", None)
    if world is None:
        yield
        return

    def timing(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - before

        return timed

    process = esper.process
    environment._world = _Timed(timing("observe", world.observe), timing("reset", world.reset), world.info)
    if hasattr(environment, "_tick"):
        environment._tick = timing("tick", environment._tick)
    else:
        esper.process = timing("tick", process)
    try:
        yield
    finally:
        esper.process = process
        environment._world = world


class _Timed:
    """A world whose hooks are timed."""

    def __init__(self, observe: Callable[..., Any], reset: Callable[..., Any], info: Any) -> None:
        self.observe, self.reset, self.info = observe, reset, info
