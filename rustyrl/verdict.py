"""What limits a run, by how much, and what would change that: computed from the timings that every run records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Timing", "Verdict", "judge"]

WORTH = 0.05  # a gain below this is not worth a process
FEW = 3  # updates from which on a run says something of itself
ACTOR_WORK = {
    "step": "stepping worlds",
    "act": "choosing actions",
    "prepare": "drawing noise and building worlds",
    "encode": "encoding and sending",
    "send": "encoding and sending",
    "load": "loading weights",
}
REMEDIES = {
    "stepping worlds": "faster worlds",
    "choosing actions": "more slots in each world, or a smaller policy",
    "drawing noise and building worlds": "longer episodes, or a longer unroll_length",
    "encoding and sending": "a longer unroll_length, or smaller observations",
    "loading weights": "a longer unroll_length",
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one batch, on the average of recent ones.

    seconds: from batch to batch
    learner_s: of the training thread by stage, ``wait`` among them
    actor_s: summed over the actors by stage, without waiting
    cpu_s: processor time of the learner and all actors
    steps: env steps
    actors, worlds, cores: how many there are
    lag: the policy lag that is allowed; at 0 nobody collects while the learner trains
    """

    seconds: float
    learner_s: Mapping[str, float]
    actor_s: Mapping[str, float]
    cpu_s: float
    steps: float
    actors: int
    worlds: int
    cores: int
    lag: int

    @classmethod
    def of(cls, recent: Mapping[str, Any], worlds: int, cores: int, lag: int) -> Timing | None:
        """From what the learner reports of its newest updates; None if these are too few."""
        updates = recent.get("updates", 0)
        if updates < FEW or not recent["steps"] or not recent["actors"]:
            return None
        actor_s = {stage: s / updates for stage, s in recent["actor_s"].items() if stage not in ("wait", "cpu")}
        return cls(
            seconds=recent["seconds"] / updates,
            learner_s={stage: s / updates for stage, s in recent["learner_s"].items()},
            actor_s=actor_s,
            cpu_s=(recent["cpu_s"] + recent["actor_s"].get("cpu", 0.0)) / updates,
            steps=recent["steps"] / updates,
            actors=min(recent["actors"], worlds),
            worlds=worlds,
            cores=cores,
            lag=lag,
        )

    @property
    def wait(self) -> float:
        """The share of its time that the learner waits for experience."""
        total = sum(self.learner_s.values())
        return self.learner_s.get("wait", 0.0) / total if total else 0.0

    @property
    def learning_s(self) -> float:
        """What the learner does with a batch once it has it."""
        return sum(seconds for stage, seconds in self.learner_s.items() if stage != "wait")

    def collecting_s(self, actors: int) -> float:
        """What so many actors need for a batch: the one with the most worlds is waited for."""
        most = math.ceil(self.worlds / min(actors, self.worlds))
        return sum(self.actor_s.values()) * most / self.worlds

    @property
    def computing_s(self) -> float:
        """What all of it would take on these cores at the least."""
        return self.cpu_s / self.cores

    def predict_s(self, actors: int, lag: int | None = None) -> float:
        """From batch to batch with so many actors, and another lag.

        Collecting and learning go on at the same time from lag 1 on, and after each other at lag 0. What a batch takes
        now beyond that (ways to go, scheduling) is expected to stay.
        """
        beyond = max(0.0, self.seconds - self._least(self.actors, self.lag))
        return self._least(actors, self.lag if lag is None else lag) + beyond

    def predict_sps(self, actors: int, lag: int | None = None) -> float:
        """Trained env steps per second, see `predict_s`."""
        return self.steps / self.predict_s(actors, lag)

    def _least(self, actors: int, lag: int) -> float:
        collecting, learning = self.collecting_s(actors), self.learning_s
        return max(collecting + learning if lag == 0 else max(collecting, learning), self.computing_s)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What limits a run.

    limit: ``worlds``, ``inference``, ``wire``, ``learner`` or ``cores``
    text: in words, with what to change
    actors: how many would be best, on this machine, of this run's worlds
    gain: what that would give, as a share of the present SPS
    """

    limit: str
    text: str
    actors: int
    gain: float


def judge(timing: Timing) -> Verdict:
    """Say what limits a run, by how much, and what to change."""
    best = _best_actors(timing)
    gain = timing.seconds / timing.predict_s(best) - 1
    collecting, learning = timing.collecting_s(timing.actors), timing.learning_s
    waits = f"the learner waits {timing.wait:.0%} of the time"
    if timing.computing_s > 0.9 * timing.seconds and timing.computing_s > 0.85 * max(collecting, learning):
        return Verdict("cores", f"{waits}; {_cores_busy(timing)}", best, gain)
    if timing.lag == 0:
        overlapped = timing.seconds / timing.predict_s(timing.actors, lag=1) - 1
        if overlapped > max(gain, WORTH):
            text = (
                f"{waits}: at lag 0 collecting ({collecting / (collecting + learning):.0%}) and learning take turns; "
                f"--max-policy-lag 1 would give about {overlapped:+.0%}"
            )
            return Verdict("learner" if learning > collecting else "worlds", text, best, gain)
    if learning >= collecting:
        return Verdict("learner", f"{waits}: learner-bound; {_learner_advice(timing, best)}", best, gain)
    work = _main_work(timing)
    limit = {"stepping worlds": "worlds", "choosing actions": "inference"}.get(work, "wire")
    bound = {"worlds": "world-bound", "inference": "inference-bound", "wire": "bound by the actors"}[limit]
    of_it = sum(seconds for stage, seconds in timing.actor_s.items() if ACTOR_WORK.get(stage, stage) == work)
    share, advice = of_it / sum(timing.actor_s.values()), _actor_advice(timing, best, gain, work)
    text = f"{waits}: {bound} ({share:.0%} of the actors' work is {work}); {advice}"
    return Verdict(limit, text, best, gain)


def _best_actors(timing: Timing) -> int:
    """The smallest number of actors, one for each world at most, that comes close to the best."""
    times = {n: timing.predict_s(n) for n in range(1, timing.worlds + 1)}
    best_s = min(times.values())
    if timing.seconds / best_s - 1 < WORTH:
        return timing.actors
    return min(n for n, seconds in times.items() if seconds <= 1.02 * best_s)


def _main_work(timing: Timing) -> str:
    by_work: dict[str, float] = {}
    for stage, seconds in timing.actor_s.items():
        work = ACTOR_WORK.get(stage, stage)
        by_work[work] = by_work.get(work, 0.0) + seconds
    return max(by_work, key=lambda work: by_work[work])


def _cores_busy(timing: Timing) -> str:
    busy = timing.cpu_s / timing.seconds
    actors = sum(timing.actor_s.values())
    side = "the learner" if timing.learning_s > actors else "the actors"
    return (
        f"{busy:.1f} of {timing.cores} cores are busy, which is all there is: more cores, a GPU or actors on other "
        f"machines would help, and so would less work for {side}; more actors here would not"
    )


def _learner_advice(timing: Timing, best: int) -> str:
    stage = max((s for s in timing.learner_s if s != "wait"), key=lambda s: timing.learner_s[s])
    share = timing.learner_s[stage] / timing.learning_s
    text = f"{share:.0%} of its work is {stage}"
    if stage == "update":
        text += ": a larger ppo.minibatch_size, fewer ppo.epochs, more run.threads or a GPU would help"
    if best < timing.actors:
        text += f"; {best} actors would do"
    else:
        text += "; more actors would not"
    return text


def _actor_advice(timing: Timing, best: int, gain: float, work: str) -> str:
    more = best - timing.actors
    if more > 0 and gain >= WORTH:
        return f"{more} more actor{'s' if more > 1 else ''} would give about {gain:+.0%}"
    other = REMEDIES.get(work, "less of it")
    if timing.actors >= timing.worlds:
        return f"each actor has one world: more worlds (batch.worlds) with an actor each, or {other}, would help"
    return f"{other} would help"
