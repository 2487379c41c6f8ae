"""The launcher: starts one learner and its actors, watches them, judges versions, and brings everything down.

It owns the processes and the control socket; it never touches experience or parameters.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rustyrl.addresses import listen_address, local_address, named_address, security_of
from rustyrl.config import Config
from rustyrl.control import ControlServer
from rustyrl.crew import Crew, idle_note
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.goal import goal_conditions
from rustyrl.interrupts import Interrupts
from rustyrl.judge import Candidate, Judge
from rustyrl.keys import FIRST, LAUNCHED, KeyRing
from rustyrl.learner_keeper import LearnerDeath, LearnerKeeper
from rustyrl.logs import LogKeeper
from rustyrl.processes import Child, await_end, start_child
from rustyrl.profiler import Profiler
from rustyrl.progress import Progress
from rustyrl.resume import seconds_before
from rustyrl.run_folder import ClusterFile, RunFolder, read_best
from rustyrl.spare import Spare
from rustyrl.spec import EnvironmentSpec
from rustyrl.status import StatusBoard
from rustyrl.summary import summarize

if TYPE_CHECKING:
    from rustyrl.exporter import Exporter

__all__ = ["Launcher"]

TURN_S = 0.1  # the longest wait of the loop: signals and limits are looked at so often
RUNNING = ("running", "paused")
# How the grace of a stop, cluster.stop_s, is shared out; the rest is for killing.
UPDATE_SHARE, GOODBYE_SHARE, TERMINATE_SHARE = 0.7, 0.1, 0.1


class Launcher:
    """One run from start to end."""

    def __init__(
        self,
        config: Config,
        spec: EnvironmentSpec,
        folder: RunFolder,
        progress: Progress,
        interrupts: Interrupts,
        *,
        resume: bool,
        profile: bool = False,
        spare: Spare | None = None,
    ) -> None:
        self._config = config
        self._spare = spare
        self._spec = spec
        self._folder = folder
        self._progress = progress
        self._interrupts = interrupts
        self._resume = resume
        crashes, cluster = folder.path / "logs" / "crashes", config.cluster
        limit, window_s = cluster.restarts, cluster.restart_window_s
        self._learner = LearnerKeeper(
            self._start_learner, self._newest_checkpoint, crashes, limit, window_s, folder.next_incarnation()
        )
        listen = cluster.listen
        self._listen = folder.socket_address("link") if listen == "ipc" else listen_address(listen)
        self._security = security_of(self._listen, insecure=cluster.insecure)
        self._keys = KeyRing.make(folder.path / "keys") if self._security == "curve" else None
        own_key = None if self._keys is None else self._keys.path(LAUNCHED)
        self._crew = Crew(config, folder, self._learner, progress, self._order, traced=profile, key=own_key)
        self._judge = Judge(config, goal_conditions(config.run, spec), folder.path / "logs" / "evaluate.log")
        self._judge.best = read_best(folder.path) if resume else None
        before_s = seconds_before(folder.path) if resume else 0.0
        self._board = StatusBoard(
            folder.path, config, spec, self._learner, self._crew.supervisor, self._judge, before_s
        )
        self._board.link["security"] = self._security
        self._profiler = Profiler(folder.path / "profile", progress.say) if profile else None
        self._logs = LogKeeper(folder.path / "logs")
        self._state = "starting"
        self._paused = False
        self._stop_reason: str | None = None
        self._stop_asked = 0
        self._kill_at: float | None = None
        self._failure: RunFailedError | UsageError | None = None
        self._control: ControlServer
        self._link = ""  # where actors of this machine join
        self._awaiting_checkpoint: list[bytes] = []  # who asked for one
        self._exporter: Exporter | None = None
        self._started_at = time.time()

    def run(self) -> dict[str, Any]:
        """Train until goal, budget or stop; returns the summary.

        Raises:
            UsageError: what was asked for cannot be had (a port in use, CUDA absent, ...).
            RunFailedError: the run ended badly, with the cause.
        """
        control = ControlServer(self._folder.socket_address("control"))
        with control as self._control, self._open_exporter() as self._exporter:
            ended = "failed"
            try:
                self._start()
                while not self._over():
                    self._turn()
                self._enter("stopping")
                self._bring_down()
                summary = self._finish()
                ended = "finished"
            finally:
                for child in self._children():
                    child.close()
                if self._profiler is not None:
                    self._profiler.close()
                self._judge.close()
                self._enter(ended)
        return summary

    def _open_exporter(self) -> contextlib.AbstractContextManager[Exporter | None]:
        """The Prometheus endpoint, if one is wanted."""
        address = self._config.cluster.prometheus
        if not address:
            return contextlib.nullcontext()
        from rustyrl.exporter import Exporter  # needs a package that few runs need

        exporter = Exporter(address)
        self._board.prometheus = exporter.url
        self._progress.say(f"metrics for Prometheus are at {exporter.url}")
        return exporter

    def _children(self) -> list[Child]:
        actors, learner = self._crew.supervisor.children, self._learner.child
        return actors if learner is None else [learner, *actors]

    # Starting

    def _start(self) -> None:
        config, actors = self._config, self._crew.supervisor.wanted
        if config.batch.max_policy_lag > 1 and config.ppo.vtrace == "off":
            self._progress.say(
                f"note: --max-policy-lag {config.batch.max_policy_lag} is not corrected for (ppo.vtrace is off)"
            )
        if actors > config.batch.worlds:
            self._progress.say(f"note: {idle_note(actors, config.batch.worlds)}")
        self._enter("starting")
        self._learner.start()
        if self._security == "ipc":  # the address is known, so they start while the learner imports torch
            self._link = self._listen
            self._crew.begin(self._link)

    def _start_learner(self, incarnation: int) -> Child:
        """Start a learner: the first, or one that follows another on the same address."""
        first = self._learner.child is None
        return start_child(
            "learner",
            [
                "rustyrl_learner",
                "run",
                "--run",
                str(self._folder.path),
                "--control",
                self._control.address,
                "--listen",
                self._listen,
                "--incarnation",
                str(incarnation),
                "--expect",
                str(max(1, self._crew.expected())),
                *(["--resume"] if self._resume or not first else []),
                *(["--profile", str(self._folder.path / "profile")] if self._profiler else []),
            ],
            self._folder.path / "logs" / "learner.log",
            actor=False,
            traced=self._profiler is not None,
            spare=self._spare if first else None,
        )

    def _newest_checkpoint(self) -> str:
        newest = self._folder.newest_policy()
        return str(newest.parent) if newest else ""

    # Running

    def _turn(self) -> None:
        """One turn of the loop: hear, watch, judge, scale, look at the limits, show."""
        watched = [child for child in self._children() if not child.ended_seen]
        descriptors = [child.descriptor for child in watched if child.descriptor >= 0]
        for peer, message in self._control.receive(TURN_S, descriptors + self._judge.descriptors):
            self._hear(peer, message)
        self._watch_actors()
        self._watch_learner()
        self._judge_candidates()
        self._crew.scale_by_wait(running=self._state == "running")
        self._check_limits()
        self._logs.turn()
        if self._profiler is not None:
            self._profiler.turn(self._children())
        self._show()

    def _show(self) -> None:
        """Have how things stand where people and Prometheus look."""
        self._progress.show(self._board.view(self._state))
        if self._exporter is not None:
            self._exporter.offer(self._status)

    def _status(self) -> dict[str, Any]:
        auto = self._crew.auto
        bounds = None if auto is None else {"lowest": auto.lowest, "highest": auto.highest}
        return self._board.status(self._state, bounds)

    def _hear(self, peer: bytes, message: dict[str, Any]) -> None:
        """Take in what the learner says, or answer a verb. Only the learner's own process is believed to be it."""
        learner, kind = self._learner, message.get("kind")
        if kind == "hello" and learner.child is not None and message.get("pid") == learner.child.pid:
            learner.peer = peer
            self._order({"kind": "judging", "versions": self._judge.pending})
            self._order({"kind": "pause", "paused": self._paused})
        elif peer == learner.peer:
            self._hear_learner(message)
        elif kind == "checkpoint" and self._state in RUNNING:  # answered once it is written
            self._awaiting_checkpoint.append(peer)
            self._order({"kind": "checkpoint"})
        else:
            self._control.send(peer, self._answer(message))

    def _hear_learner(self, message: dict[str, Any]) -> None:
        """Take in what the learner says."""
        match message.get("kind"):
            case "listening":
                self._begin(str(message["address"]))
            case "report":
                self._learner.take_report(message)
                self._board.take_report(message)
                present = {actor["incarnation"] for actor in message["actors"]}
                self._crew.supervisor.hear(present, set(message["silent"]))
            case "candidate":
                self._take_candidate(message)
            case "say":
                self._progress.say(str(message["message"]))
            case "checkpointed":
                answer: dict[str, Any] = {"version": message["version"], "checkpoint": message["path"]}
                if message["problem"]:
                    answer = failure(f"the checkpoint could not be written: {message['problem']}")
                self._answer_askers(answer)
            case "done" | "failed":
                self._hear_last(message)

    def _begin(self, bound: str) -> None:
        """The learner listens: tell it what it missed, and start the actors if they wait for the address."""
        first, self._listen, self._link = not self._link, bound, local_address(bound)
        self._board.link["address"] = self._link
        self._learner.listening = self._learner.listened = True
        self._crew.greet_learner()
        if self._stop_reason is not None:
            return
        self._enter("paused" if self._paused else "running")
        self._crew.begin(self._link)
        if first or not self._crew.supervisor.wanted:
            self._say_how_to_join()

    def _say_how_to_join(self) -> None:
        """Say what to type on another machine, or in another terminal; no secret is in it."""
        join = f"rustyrl actor --join {named_address(self._listen)}"
        if self._keys is not None:
            key = self._keys.path(FIRST)
            have = (
                f"scp {socket.gethostname()}:{key} ." if key.exists() else "rustyrl keys new NAME makes a key; copy it"
            )
            self._progress.say(f"listening on {self._listen}; on another machine: {have} && {join} --key {key.name}")
        elif self._security == "insecure":
            self._progress.say(
                f"WARNING: --insecure: {self._listen} is neither encrypted nor asks who joins; whoever reaches it can "
                f"read the policy, feed the training and stop the run. On another machine: {join} --insecure"
            )
        elif not self._crew.supervisor.wanted:
            self._progress.say(f"listening on {self._listen}: {join}")

    def _hear_last(self, message: dict[str, Any]) -> None:
        """What the learner says of how its training ended."""
        if figures := message.get("figures"):
            self._learner.take_report({**self._learner.report, **figures})
        if message["kind"] == "failed":
            self._learner.said = str(message["message"])
            if not message.get("crashed"):  # else it is seen to end, and another may follow
                usage = message.get("exit_code") == UsageError.exit_code
                kind = UsageError if usage else RunFailedError
                trained = "figures" in message  # else it came to nothing, as for want of a checkpoint that is whole
                self._failure = kind(str(message["message"]) + (self._last_good() if trained else ""))
            return
        self._learner.ended = message["reason"]
        if self._learner.done:
            self._kill_at = self._kill_at or time.monotonic() + self._config.cluster.stop_s * UPDATE_SHARE
            self._stop_reason = self._stop_reason or message["reason"]

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a verb is answered."""
        match request.get("kind"):
            case "status":
                return self._status()
            case "pause" | "unpause" | "checkpoint" | "scale" | "relieve" if self._state not in RUNNING:
                return {"error": f"the run is {self._state}; it takes that while it is running"}
            case "scale":
                return self._crew.answer_scale(request)
            case "relieve":
                return self._crew.answer_relieve(request.get("index"))
            case "pause" | "unpause" as kind:
                self._paused = kind == "pause"
                self._order({"kind": "pause", "paused": self._paused})
                self._enter("paused" if self._paused else "running")
                return {"state": self._state, "run": str(self._folder.path)}
            case "stop":
                self._stop_asked += 1
                self._request_stop("stop")
                return {"stopping": True, "run": str(self._folder.path)}
            case other:
                return {"error": f"unknown request {other!r}"}

    def _answer_askers(self, answer: dict[str, Any]) -> None:
        """Tell who asked for a checkpoint how that went."""
        for asker in self._awaiting_checkpoint:
            self._control.send(asker, answer)
        self._awaiting_checkpoint.clear()

    # Watching

    @property
    def _going_on(self) -> bool:
        """Whether what dies is to be replaced."""
        return self._failure is None and self._stop_reason is None and not self._learner.done

    def _watch_actors(self) -> None:
        """Notice actors that ended by themselves."""
        for death in self._crew.turn(replace=self._going_on):
            if self._stop_reason is None:
                self._board.take_death(death)
                self._failure = self._crew.mourn(death) or self._failure
        if self._going_on:
            self._failure = self._crew.nobody_left()

    def _watch_learner(self) -> None:
        """Notice a learner that ended before its time, and go on with its successor."""
        if self._learner.child is not None and not self._learner.running and not self._learner.child.ended_seen:
            for peer, message in list(self._control.receive(0, [])):  # what it said last
                self._hear(peer, message)
        incarnation = self._learner.incarnation
        death = self._learner.turn(replace=self._going_on)
        if death is not None:
            self._mourn_learner(death)
        elif self._learner.incarnation != incarnation:
            self._enter("recovering")

    def _mourn_learner(self, death: LearnerDeath) -> None:
        self._board.take_crash(death.cause, death.record)
        self._answer_askers(failure("the learner died before the checkpoint was written"))
        self._crew.mourn_learner()
        if death.restart_in_s is None or not self._learner.listened:
            self._failure = RunFailedError(f"{death.loop}{'; at last, ' if death.loop else ''}{death.cause}")
            return
        self._enter("recovering")
        checkpoint = self._newest_checkpoint()
        start = f"from {checkpoint}" if checkpoint else "anew: there is no checkpoint yet"
        self._progress.say(f"{death.cause}\nanother learner starts in {death.restart_in_s:.2g} s, {start}")

    def _last_good(self) -> str:
        newest = self._newest_checkpoint()
        return f"; the last good checkpoint is {newest}" if newest else "; there is no checkpoint yet"

    def _check_limits(self) -> None:
        if self._interrupts.count and self._stop_reason is None:
            self._request_stop(self._interrupts.reason)
        limit_s = self._config.run.max_seconds
        if limit_s and self._board.seconds >= limit_s and self._stop_reason is None:
            self._request_stop("max_seconds")

    def _request_stop(self, reason: str) -> None:
        self._stop_reason = self._stop_reason or reason
        self._enter("stopping")
        self._kill_at = self._kill_at or time.monotonic() + self._config.cluster.stop_s * UPDATE_SHARE
        self._order({"kind": "stop", "reason": reason})
        if self._learner.child is not None and self._learner.peer is None:
            self._learner.child.kill()  # it is still importing and has nothing to save

    def _order(self, order: dict[str, Any]) -> None:
        if self._learner.peer is not None:
            self._control.send(self._learner.peer, order)

    def _enter(self, state: str) -> None:
        """Be in another state, and have others know it."""
        self._state = state
        try:
            self._folder.write_cluster(
                ClusterFile(
                    env=self._spec.env,
                    state=state,
                    pid=os.getpid(),
                    control=self._control.address,
                    link=self._link,
                    incarnation=self._learner.incarnation,
                    started=self._started_at,
                )
            )
        except OSError as error:
            self._progress.say(f"cluster.json cannot be written: {error}")

    def _over(self) -> bool:
        if self._failure is not None or self._interrupts.count > 1:
            return True
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            return True
        return not self._learner.running and (self._learner.done or self._stop_reason is not None)

    def _judge_candidates(self) -> None:
        """Let the judge go on; the first version to meet the goal is kept and ends the run."""
        if self._stop_reason is not None:
            return
        if self._learner.report.get("version", 0):  # before that its start would be in the way of the others'
            self._judge.prepare()
        try:
            ended = self._judge.turn()
            if ended is not None:
                self._keep_verdict(ended)
        except RunFailedError as error:
            self._failure = self._failure or error
        except OSError as error:
            self._failure = self._failure or RunFailedError(f"an evaluation came to nothing: {error}")

    def _take_candidate(self, message: dict[str, Any]) -> None:
        """Have a version judged; one that a learner found in its checkpoint only if nobody here knows of it."""
        version = int(message["version"])
        if message.get("again") and version in self._judge.judged:
            self._order({"kind": "evaluated", "version": version, "best": self._best_version()})
        elif not (message.get("again") and version in self._judge.pending):
            self._judge.add(Candidate(version, Path(message["policy"])))

    def _best_version(self) -> int | None:
        return None if self._judge.best is None else self._judge.best.version

    def _keep_verdict(self, ended: Candidate) -> None:
        """Tell the learner of an evaluation that has ended, and keep what it found."""
        if self._judge.best is not None:
            self._folder.write_best(self._judge.best)
        self._order({"kind": "evaluated", "version": ended.version, "best": self._best_version()})
        if self._judge.confirmed is ended:
            kept = self._folder.install_policy(ended.policy)
            self._judge.begin_final(kept)
            self._request_stop("goal")

    # Ending

    def _bring_down(self) -> None:
        """End what still runs: by goodbye, then by SIGTERM, then by SIGKILL, within the grace."""
        children = self._children()
        if self._interrupts.count > 1:
            return  # at once: closing kills
        if self._failure is None:
            await_end(children, time.monotonic() + self._config.cluster.stop_s * GOODBYE_SHARE)
        for child in (left := await_end(children, time.monotonic())):
            child.signal(signal.SIGTERM)
        left = await_end(left, time.monotonic() + self._config.cluster.stop_s * TERMINATE_SHARE)
        if self._learner.child in left and self._failure is None:
            self._progress.say("the learner did not end its update in time and is killed; the newest checkpoint stands")
        for peer, message in list(self._control.receive(0, [])):
            self._hear(peer, message)
        self._answer_askers(failure("the run ended before the checkpoint was written"))

    def _finish(self) -> dict[str, Any]:
        """Install the policy that is kept, evaluate it, write the summary."""
        confirmed, newest = self._judge.confirmed, self._folder.newest_policy()
        version = confirmed.version if confirmed else 0
        try:
            if confirmed is None and newest is not None:
                self._folder.install_policy(newest)
                version = int(newest.parent.name)
            if self._failure is not None:
                raise self._failure
            reason = self._stop_reason or self._interrupts.reason or "stop"
            evaluation = None
            if reason not in ("stop", "interrupt", "terminate"):
                evaluation = self._final_evaluation()
                if self._interrupts.count:
                    reason = self._interrupts.reason
            summary = summarize(
                self._spec.env,
                str(self._folder.path),
                self._board.seconds,
                version,
                reason,
                evaluation,
                self._learner,
                self._board.actor_restarts,
                self._config,
            )
            self._folder.write_summary(summary)
        except OSError as error:
            raise self._failure or RunFailedError(f"the run's results could not be written: {error}") from None
        return summary

    def _final_evaluation(self) -> dict[str, Any] | None:
        """Judge the policy that is kept, on seeds that nothing was chosen by."""
        policy = self._folder.path / "policy.safetensors"
        if not policy.exists():
            return None
        self._progress.say(f"evaluating the final policy over {self._config.run.eval_episodes} episodes")
        self._enter("evaluating")
        seen, stopped = self._interrupts.count, self._stop_asked

        def meanwhile() -> bool:
            for peer, message in self._control.receive(TURN_S, self._judge.descriptors):
                self._hear(peer, message)
            self._show()
            return self._interrupts.count > seen or self._stop_asked > stopped

        return self._judge.final(policy, meanwhile)


def failure(what: str) -> dict[str, Any]:
    """Tell a verb that what it asked for was tried and failed, which is not bad use."""
    return {"error": what, "failed": True}
