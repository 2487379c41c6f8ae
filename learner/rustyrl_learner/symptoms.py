"""What can be seen of a run that cannot learn: one class for each symptom, which looks at every batch until it is sure.

The constants say how long each waits; docs/diagnosis.md has the conditions in words.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rustyrl.config import Config
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import UNBOUNDED, EnvironmentSpec, action_blocks
from rustyrl_learner.batch import Batch

__all__ = [
    "ConstantObservations",
    "EntropyCollapse",
    "EqualRewards",
    "OneStepEpisodes",
    "RatioNotOne",
    "Seen",
    "Symptom",
    "UnscaledObservations",
    "ValueExplosion",
]

EPISODES = 200  # that a symptom of episodes is over, at least
UPDATES = 30  # before equal rewards say anything: the first few may be all of one kind
MANY_EPISODES, MANY_STEPS = 1000, 100_000  # one of both, too: a rare reward may take some hundred episodes to find
FEW_UPDATES = 10  # in a row, for what no chance brings about
LARGE, SMALL = 30.0, 1e-3  # root mean squares of raw observations that networks of orthogonal weights cannot take
CHOICE_SHARE = 0.02  # of log(choices): two of them are then taken with probabilities 0.998 and 0.002
BOX_SHARE = 0.01  # of half a box's range, or of 1 without bounds, that a deviation may shrink to
FIRST = 100  # episodes that a policy's return is held against, at least one of each slot
FACTOR = 10.0  # between what rewards allow, and an explosion
RATIO_ERROR, GROSS_ERROR = 1e-3, 0.1  # rounding gives 1e-6 to 1e-4; the latter needs no second look
ROW = 3  # lag-0 updates in a row


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to look at after a batch.

    batch: as collected, on the learner's device
    episodes: that ended in it, ordered by slot
    figures: of the update, by the names in docs/metrics.md; empty if it was not trained on
    lag: policy versions between the one that collected it and the one that it trained
    updates, steps, ended: batches, valid env steps and ended episodes so far, these included
    reward_low, reward_high: of all valid steps so far
    terminated: whether any episode so far ended by itself
    """

    batch: Batch
    episodes: EpisodeRows
    figures: Mapping[str, float]
    lag: int
    updates: int
    steps: int
    ended: int
    reward_low: float
    reward_high: float
    terminated: bool


class Symptom(Protocol):
    """Something that keeps a run from learning."""

    kind: ClassVar[str]  # short and stable, for machines
    settled: bool  # nothing can be found any more: it need not look again

    def look(self, seen: Seen) -> str:
        """What to say, or "" as long as nothing is found."""
        ...


class EqualRewards:
    """Every reward is the same number, and no episode came to another return than the others."""

    kind: ClassVar[str] = "rewards_equal"

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.settled = False
        self._one_step = spec.max_episode_steps == 1
        self._lengths: deque[int] = deque(maxlen=EPISODES)

    def look(self, seen: Seen) -> str:
        """Wait for a second number; a constant one may still count how long episodes are."""
        reward = seen.reward_high
        ends_matter = seen.terminated and not self._one_step and reward != 0
        if seen.reward_low < reward or ends_matter:
            self.settled = True
            return ""
        self._lengths.extend(seen.episodes.length[-EPISODES:].tolist())
        if seen.updates < UPDATES or seen.ended < EPISODES:
            return ""
        if seen.ended < MANY_EPISODES and seen.steps < MANY_STEPS:
            return ""
        counted = f"in {seen.steps:,} env steps and {seen.ended:,} episodes"
        if reward == 0:
            return (
                f"every reward is 0 {counted}, so there is nothing to learn from: check that the world pays at all; if "
                "only a goal pays, it was never reached: pay for coming nearer, start nearer, or explore more "
                "(ppo.entropy)"
            )
        if len(set(self._lengths)) > 1:
            return ""
        return (
            f"every reward is {reward:.6g} {counted}, and no episode ended before its limit of steps, so all returns "
            "are the same and no action can be told from another: check that the reward depends on what the agent "
            "does; if reaching a goal is to end an episode, none was reached yet: explore more (ppo.entropy), or pay "
            "for coming nearer"
        )


class OneStepEpisodes:
    """Every episode ends with its first step, although it could last longer."""

    kind: ClassVar[str] = "one_step_episodes"

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.settled = spec.max_episode_steps == 1
        self._limit = spec.max_episode_steps

    def look(self, seen: Seen) -> str:
        """Wait for an episode of two steps."""
        if (seen.episodes.length > 1).any():
            self.settled = True
            return ""
        if seen.ended < EPISODES or seen.updates < FEW_UPDATES:
            return ""
        return (
            f"all {seen.ended:,} episodes so far were one step long, of {self._limit:,} that they may last: check what "
            "the world sets terminated by, above all right after a reset; if episodes of one step are meant, declare "
            "max_episode_steps=1"
        )


