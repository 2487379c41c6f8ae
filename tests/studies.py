"""A learner and one actor in this process: real worlds, policy, batches and updates, without processes and links."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from rustyrl.config import Config, build_config
from rustyrl.rollout import Ticket
from rustyrl.stages import Stages
from rustyrl.weights import decode_weights
from rustyrl.wire import Welcome
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.fleet import Fleet
from rustyrl_actors.pulse import Pulse
from rustyrl_learner.advantage import batch_figures, training_batch
from rustyrl_learner.batch import BatchBuffer
from rustyrl_learner.diagnosis import Diagnosis, Finding
from rustyrl_learner.ppo import ppo_update
from rustyrl_learner.training import Training

CPU = torch.device("cpu")
SMALL = {
    "env": {"slots": 64},
    "batch": {"worlds": 1, "unroll_length": 16},
    "policy": {"hidden": [16]},
    "ppo": {"minibatch_size": 512, "epochs": 2, "learning_rate": 1e-2},
}


class NoLink:
    def offer(self, message: object) -> bool:
        return False


class Study:
    """A run at lag 0 that goes one update further each time it is told to."""

    def __init__(self, world: str, **sections: dict[str, Any]) -> None:
        merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in SMALL.keys() | sections.keys()}
        parameters = merged.pop("env", {})
        source = find_environment(world, parameters)
        self.spec = source.spec
        self.config: Config = build_config(source.spec.defaults, merged)
        self.training = Training(self.config, self.spec, CPU)
        self.diagnosis = Diagnosis(self.spec, self.config)
        self.rows: list[dict[str, float]] = []
        self.returns: list[float] = []
        self._version = 0
        length, self._worlds = self.config.batch.unroll_length, tuple(range(self.config.batch.worlds))
        welcome = Welcome(0, 0, world, parameters, 1, length, stagger=self.config.actor.stagger, poison=True)
        self.fleet = Fleet(source, welcome, 1, Pulse(NoLink(), None))

    def update(self) -> list[Finding]:
        """What `Learner` does with a batch; what is found."""
        training, ppo, version = self.training, self.config.ppo, self._version
        self.fleet.load(decode_weights(training.weights()), version)
        rollout = self.fleet.answer(Ticket(version, version, self._worlds), Stages()).rollout
        buffer = BatchBuffer(version, self.spec, self.config.batch.unroll_length, len(self._worlds))
        buffer.place(rollout)
        batch, episodes = buffer.to_device(CPU), buffer.episodes()
        figures: dict[str, float] = {}
        with training.whole_or_undone():
            if not training.warming_up:
                learned = {"rewards": training.rewards, "values": training.values}
                rows = training_batch(training.network, batch, ppo, normalizer=training.normalizer, **learned)
                figures = batch_figures(rows, training.network, training.values)
                rate = ppo.learning_rate
                figures |= asdict(ppo_update(training.network, training.optimizer, rows, ppo, rate, training.shuffle))
            if training.normalizer is not None:
                training.normalizer.fold(batch.observation[:-1][batch.valid])
            training.check_finite()
        self._version += 1
        self.rows.append(figures)
        self.returns += episodes.episode_return.tolist()
        return self.diagnosis.look(batch, episodes, figures, lag=0, steps=version)

    def updates(self, count: int) -> Iterator[Finding]:
        """Go on until so many updates; the findings on the way."""
        while self._version < count:
            yield from self.update()


def found(world: str, updates: int, until: str = "", **sections: dict[str, Any]) -> dict[str, str]:
    """What is found in so many updates, or until this is, by kind."""
    study, findings = Study(world, **sections), {}
    with closing(study.fleet):
        for finding in study.updates(updates):
            findings[finding.kind] = finding.message
            if finding.kind == until:
                break
    return findings
