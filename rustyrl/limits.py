"""How large a message of one run may honestly be, and how many may come that nobody asked for."""

from __future__ import annotations

from rustyrl.config import Config
from rustyrl.rollout import ALIGNMENT_BYTES, aligned, array_bytes, rollout_arrays
from rustyrl.spec import ArraySpec, EnvironmentSpec
from rustyrl.wire import MAX_BLOB_BYTES, MAX_STATE_BYTES

__all__ = ["Allowance", "largest_message"]

UNASKED_S = 8.0  # messages a second that an actor may send unasked: it sends one lease
SPARE = 256  # of them at once, beyond what follows
LARGE_COST = 64.0  # what the largest message counts for, in small ones
HEADER_BYTES = 4096  # count for one more: a header of 1 MiB may take 0.1 s to read, a blob is not read at all


def largest_message(spec: EnvironmentSpec, config: Config) -> int:
    """The bytes of the largest blob that an actor may have to send: every world, every step the end of an episode.

    One actor may come to own every world; a world's state may be as large as the wire allows.
    """
    steps, slots = config.batch.unroll_length, spec.slots * config.batch.worlds
    ends = (steps * slots,)
    tail = [
        ArraySpec("final_index", (*ends, 2), "int32"),
        *(ArraySpec(f"final_observation.{array.name}", ends + array.shape, array.dtype) for array in spec.observation),
        *(ArraySpec(name, ends, "int32") for name in ("episode.slot", "episode.return", "episode.length")),
        *(ArraySpec(f"episode_metric.{name}", ends, "float32") for name in spec.episode_metrics),
    ]
    fixed = rollout_arrays(spec, steps, slots)
    rollout = sum(aligned(array_bytes(array)) for array in [*fixed, *tail]) + ALIGNMENT_BYTES
    return min(max(rollout, MAX_STATE_BYTES), MAX_BLOB_BYTES)


class Allowance:
    """What each peer may still send without being asked: it comes back with time, and large messages cost more."""

    def __init__(self, worlds: int, max_policy_lag: int, largest_bytes: int) -> None:
        """Have nobody.

        Args:
            worlds: of the run: the states of all may come too late at once.
            max_policy_lag: so many rollouts, and one, too.
            largest_bytes: of an honest message.
        """
        self.most = SPARE + 2.0 * worlds + (1.0 + LARGE_COST) * (max_policy_lag + 1)
        self._byte_cost = LARGE_COST / largest_bytes
        self._left: dict[bytes, tuple[float, float]] = {}

    def spend(self, peer: bytes, size_bytes: int, header_bytes: int, now: float) -> bool:
        """Count a message that nobody asked for; False if that is more than its peer may send.

        Args:
            peer: who sent it.
            size_bytes: of all its frames.
            header_bytes: of the header among them.
            now: on the monotonic clock (s).
        """
        left, since = self._left.pop(peer, (self.most, now))
        left = min(self.most, left + (now - since) * UNASKED_S)
        cost = 1.0 + size_bytes * self._byte_cost + header_bytes / HEADER_BYTES
        granted = cost <= left
        self._left[peer] = (left - cost * granted, now)  # at the end: the first were heard least recently
        while len(self._left) > 1 and self._is_whole(oldest := next(iter(self._left)), now):
            del self._left[oldest]  # as good as one that was never heard of
        return granted

    def __len__(self) -> int:
        """How many peers are remembered."""
        return len(self._left)

    def _is_whole(self, peer: bytes, now: float) -> bool:
        left, since = self._left[peer]
        return left + (now - since) * UNASKED_S >= self.most