class ConstantObservations:
    """Every number of every observation, and of every mask, is always the same."""

    kind: ClassVar[str] = "observations_constant"

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.settled = spec.max_episode_steps == 1  # a bandit needs to see nothing
        self._range: tuple[Tensor, Tensor] | None = None

    def look(self, seen: Seen) -> str:
        """Wait for a second number; nearly always the first batch has one."""
        batch = seen.batch
        rows = batch.observation[:-1][batch.valid]
        if batch.action_mask is not None:
            rows = torch.cat([rows, batch.action_mask[batch.valid].float()], 1)
        if not rows.shape[0]:
            return ""
        low, high = rows.amin(0), rows.amax(0)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high
        if bool((low < high).any()):
            self.settled = True
            return ""
        if seen.updates < FEW_UPDATES:
            return ""
        numbers = ", ".join(f"{number:.4g}" for number in low[:4].tolist()) + (", ..." if low.shape[0] > 4 else "")
        return (
            f"all observations of {seen.steps:,} env steps are the same ({numbers}), so the policy cannot tell one "
            "state from another: check that the world writes its observation in every step (observe)"
        )


class UnscaledObservations:
    """Without a normaliser, numbers so large or so small that a network hardly learns from them."""

    kind: ClassVar[str] = "observations_unscaled"

    def __init__(self, spec: EnvironmentSpec, config: Config) -> None:
        self.settled = config.policy.normalize
        self._names = [
            f"{array.name}[{index}]" if array.width > 1 else array.name
            for array in spec.observation
            for index in range(array.width)
        ]

    def look(self, seen: Seen) -> str:
        """Look at batches 4, 8, 16 and so on: what a world shows may grow as the agent gets further."""
        if seen.updates < 4 or seen.updates & (seen.updates - 1):
            return ""
        rows = seen.batch.observation[:-1][seen.batch.valid]
        if not rows.shape[0]:
            return ""
        size = rows.square().mean(0).sqrt()
        number, index = (part.item() for part in size.max(0))
        name = self._names[int(index)]
        if number > LARGE:
            count = int((size > LARGE).sum())
            others = f" (and {count - 1} more numbers above {LARGE:g})" if count > 1 else ""
            what = f"observation {name} has a root mean square of {number:.4g}{others}, which saturates a network"
        elif 0 < number < SMALL:
            what = f"all observations are tiny, the largest being {name} with a root mean square of {number:.2g}"
        else:
            return ""
        return f"{what}, and they are not normalised: set policy.normalize=true, or scale them in the world to about 1"


