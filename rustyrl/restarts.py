"""When a process that died is followed by another: after a pause that grows, and not for ever."""

from __future__ import annotations

import signal
from collections import deque

__all__ = ["FROM_OUTSIDE", "Restarts"]

# Exit codes of a process that somebody else ended, or the kernel for want of memory.
FROM_OUTSIDE = (-getattr(signal, "SIGKILL", signal.SIGTERM), -signal.SIGTERM)

FIRST_PAUSE_S = 0.25  # before the first restart; doubled with each that follows within the window
LONGEST_PAUSE_S = 2.0


class Restarts:
    """Counts deaths within a window of time."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._deaths: deque[float] = deque()

    def died(self, now: float, standstill_s: float = 0.0) -> float | None:
        """Count a death.

        Args:
            now: monotonic seconds.
            standstill_s: how long nothing had gone on before it, which is taken out of the window.

        Returns:
            The pause in seconds before the next start; None if it died more often than the limit allows.
        """
        self._deaths = deque(death + standstill_s for death in self._deaths)
        self._deaths.append(now)
        while self._deaths[0] < now - self._window_s:
            self._deaths.popleft()
        if len(self._deaths) > self._limit:
            return None
        return float(min(FIRST_PAUSE_S * 2 ** (len(self._deaths) - 1), LONGEST_PAUSE_S))
