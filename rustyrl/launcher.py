"""The launcher: starts one learner and its actors, watches them, judges versions, and brings everything down.

It owns the processes and the control socket; it never touches experience or parameters.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from rustyrl.channels import ControlServer, loopback_address
from rustyrl.config import Config
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.goal import goal_conditions
from rustyrl.interrupts import Interrupts
from rustyrl.judge import Candidate, Judge
from rustyrl.processes import Child, available_cores, await_end, start_child
from rustyrl.progress import Progress, View
from rustyrl.run_folder import ClusterFile, RunFolder, read_best
from rustyrl.spec import EnvironmentSpec
from rustyrl.supervisor import Death, Supervisor

__all__ = ["Launcher", "default_actors"]

TURN_S = 0.1  # the longest wait of the loop: signals and limits are looked at so often
MAX_ACTORS = 4096
RUNNING = ("running", "paused")
ALONE_S = 10.0  # how long a learner whose actors have all ended well may take to say why
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
    ) -> None:
        self._config = config
        self._spec = spec
        self._folder = folder
        self._progress = progress
        self._resume = resume
        self._incarnation = folder.next_incarnation()
        self._judge = Judge(config, goal_conditions(config.run, spec), folder.path / "logs" / "evaluate.log")
        self._judge.best = read_best(folder.path) if resume else None
        self._started = time.monotonic()
        self._state = "starting"
        self._stop_reason: str | None = None
        self._kill_at: float | None = None
        self._failure: RunFailedError | UsageError | None = None
        self._interrupts = interrupts
        self._learner: Child | None = None
        self._learner_peer: bytes | None = None
        self._report: dict[str, Any] = {}
        self._learner_done = False
        self._supervisor = Supervisor(
            self._start_actor,
            folder.path / "logs" / "crashes",
            config.cluster.restarts,
            config.cluster.restart_window_s,
        )
        self._dead: list[int] = []  # process ids
        self._supervisor.wanted = default_actors() if config.cluster.actors < 0 else config.cluster.actors
        self._link = ""
        self._stop_asked = 0
        self._awaiting_checkpoint: list[bytes] = []  # who asked for one
        self._alone_since: float | None = None
        self._started_at = time.time()

    def run(self) -> dict[str, Any]:
        """Train until goal, budget or stop; returns the summary.

        Raises:
            UsageError: what was asked for cannot be had (a port in use, CUDA absent, ...).
            RunFailedError: the run ended badly, with the cause.
        """
        with ControlServer(self._folder.socket_address("control")) as control:
            ended = "failed"
            try:
                self._start(control)
                while not self._over():
                    self._turn(control)
                self._state = "stopping"
                self._bring_down(control)
                summary = self._finish(control)
                ended = "finished"
            finally:
                for child in self._children():
                    child.close()
                self._judge.close()
                self._write_cluster(control, ended)
        return summary

    def _children(self) -> list[Child]:
        actors = self._supervisor.children
        return actors if self._learner is None else [self._learner, *actors]

    # Starting

    def _start(self, control: ControlServer) -> None:
        config, cluster = self._config, self._config.cluster
        listen = self._folder.socket_address("link") if cluster.listen == "ipc" else loopback_address(cluster.listen)
        actors = self._supervisor.wanted
        expect = max(1, actors) if cluster.expect < 0 else cluster.expect
        if config.batch.max_policy_lag > 1:
            self._progress.say(
                f"note: --max-policy-lag {config.batch.max_policy_lag} is not corrected for (V-trace is not there yet);"
                " expect slower learning above 1"
            )
        if actors > config.batch.worlds:
            self._progress.say(
                f"note: {actors} actors for {config.batch.worlds} worlds: {actors - config.batch.worlds} will idle; "
                f"--set batch.worlds={actors} feeds them all"
            )
        self._write_cluster(control, "starting")
        self._learner = start_child(
            "learner",
            [
                "rustyrl_learner",
                "run",
                "--run",
                str(self._folder.path),
                "--control",
                control.address,
                "--listen",
                listen,
                "--incarnation",
                str(self._incarnation),
                "--expect",
                str(expect),
                *(["--resume"] if self._resume else []),
            ],
            self._folder.path / "logs" / "learner.log",
            actor=False,
        )
        if cluster.listen == "ipc":  # the address is known, so they start while the learner imports torch
            self._start_actors(listen)

    def _start_actors(self, link: str) -> None:
        self._link = link
        self._supervisor.scale(self._supervisor.wanted, lambda _: None)

    def _start_actor(self, index: int) -> Child:
        log = self._folder.path / "logs" / f"actor-{index}.log"
        arguments = ["rustyrl_actors", "run", "--join", self._link, "--index", str(index)]
        return start_child(f"actor {index}", arguments, log, actor=True)

    def _scale(self, control: ControlServer, asked: str, *, now: bool) -> dict[str, Any]:
        """Have another number of actors; the answer says how many there will be, and what else is worth knowing."""
        try:
            wanted = int(asked) + (self._supervisor.wanted if asked[:1] in ("+", "-") else 0)
        except ValueError:
            return {"error": f"scale takes a number of actors, or a change like +2 or -1, got {asked!r}"}
        if not 0 <= wanted <= MAX_ACTORS:
            return {"error": f"{wanted} actors cannot be had; expected 0 to {MAX_ACTORS}"}
        before = self._supervisor.wanted

        def retire(child: Child) -> None:
            known = any(actor["pid"] == child.pid and actor["ready"] for actor in self._report.get("actors", []))
            if known and not now:
                self._order(control, {"kind": "retire", "pid": child.pid})
            else:
                child.signal(signal.SIGKILL)  # also one that is stopped

        self._supervisor.scale(wanted, retire)
        for berth in self._supervisor.berths if now else []:
            if berth.leaving and berth.child is not None:  # one that was to finish its tickets, too
                berth.child.signal(signal.SIGKILL)
        worlds = self._config.batch.worlds
        note = ""
        if wanted > worlds:
            note = f"{wanted - worlds} of {wanted} actors will idle: the run has {worlds} worlds; a run with "
            note += f"--set batch.worlds={wanted} feeds them all"
        elif not wanted:
            note = "no actor of this machine is left; training waits for actors that join by hand, or for scale N"
        self._progress.say(f"scaled from {before} to {wanted} actors{': ' + note if note else ''}")
        return {"before": before, "actors": wanted, "worlds": worlds, "note": note}

    # Running

    def _turn(self, control: ControlServer) -> None:
        """One turn of the loop: hear, watch, judge, look at the limits, show."""
        watched = [child for child in self._children() if not child.ended_seen]
        descriptors = [child.descriptor for child in watched if child.descriptor >= 0]
        for peer, message in control.receive(TURN_S, descriptors):
            self._hear(control, peer, message)
        self._watch(control)
        self._judge_candidates(control)
        self._check_limits(control)
        self._progress.show(self._view())

    def _hear(self, control: ControlServer, peer: bytes, message: dict[str, Any]) -> None:
        match message.get("kind"):
            case "hello":
                self._learner_peer = peer
            case "listening":
                self._link = str(message["address"])
                self._state = "running"
                self._write_cluster(control, "running")
                for pid in self._dead:  # while it could not hear of it
                    self._order(control, {"kind": "actor_died", "pid": pid})
                if not self._supervisor.berths and self._stop_reason is None:
                    self._start_actors(self._link)
                if not self._supervisor.wanted:
                    self._progress.say(f"listening on {self._link}: rustyrl actor --join {self._link}")
            case "report":
                self._report = message
            case "candidate":
                self._judge.add(Candidate(message["version"], Path(message["policy"])))
            case "checkpointed":
                for asker in self._awaiting_checkpoint:
                    control.send(asker, {"version": message["version"], "checkpoint": message["path"]})
                self._awaiting_checkpoint.clear()
            case "done" | "failed":
                self._hear_last(message)
            case "checkpoint" if self._state in RUNNING:  # answered once it is written
                self._awaiting_checkpoint.append(peer)
                self._order(control, {"kind": "checkpoint"})
            case _:
                control.send(peer, self._answer(control, message))

    def _hear_last(self, message: dict[str, Any]) -> None:
        """What the learner says of how its training ended."""
        self._report = {**self._report, **message.get("figures", {})}
        if message["kind"] == "failed":
            self._fail_learner(message)
            return
        self._learner_done = True
        self._kill_at = self._kill_at or time.monotonic() + self._config.cluster.stop_s * UPDATE_SHARE
        self._stop_reason = self._stop_reason or message["reason"]

    def _answer(self, control: ControlServer, request: dict[str, Any]) -> dict[str, Any]:
        """What a verb is answered."""
        match request.get("kind"):
            case "status":
                return self._status()
            case "pause" | "unpause" | "checkpoint" | "scale" if self._state not in RUNNING:
                return {"error": f"the run is {self._state}; it takes that while it is running"}
            case "scale":
                return self._scale(control, str(request.get("actors")), now=bool(request.get("now")))
            case "pause" | "unpause" as kind:
                self._state = "paused" if kind == "pause" else "running"
                self._order(control, {"kind": "pause", "paused": kind == "pause"})
                self._write_cluster(control, self._state)
                return {"state": self._state, "run": str(self._folder.path)}
            case "stop":
                self._stop_asked += 1
                self._request_stop(control, "stop")
                return {"stopping": True, "run": str(self._folder.path)}
            case other:
                return {"error": f"unknown request {other!r}"}

    def _watch(self, control: ControlServer) -> None:
        """Notice children that ended by themselves."""
        going_on = self._failure is None and self._stop_reason is None and not self._learner_done
        for death in self._supervisor.turn(replace=going_on):
            self._dead.append(death.pid)
            self._order(control, {"kind": "actor_died", "pid": death.pid})
            if death.code and not death.expected and self._stop_reason is None:
                self._mourn(death)
        learner = self._learner
        if learner is not None and not learner.running and not learner.ended_seen:
            for peer, message in list(control.receive(0, [])):  # what it said last
                self._hear(control, peer, message)
            learner.ended_seen = True
            if not self._learner_done and self._failure is None and self._stop_reason is None:
                code, tail = learner.process.returncode, learner.tail()
                self._failure = RunFailedError(
                    f"the learner ended with code {code}{self._last_good()}\n{tail}".rstrip()
                )
        if self._failure is None and self._stop_reason is None and not self._learner_done:
            self._check_actors_left()

    def _mourn(self, death: Death) -> None:
        """Say what an actor died of, and end the run if it keeps dying."""
        cause = f"actor {death.index} (process {death.pid}) ended with code {death.code}:\n{death.tail}"
        if death.loop:
            config = self._config.cluster
            self._failure = RunFailedError(
                f"actor {death.index} died {config.restarts + 1} times within {config.restart_window_s:.0f} s; at "
                f"last, {cause}"
            )
        elif death.restart_in_s is not None:
            self._progress.say(f"{cause}\na new one starts in {death.restart_in_s:.2g} s; see {death.record}")
        else:
            self._progress.say(cause)

    def _check_actors_left(self) -> None:
        """Fail when every actor has ended for good, and nobody joined by hand."""
        supervisor = self._supervisor
        if not supervisor.wanted or len(supervisor.berths) < supervisor.wanted or supervisor.any_running:
            self._alone_since = None
            return
        ours = {child.pid for child in supervisor.children}
        if any(actor["ready"] and actor["pid"] not in ours for actor in self._report.get("actors", [])):
            return
        self._alone_since = self._alone_since or time.monotonic()
        if time.monotonic() - self._alone_since < ALONE_S:
            return  # those sent home ended with 0, a world that broke its contract was reported: the learner says why
        last = supervisor.children[-1]
        code, tail = last.process.returncode, last.tail()
        self._failure = RunFailedError(f"no actor is left; {last.name} ended with code {code}:\n{tail}")

    def _fail_learner(self, message: dict[str, Any]) -> None:
        text = str(message["message"])
        if message.get("exit_code") == UsageError.exit_code:
            self._failure = UsageError(text)
        elif message.get("crashed") and self._learner is not None:
            self._failure = RunFailedError(f"the learner crashed{self._last_good()}\n{self._learner.tail()}")
        else:
            self._failure = RunFailedError(f"{text}{self._last_good()}")

    def _last_good(self) -> str:
        newest = self._folder.newest_policy()
        return f"; the last good checkpoint is {newest.parent}" if newest else "; there is no checkpoint yet"

    def _check_limits(self, control: ControlServer) -> None:
        if self._interrupts.count and self._stop_reason is None:
            self._request_stop(control, self._interrupts.reason)
        limit_s = self._config.run.max_seconds
        if limit_s and time.monotonic() - self._started >= limit_s and self._stop_reason is None:
            self._request_stop(control, "max_seconds")

    def _request_stop(self, control: ControlServer, reason: str) -> None:
        self._stop_reason = self._stop_reason or reason
        self._state = "stopping"
        self._kill_at = self._kill_at or time.monotonic() + self._config.cluster.stop_s * UPDATE_SHARE
        self._order(control, {"kind": "stop", "reason": reason})
        if self._learner is not None and self._learner_peer is None:
            self._learner.signal(signal.SIGKILL)  # it is still importing and has nothing to save

    def _order(self, control: ControlServer, order: dict[str, Any]) -> None:
        if self._learner_peer is not None:
            control.send(self._learner_peer, order)

    def _over(self) -> bool:
        if self._failure is not None or self._interrupts.count > 1:
            return True
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            return True
        learner_gone = self._learner is not None and not self._learner.running
        return learner_gone and (self._learner_done or self._stop_reason is not None)

    def _bring_down(self, control: ControlServer) -> None:
        """End what still runs: by goodbye, then by SIGTERM, then by SIGKILL, within the grace."""
        children = self._children()
        if self._interrupts.count > 1:
            return  # at once: closing kills
        if self._failure is None:
            await_end(children, time.monotonic() + self._config.cluster.stop_s * GOODBYE_SHARE)
        for child in (left := await_end(children, time.monotonic())):
            child.signal(signal.SIGTERM)
        left = await_end(left, time.monotonic() + self._config.cluster.stop_s * TERMINATE_SHARE)
        if self._learner in left and self._failure is None:
            self._progress.say("the learner did not end its update in time and is killed; the newest checkpoint stands")
        for peer, message in list(control.receive(0, [])):
            self._hear(control, peer, message)

    def _judge_candidates(self, control: ControlServer) -> None:
        """Let the judge go on; the first version to meet the goal is kept and ends the run."""
        if self._stop_reason is not None:
            return
        try:
            ended = self._judge.turn()
        except RunFailedError as error:
            self._failure = self._failure or error
            return
        if ended is None:
            return
        order: dict[str, Any] = {"kind": "evaluated", "version": ended.version}
        if self._judge.best is not None:
            self._folder.write_best(self._judge.best)
            order["best"] = self._judge.best.version
        self._order(control, order)
        if self._judge.confirmed is ended:
            self._folder.install_policy(ended.policy)
            self._request_stop(control, "goal")

    # Ending

    def _finish(self, control: ControlServer) -> dict[str, Any]:
        """Install the policy that is kept, evaluate it, write the summary."""
        confirmed, newest = self._judge.confirmed, self._folder.newest_policy()
        version = confirmed.version if confirmed else 0
        if confirmed is None and newest is not None:
            self._folder.install_policy(newest)
            version = int(newest.parent.name)
        if self._failure is not None:
            raise self._failure
        reason = self._stop_reason or self._interrupts.reason or "stop"
        evaluation = None
        if reason not in ("stop", "interrupt", "terminate"):
            evaluation = self._final_evaluation(control)
            if self._interrupts.count:
                reason = self._interrupts.reason
        summary = {
            "env": self._spec.env,
            "run": str(self._folder.path),
            "steps": self._report.get("steps", 0),
            "seconds": round(time.monotonic() - self._started, 3),
            "trained_sps": round(self._report.get("trained_sps", 0.0), 1),
            "policy_version": version,
            "stopped_by": reason,
            "bottleneck": bottleneck(self._report.get("stages_s", {})),
            "eval": evaluation,
            "tickets": self._report.get("tickets", {}),
        }
        self._folder.write_summary(summary)
        return summary

    def _final_evaluation(self, control: ControlServer) -> dict[str, Any] | None:
        """Judge the policy that is kept, on seeds that nothing was chosen by."""
        policy = self._folder.path / "policy.safetensors"
        if not policy.exists():
            return None
        self._progress.say(f"evaluating the final policy over {self._config.run.eval_episodes} episodes")
        self._state = "evaluating"
        self._write_cluster(control, self._state)
        seen, stopped = self._interrupts.count, self._stop_asked

        def meanwhile() -> bool:
            for peer, message in control.receive(TURN_S, []):
                self._hear(control, peer, message)
            self._progress.show(self._view())
            return self._interrupts.count > seen or self._stop_asked > stopped

        return self._judge.final(policy, meanwhile)

    # Describing

    def _status(self) -> dict[str, Any]:
        berths = {berth.child.pid: berth for berth in self._supervisor.berths if berth.child is not None}
        learner = {k: v for k, v in self._report.items() if k not in ("kind", "actors", "tickets")}
        return {
            "run": str(self._folder.path),
            "env": self._spec.env,
            "state": self._state,
            "seconds": round(time.monotonic() - self._started, 3),
            "learner": learner,
            "actors": [
                {
                    **actor,
                    "started": actor["pid"] in berths,
                    "leaving": actor["pid"] in berths and berths[actor["pid"]].leaving,
                    "restarts": berths[actor["pid"]].restarts if actor["pid"] in berths else 0,
                }
                for actor in self._report.get("actors", [])
            ],
            "actors_started": len(self._supervisor.berths),
            "actors_alive": sum(berth.running for berth in self._supervisor.berths),
            "actors_wanted": self._supervisor.wanted,
            "tickets": self._report.get("tickets", {}),
            "eval": self._judge.evaluation,
            "goal": [str(condition) for condition in self._judge.goal],
        }

    def _view(self) -> View:
        ready = sum(1 for actor in self._report.get("actors", []) if actor["ready"])
        return View(
            env=self._spec.env,
            state=self._state,
            run=str(self._folder.path),
            seconds=time.monotonic() - self._started,
            left=self._left(),
            learner=self._report,
            actors_alive=ready,
            actors_started=max(ready, self._supervisor.wanted),
            evaluation=self._judge.evaluation,
        )

    def _left(self) -> str:
        run, estimates = self._config.run, []
        if run.max_seconds:
            estimates.append(run.max_seconds - (time.monotonic() - self._started))
        if run.total_steps and (sps := self._report.get("trained_sps")):
            estimates.append((run.total_steps - self._report.get("steps", 0)) / sps)
        if estimates:
            return f"{max(0.0, min(estimates)):.0f} s"
        if run.total_steps:
            return f"{run.total_steps - self._report.get('steps', 0):,} steps"
        return "until " + (" and ".join(str(condition) for condition in self._judge.goal) or "stopped")

    def _write_cluster(self, control: ControlServer, state: str) -> None:
        self._folder.write_cluster(
            ClusterFile(
                env=self._spec.env,
                state=state,
                pid=os.getpid(),
                control=control.address,
                link=self._link,
                incarnation=self._incarnation,
                started=self._started_at,
            )
        )


def default_actors() -> int:
    """Two actors on up to three cores, else one less than there are cores, which the learner keeps."""
    return max(2, available_cores() - 1)


def bottleneck(stages_s: dict[str, float]) -> str:
    """Which side the other waits for, by the learner's own clock."""
    total = sum(stages_s.values())
    if not total:
        return "unknown"
    waiting = stages_s.get("wait", 0.0) / total
    side = "actors" if waiting > 0.5 else "learner"
    return f"{side} (the learner waits for experience {waiting:.0%} of the time)"