class EntropyCollapse:
    """The policy has become nearly deterministic, and its return is no better than at the start."""

    kind: ClassVar[str] = "entropy_collapse"

    def __init__(self, spec: EnvironmentSpec, config: Config) -> None:
        self._blocks = action_blocks(spec.action)
        self._box_floor = sum(
            math.log(BOX_SHARE * _half_range(low, high)) + 0.5 * (1 + math.log(2 * math.pi))
            for part in spec.action
            for low, high in zip(part.low, part.high, strict=True)
        )
        choices = sum(math.log(count) for part in spec.action for count in part.counts)
        self._floor = CHOICE_SHARE * choices + self._box_floor
        self.settled = not choices and not any(part.low for part in spec.action)  # there is nothing to choose
        self._masked = spec.mask_width > 0
        self._limit = spec.max_episode_steps if config.actor.stagger else 1
        slots = spec.slots * config.batch.worlds
        self._quota = -(-FIRST // slots)
        self._ended = np.zeros(slots, np.int64)  # episodes of each slot
        self._first: list[float] = []  # returns of the first episodes of each slot
        self._newest: deque[float] = deque(maxlen=EPISODES)  # of others that ended while it was collapsed
        self._row = 0  # updates that it has been

    def look(self, seen: Seen) -> str:
        """Hold the returns since the collapse against the first ones, which the first policies had."""
        returns = self._take_first(seen)
        entropy = seen.figures.get("entropy", math.inf)
        if entropy > self._floor or (self._masked and entropy > self._masked_floor(seen.batch)):
            self._row = 0
            self._newest.clear()
            return ""
        self._row += 1
        self._newest.extend(returns[-EPISODES:].tolist())
        known = len(self._first) >= max(FIRST, self._quota * len(self._ended)) // 2
        if self._row < FEW_UPDATES or len(self._newest) < EPISODES or not known:
            return ""
        first, newest = np.array(self._first), np.array(self._newest)
        error = math.sqrt(first.var() / len(first) + newest.var() / len(newest))
        if newest.mean() > first.mean() + error:
            return ""
        return (
            f"the policy is nearly deterministic (entropy {entropy:.3g} nats) although it has not got better: "
            f"{newest.mean():.4g} +- {newest.std():.2g} is the return of the newest {len(newest)} episodes, "
            f"{first.mean():.4g} +- {first.std():.2g} that of the first {len(first)}. It hardly tries anything any "
            "more: raise ppo.entropy, lower ppo.learning_rate or ppo.epochs, and start anew"
        )

    def _take_first(self, seen: Seen) -> NDArray[np.float32]:
        """Keep the first returns of each slot; the others."""
        slot, returns, length = seen.episodes.slot, seen.episodes.episode_return, seen.episodes.length
        place = self._ended[slot] + np.arange(len(slot)) - np.searchsorted(slot, slot)
        first = place < self._quota
        if first.any():
            counted = returns[first].astype(np.float64)
            # A first episode may begin with a part of its steps used (actor.stagger). What it lost by that would make
            # the first policies look better than they were where every step costs something.
            cut = _first_end_is_cut(seen.batch)[slot[first]] & (place[first] == 0) & (counted < 0)
            counted *= np.where(cut, np.maximum(self._limit / length[first], 1.0), 1.0)
            self._first += counted.tolist()
        self._ended += np.bincount(slot, minlength=len(self._ended))
        return returns[~first]

    def _masked_floor(self, batch: Batch) -> float:
        """The floor for the choices that were allowed, on average over the batch."""
        assert batch.action_mask is not None  # noqa: S101 - as the spec says
        total = torch.zeros((), device=batch.valid.device)
        for block in self._blocks:
            if block.kind == "discrete" and block.mask is None:
                total += block.groups * math.log(block.choices)
            elif block.mask is not None:
                allowed = batch.action_mask[batch.valid][:, block.mask].reshape(-1, block.groups, block.choices)
                total += allowed.sum(-1).clamp(min=1).float().log().sum(-1).mean()
        return CHOICE_SHARE * float(total) + self._box_floor if float(total) else -math.inf


class ValueExplosion:
    """The critic speaks of values that no sum of these rewards can come to."""

    kind: ClassVar[str] = "value_explosion"

    def __init__(self, spec: EnvironmentSpec, config: Config) -> None:
        self.settled = False
        self._limit = spec.max_episode_steps
        self._ppo = config.ppo
        self._start: float | None = None
        self._before = False  # whether it was so in the update before

    def look(self, seen: Seen) -> str:
        """Compare with what rewards allow, and with what the critic said at the start, when it knew nothing."""
        figures, ppo = seen.figures, self._ppo
        if "value_mean" not in figures:
            return ""
        size = max(abs(figures[name]) for name in ("value_mean", "value_target_mean", "value_target_std"))
        if self._start is None:
            self._start = size
        if not ppo.normalize_value:  # else the loss has other units
            size = max(size, math.sqrt(2 * figures["value_loss"]))
        gamma = figures.get("gamma", ppo.gamma)
        horizon = 1 / (1 - gamma) if gamma < 1 else float(self._limit)
        reward = ppo.reward_clip if ppo.normalize_reward else max(abs(seen.reward_low), abs(seen.reward_high))
        bound = FACTOR * max(reward * horizon, self._start)
        before, self._before = self._before, size > max(bound, SMALL)
        if not (before and self._before):
            return ""
        return (
            f"values have exploded: they are of the size of {size:.3g}, but rewards of at most {reward:.3g} come to no "
            f"more than {reward * horizon:.3g} at a discount of {gamma:g}: lower ppo.learning_rate, "
            "keep ppo.max_gradient_norm near 0.5, scale rewards (ppo.normalize_reward=true), or normalise values "
            "(ppo.normalize_value=true)" + (", and discount (ppo.gamma below 1)" if gamma >= 1 else "")
        )


class RatioNotOne:
    """At lag 0, learner and actor find the same action differently probable under the same version."""

    kind: ClassVar[str] = "ratio_not_one"

    def __init__(self) -> None:
        self.settled = False
        self._row = 0

    def look(self, seen: Seen) -> str:
        """Look at batches that were collected under the version that they train."""
        error = seen.figures.get("first_ratio_error")
        if seen.lag or error is None:
            return ""
        self._row = self._row + 1 if error > RATIO_ERROR else 0
        if self._row < ROW and error <= GROSS_ERROR:
            return ""
        return (
            f"an action's probability by the learner is up to {error:.2g} times off what its actor said, under the "
            "same policy version (1e-4 is rounding): the learner trains on observations or actions that were not those "
            "acted on. Does the world change an observation, or its mask, after giving it? Else see that all machines "
            "have the same versions of rustyrl and numpy"
        )


def _half_range(low: float, high: float) -> float:
    """Of one number of a box; 1 where a side has no bound."""
    return (high - low) / 2 if abs(low) < UNBOUNDED and abs(high) < UNBOUNDED and high > low else 1.0


def _first_end_is_cut(batch: Batch) -> NDArray[np.bool_]:
    """Whether the first episode of each slot that ends in the batch was truncated, `[B]`."""
    ends = batch.terminated | batch.truncated
    cut: NDArray[np.bool_] = (batch.truncated & (ends.cumsum(0) == 1)).any(0).cpu().numpy()
    return cut
