"""The learner process: batches in, versions out."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch
from torch import Tensor

from rustyrl.addresses import security_of
from rustyrl.channels import RolloutReceiver
from rustyrl.condition import meets
from rustyrl.config import Config
from rustyrl.control import ControlClient
from rustyrl.descriptors import DescriptorWatch
from rustyrl.errors import ContractError, RunFailedError, UsageError
from rustyrl.goal import evaluation_conditions
from rustyrl.keys import KeyRing
from rustyrl.limits import largest_message
from rustyrl.run_folder import read_best
from rustyrl.spec import EnvironmentSpec
from rustyrl.stages import Stages
from rustyrl_learner import checkpoint
from rustyrl_learner.advantage import batch_figures, training_batch, uses_vtrace
from rustyrl_learner.batch import Batch
from rustyrl_learner.checkpoint import EPISODES, Counters
from rustyrl_learner.checkpoint_keeper import CheckpointKeeper, describe_resume
from rustyrl_learner.checkpoint_writer import CheckpointWriter, Written
from rustyrl_learner.collector import Collector
from rustyrl_learner.device import CopyStream, choose_device, gpu_figures
from rustyrl_learner.diagnosis import Diagnosis, explain_not_finite
from rustyrl_learner.gathering import KeptWorld
from rustyrl_learner.ppo import Losses, ppo_update
from rustyrl_learner.recent import RecentUpdates
from rustyrl_learner.record import EpisodeWindow, MetricsLog
from rustyrl_learner.schedule import scheduled
from rustyrl_learner.trace import UpdateTrace
from rustyrl_learner.training import Training

__all__ = ["Learner", "StopRequestedError", "run_learner"]

log = logging.getLogger(__name__)

SIGNAL = "signal"  # why training ended if somebody else than the launcher wanted it: there will be a successor
WAIT_S = 0.1  # how long the training thread waits for a batch before it looks at its orders
REPORT_S = 0.2
MAX_CANDIDATES = 2  # versions waiting for their evaluation before training waits for the oldest
SAVE_S = 60.0  # how long the last checkpoint may take; the launcher is less patient
EDGE_SHARE = 0.4  # of the grace of a stop, cluster.stop_s: to come to the next batch edge; then comes the writing
MIN_EPISODES = 20  # before training figures say anything about the goal


class StopRequestedError(Exception):
    """The launcher wants this process to end, for a reason."""


class Learner:
    """Everything that lives as long as the learner process: networks, optimiser, collector, files."""

    def __init__(
        self,
        run: Path,
        config: Config,
        spec: EnvironmentSpec,
        control: ControlClient,
        listen: str,
        incarnation: int,
        expect: int,
        *,
        resume: bool,
        profile: Path | None = None,
    ) -> None:
        self._run_folder = run
        self._config = config
        self._spec = spec
        self._control = control
        self._incarnation = incarnation
        self._stop_reason: str | None = None
        self._paused = False
        self._stop_by = float("inf")  # until when a stop waits for a batch edge
        self._unlogged = False  # the newest row of metrics could not be written
        self._trace = None if profile is None else UpdateTrace(profile)
        self._stages = Stages()
        self._stages_s: dict[str, float] = {}
        self._window = EpisodeWindow(spec)
        self._conditions = evaluation_conditions(config.run, spec)
        self._candidates: list[int] = []
        self._best: int | None = None
        self._reported = 0.0
        self._losses: dict[str, Any] = {}
        self._newest_s: dict[str, float] = {}  # of the newest update, by stage
        self._recent = RecentUpdates()
        self._held = False  # whether training was held, by a pause or by evaluations, since the update before
        self._lags: Counter[int] = Counter()  # env steps trained on, by policy lag

        self._corrected = uses_vtrace(config.ppo, config.batch.max_policy_lag)
        self._device = choose_device(config.run.device)
        self._training = Training(config, spec, self._device)
        self._counters = Counters(learning_rate=config.ppo.learning_rate)
        folder, kept = run / "checkpoints", config.run.checkpoints_kept
        self._keeper = CheckpointKeeper(config, CheckpointWriter(folder, kept, spec.fingerprint, incarnation))
        worlds = self._resume() if resume else None
        if worlds is None and config.run.init:
            self._training.start_from(Path(config.run.init))
        self._diagnosis = Diagnosis(spec, config, self._counters.policy_version)
        self._log = MetricsLog(run, self._counters.policy_version)
        curve = security_of(listen, insecure=config.cluster.insecure) == "curve"
        self._descriptors = DescriptorWatch()
        self._receiver = RolloutReceiver(
            listen,
            KeyRing(run / "keys") if curve else None,
            insecure=config.cluster.insecure,
            largest_bytes=largest_message(spec, config),
        )
        self._collector = Collector(
            self._receiver,
            spec,
            config,
            incarnation,
            expect,
            self._counters.policy_version,
            self._training.weights(),
            copies=CopyStream(self._device) if self._device.type == "cuda" else None,
            worlds=worlds,
        )
        self._started = time.monotonic() - self._counters.seconds

    def train(self) -> str:
        """Train until a limit is reached or the launcher says stop; returns why it ended."""
        self._collector.start()
        self._control.send({"kind": "listening", "address": self._receiver.address, "pid": os.getpid()})
        try:
            while (reason := self._finished()) is None:
                if self._trace is not None:
                    self._trace.begin_update()
                self._update_once()
        except StopRequestedError as stop:
            reason = str(stop)
        except (ContractError, FloatingPointError) as error:  # what was learned before is sound
            with contextlib.suppress(RunFailedError):
                self._save_last(exact=False)
            if isinstance(error, FloatingPointError):
                version, rate = self._counters.policy_version + 1, self._counters.learning_rate
                raise FloatingPointError(explain_not_finite(str(error), version, self._config.ppo, rate)) from error
            raise
        self._save_last(exact=reason != "total_steps")  # the end of the budget is what all of it was for
        if reason == "total_steps":
            self._await_candidates()
            reason = self._stop_reason or reason
        return reason

    def close(self, *, goodbye: bool = True) -> dict[str, Any]:
        """Close every file, thread and socket; the last figures.

        Args:
            goodbye: whether the run is over for the actors, too.
        """
        snapshot = self._collector.close(goodbye=goodbye)
        if self._trace is not None:
            self._trace.close()
            if self._trace.problem:
                self._say(self._trace.problem)
        self._keeper.writer.close(SAVE_S)
        self._log.close()
        return self._figures(snapshot)

    def request_stop(self, reason: str) -> None:
        """End at the next opportunity; safe in a signal handler."""
        if self._stop_reason is None:
            self._stop_by = time.monotonic() + self._config.cluster.stop_s * EDGE_SHARE
            self._stop_reason = reason

    def _update_once(self) -> None:
        """One batch to one policy version: stops 6 to 10 of the straight line."""
        stages, training = self._stages, self._training
        with stages("wait"):
            buffer = self._next_batch()
        self._keeper.leave_edge()
        with stages("batch"):
            batch, episodes = buffer.to_device(self._device), buffer.episodes()
        warm_up = training.warming_up
        trained = 0 if warm_up else int(batch.valid.sum())
        lag = buffer.number - buffer.policy_version
        with training.whole_or_undone():  # a stop abandons it half-way
            losses, figures = self._train(batch) if trained else (None, {})
            if training.normalizer is not None:
                with stages("normalize"):
                    training.normalizer.fold(batch.observation[:-1][batch.valid])
            with stages("diagnose"):
                training.check_finite()
        self._window.add(episodes)
        self._lags[lag] += trained
        self._counters = Counters(
            policy_version=self._counters.policy_version + 1,
            steps=self._counters.steps + trained,
            seconds=time.monotonic() - self._started,
            learning_rate=losses.learning_rate if losses else self._counters.learning_rate,
            lag_steps=dict(self._lags),
        )
        with stages("diagnose"):  # before the buffer, whose memory the batch may be, is used again
            for finding in self._diagnosis.look(batch, episodes, figures, lag=lag, steps=self._counters.steps):
                self._say(f"finding: {finding.message}")
        with stages("export"):
            weights = training.weights()
        candidate = self._counters.policy_version % self._config.run.eval_every == 0 and self._near_goal()
        due = candidate or self._keeper.is_due(self._counters.policy_version, self._say)
        if due or self._stop_reason is not None or self._finished() is not None:
            with stages("checkpoint"):
                self._keeper.gather(lambda: self._collector.gather(self._counters.policy_version), self._hear_orders)
        with stages("publish"):
            actor_s, receive_s, actors = buffer.actor_stage_s(), buffer.receive_s, len(buffer.answers)
            rejected = "warm-up" if warm_up else None
            self._collector.publish(buffer, self._counters.policy_version, weights, rejected)
        self._record(figures, {"receive_s": receive_s, "actor_s": actor_s}, trained, actors)
        if candidate:
            self._candidates.append(self._counters.policy_version)
        if due:
            self._begin_checkpoint()
        self._report()

    def _train(self, batch: Batch) -> tuple[Losses, dict[str, float]]:
        """Stops 7 and 8: what the update did, and its figures by the names in docs/metrics.md."""
        training, stages = self._training, self._stages
        ppo = scheduled(self._config.ppo, self._progress(), self._counters.learning_rate)
        with stages("advantages"):
            rows = training_batch(
                training.network,
                batch,
                ppo,
                normalizer=training.normalizer,
                rewards=training.rewards,
                values=training.values,
                lagged=self._config.batch.max_policy_lag > 0,
                corrected=self._corrected,
            )
            figures = batch_figures(rows, training.network, training.values)
        with stages("update"):
            rate, ask = ppo.learning_rate, self._follow_orders
            given = (training.network, training.optimizer, rows, ppo, rate, training.shuffle)
            losses = ppo_update(*given, on_minibatch=ask, graphs=training.graphs)
        figures |= {"clip": ppo.clip, "entropy_coefficient": ppo.entropy, "gamma": ppo.gamma}
        return losses, {**asdict(losses), **figures}

    def _next_batch(self) -> Any:
        while True:
            self._follow_orders()
            held = self._paused or len(self._candidates) >= MAX_CANDIDATES
            if self._keeper.is_asked(held=held):
                self._begin_checkpoint()
            if not held or self._stop_reason is not None:
                buffer = self._collector.next_batch(WAIT_S)
                if buffer is not None:
                    return buffer
            else:
                self._held = True
                time.sleep(WAIT_S / 10)

    def _finished(self) -> str | None:
        limit = self._config.run.total_steps
        if limit and self._counters.steps >= limit:
            return "total_steps"
        return self._stop_reason if self._keeper.at_edge else None  # a stop that waited for the edge

    def _progress(self) -> float:
        """How much of the run's steps is trained; 0 where there is no limit."""
        limit = self._config.run.total_steps
        return self._counters.steps / limit if limit else 0.0

    def _record(self, losses: dict[str, Any], stages_s: dict[str, dict[str, float]], trained: int, actors: int) -> None:
        version = self._counters.policy_version
        learner_s = self._stages.take()
        if self._held:
            self._recent.skip()
        else:
            self._recent.add(trained, actors, learner_s, stages_s["actor_s"])
        self._held = False
        self._losses, self._newest_s = losses, learner_s
        self._stages_s = {n: self._stages_s.get(n, 0.0) + learner_s.get(n, 0.0) for n in self._stages_s | learner_s}
        row = {
            "policy_version": version,
            "steps": self._counters.steps,
            "seconds": round(self._counters.seconds, 4),
            "trained_sps": round(self._trained_sps(), 1),
            **self._window.figures(),
            **losses,
            "lag_steps": self._lag_steps(),
            "learner_s": learner_s,
            **stages_s,
        }
        try:
            self._log.write(row)
        except OSError as error:
            if not self._unlogged:
                self._say(f"metrics cannot be written: {error}; training goes on, rows are lost until they can")
            self._unlogged = True
        else:
            self._unlogged = False

    def _near_goal(self) -> bool:
        figures = self._window.figures()
        enough = figures.get("episodes", 0) >= MIN_EPISODES
        return bool(self._conditions) and enough and meets(self._conditions, figures)

    def _begin_checkpoint(self) -> None:
        """Have the state of this version written."""
        with self._stages("checkpoint"):
            protected = {*self._candidates, *([] if self._best is None else [self._best])}
            state = {**self._training.state(), **self._episode_tensors()}
            counters = msgspec.structs.replace(self._counters, candidates=tuple(self._candidates))
            self._keeper.begin(counters, self._training.weights(), state, protected)

    def _episode_tensors(self) -> dict[str, Tensor]:
        return {f"{EPISODES}{name}": torch.from_numpy(column) for name, column in self._window.columns().items()}

    def _end_checkpoint(self, written: Written) -> None:
        """Tell the launcher of one that was written, or could not be."""
        version = written.version
        asked = self._keeper.note(written)
        if written.path is None:
            self._say(f"the checkpoint of version {version} could not be written: {written.problem}")
            if version in self._candidates:
                self._candidates.remove(version)
        else:
            if remark := self._keeper.explain(written):
                self._say(remark)
            if version in self._candidates:
                policy = str(written.path / "policy.safetensors")
                self._control.send({"kind": "candidate", "version": version, "policy": policy})
        if asked:
            path = str(written.path or "")
            answer = {"kind": "checkpointed", "version": version, "path": path, "problem": written.problem}
            self._control.send(answer)

    def _save_last(self, *, exact: bool) -> None:
        """Write the state that training ends with, and wait for it.

        Args:
            exact: write none if the end is not at a batch edge, so that what goes on from the newest exact one comes to
                the same bits; not if that gives up much training.

        Raises:
            RunFailedError: it could not be written.
        """
        deadline = time.monotonic() + SAVE_S
        self._await_writer(deadline)  # what it is at may be the newest exact one
        again = self._keeper.stays_behind(self._counters) if exact else None
        if again is None:
            self._begin_checkpoint()
        elif again:
            self._say(
                "the batch that was under way could not be ended, or its worlds be copied, in time: a resumed run goes "
                f"on from version {self._counters.policy_version - again}, the newest exact checkpoint, and does "
                f"{again} updates again, to the same bits"
            )
        self._await_writer(deadline)
        if self._keeper.writer.busy:
            raise RunFailedError(f"the last checkpoint was not written within {SAVE_S:.0f} s")
        if self._keeper.problem:
            raise RunFailedError(f"the last checkpoint could not be written: {self._keeper.problem}")

    def _await_writer(self, deadline: float) -> None:
        while self._keeper.writer.busy and time.monotonic() < deadline:
            for written in self._keeper.writer.ended(WAIT_S):
                self._end_checkpoint(written)

    def _say(self, message: str) -> None:
        """Have the launcher show something."""
        log.warning("%s", message)
        with contextlib.suppress(TimeoutError):
            self._control.send({"kind": "say", "message": message})

    def _resume(self) -> Mapping[int, KeptWorld] | None:
        """Take the newest checkpoint's state; the worlds that it holds, None if there is no checkpoint."""
        folder = self._run_folder / "checkpoints"
        exact = not self._config.batch.max_policy_lag
        loaded = checkpoint.load_newest(folder, self._spec.fingerprint, self._say, exact=exact)
        if loaded is None:
            self._say(f"nothing to resume from in {folder}, starting anew")
            return None
        try:
            self._training.set_state(loaded.tensors)
        except RuntimeError as error:
            raise UsageError(f"{loaded.path} holds other networks than the configuration describes: {error}") from None
        episodes = {n.removeprefix(EPISODES): t for n, t in loaded.tensors.items() if n.startswith(EPISODES)}
        self._window.set_columns({name: tensor.numpy() for name, tensor in episodes.items()})
        self._counters = loaded.manifest.counters
        self._lags.update(self._counters.lag_steps)
        best = read_best(self._run_folder)
        self._best = best.version if best else None
        self._keeper.take_up(loaded)
        for version in self._counters.candidates:  # the launcher, or the one before it, may not have come to them
            if policy := checkpoint.whole_policy(folder, version):
                self._candidates.append(version)
                self._control.send({"kind": "candidate", "version": version, "policy": str(policy), "again": True})
        log.info("resumed from %s: version %d", loaded.path, self._counters.policy_version)
        self._say(describe_resume(loaded, self._config))
        return loaded.worlds

    def _await_candidates(self) -> None:
        """At the end of the budget, let the launcher finish judging: the first to meet the goal still counts."""
        try:
            while self._candidates:
                self._follow_orders()
                time.sleep(WAIT_S / 10)
        except StopRequestedError as stop:
            self._stop_reason = str(stop)

    def _follow_orders(self) -> None:
        """Do what the launcher wants; raises `StopRequestedError` unless the end of the batch is waited for."""
        self._hear_orders()
        waits = self._keeper.keeps_worlds and time.monotonic() < self._stop_by
        if self._stop_reason is not None and not waits:
            raise StopRequestedError(self._stop_reason)

    def _hear_orders(self) -> float:
        """Do what the launcher wants; until when a stop waits for a batch edge."""
        while (order := self._control.receive(0)) is not None:
            self._follow(order)
        for written in self._keeper.writer.ended():
            self._end_checkpoint(written)
        if time.monotonic() - self._reported > REPORT_S:
            self._report()
        if warning := self._descriptors.look():
            self._say(warning)
        return self._stop_by

    def _follow(self, order: dict[str, Any]) -> None:
        match order.get("kind"):
            case "stop":
                self.request_stop(str(order.get("reason", "stop")))
            case "actor_died":
                self._collector.report_death(int(order["incarnation"]))
            case "pause":
                self._paused = bool(order["paused"])
            case "checkpoint":
                self._keeper.ask()
            case "relieve":
                self._collector.relieve(int(order["incarnation"]))
            case "retire":
                self._collector.retire(int(order["incarnation"]))
            case "judging":  # versions that a learner before this one named
                self._candidates = list(dict.fromkeys([*self._candidates, *order["versions"]]))
            case "evaluated":
                self._candidates = [v for v in self._candidates if v != int(order["version"])]
                self._best = order.get("best")

    def _report(self) -> None:
        self._reported = time.monotonic()
        with contextlib.suppress(TimeoutError):  # a launcher that is stopped for a while reads it later or never
            self._control.send({"kind": "report", **self._figures(self._collector.snapshot())})

    def _figures(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "incarnation": self._incarnation,
            "version": self._counters.policy_version,
            "steps": self._counters.steps,
            "seconds": time.monotonic() - self._started,
            "trained_sps": self._trained_sps(),
            "device": str(self._device),
            "threads": self._training.threads,
            "training": self._window.figures(),
            "losses": self._losses,
            "findings": [asdict(finding) for finding in self._diagnosis.findings],
            "stages_s": self._stages_s,
            "update_s": self._newest_s,
            "recent": self._recent.report(),
            "lag_steps": self._lag_steps(),
            "gpu": gpu_figures(self._device),
            **snapshot,
        }

    def _lag_steps(self) -> dict[str, int]:
        """Env steps that this learner has trained on, by policy lag."""
        return {str(lag): steps for lag, steps in sorted(self._lags.items())}

    def _trained_sps(self) -> float:
        return self._counters.steps / max(self._counters.seconds, 1e-9)


def run_learner(learner: Learner, control: ControlClient) -> int:
    """Train to the end and tell the launcher how it went; returns the exit code."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        learner.request_stop(SIGNAL)

    signal.signal(signal.SIGTERM, stop)
    try:
        reason = learner.train()
    except (ContractError, RunFailedError, FloatingPointError) as error:
        figures = learner.close()
        control.send({"kind": "failed", "message": str(error), "figures": figures})
        return 1
    control.send({"kind": "done", "reason": reason, "figures": learner.close(goodbye=reason != SIGNAL)})
    return 0
