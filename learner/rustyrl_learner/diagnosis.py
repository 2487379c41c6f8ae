"""Say why a run cannot learn, where that can be seen: pure bookkeeping over batches, no sockets and no files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rustyrl.config import Config, PPOConfig
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import EnvironmentSpec
from rustyrl_learner.batch import Batch
from rustyrl_learner.symptoms import (
    UPDATES,
    ConstantObservations,
    EntropyCollapse,
    EqualRewards,
    OneStepEpisodes,
    RatioNotOne,
    Seen,
    Symptom,
    UnscaledObservations,
    ValueExplosion,
)

__all__ = ["Diagnosis", "Finding", "explain_not_finite"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a run cannot learn, as far as could be seen.

    kind: short and stable, see docs/diagnosis.md
    message: what was seen in numbers, what it means, what to do
    steps: env steps trained when it was found
    """

    kind: str
    message: str
    steps: int


class Diagnosis:
    """Looks for symptoms in every batch; each is found once."""

    def __init__(self, spec: EnvironmentSpec, config: Config, version: int = 0) -> None:
        """Begin to look.

        Args:
            spec: what is trained.
            config: how.
            version: of the policy to begin with.
        """
        self._symptoms: list[Symptom] = [
            OneStepEpisodes(spec),
            ConstantObservations(spec),
            UnscaledObservations(spec, config),
            ValueExplosion(spec, config),
            RatioNotOne(),
        ]
        # A policy that has been trained may be good at what it does: that it is deterministic, or gets the same reward
        # in every step, then means nothing.
        if version < UPDATES and not config.run.init:
            self._symptoms += [EqualRewards(spec), EntropyCollapse(spec, config)]
        self._updates = self._steps = self._ended = 0
        self._low, self._high = math.inf, -math.inf
        self._terminated = False
        self.findings: list[Finding] = []

    def look(
        self, batch: Batch, episodes: EpisodeRows, figures: Mapping[str, float], *, lag: int, steps: int
    ) -> list[Finding]:
        """Look at one batch and what the update made of it; what is found new.

        Args:
            batch: as collected, on the learner's device.
            episodes: that ended in it, ordered by slot.
            figures: of the update, by the names in docs/metrics.md; empty if it was not trained on.
            lag: policy versions between the one that collected it and the one that it trained.
            steps: env steps trained by the run, for the record.
        """
        seen = self._see(batch, episodes, figures, lag)
        found = []
        for symptom in list(self._symptoms):
            message = "" if symptom.settled else symptom.look(seen)
            if message:
                found.append(Finding(symptom.kind, message, steps))
            if message or symptom.settled:
                self._symptoms.remove(symptom)
        self.findings += found
        return found

    def _see(self, batch: Batch, episodes: EpisodeRows, figures: Mapping[str, float], lag: int) -> Seen:
        """Sum up the batch: its rewards and ends are few enough to be looked at on the host."""
        valid = batch.valid.cpu().numpy()
        reward = batch.reward.cpu().numpy()[valid]
        if reward.size:
            self._low, self._high = min(self._low, float(reward.min())), max(self._high, float(reward.max()))
        self._terminated = self._terminated or bool(batch.terminated.cpu().numpy()[valid].any())
        self._updates += 1
        self._steps += reward.size
        self._ended += len(episodes.slot)
        return Seen(
            batch,
            episodes,
            figures,
            lag,
            updates=self._updates,
            steps=self._steps,
            ended=self._ended,
            reward_low=self._low,
            reward_high=self._high,
            terminated=self._terminated,
        )


def explain_not_finite(what: str, version: int, ppo: PPOConfig, learning_rate: float) -> str:
    """What to say of an update that came to numbers that are not finite.

    Args:
        what: the tensor and what is wrong with it.
        version: that the update was to make.
        ppo: its limits are named.
        learning_rate: the newest.
    """
    return (
        f"{what} in the update to policy version {version}, which was undone. Usual causes: rewards or observations so "
        "large that sums or squares overflow (ppo.normalize_reward=true, policy.normalize=true), a learning rate that "
        f"is too high ({learning_rate:.3g} now), gradients that are not limited (ppo.max_gradient_norm is "
        f"{ppo.max_gradient_norm:g})"
    )
