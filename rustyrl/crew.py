"""The actors of a run: how many there are to be, what they are told through the learner, and what their deaths mean."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rustyrl.autoscale import AutoScale, Reading, parse_range
from rustyrl.black_box import BlackBox
from rustyrl.config import Config
from rustyrl.errors import RunFailedError, UsageError
from rustyrl.learner_keeper import LearnerKeeper
from rustyrl.processes import Child, available_cores, start_child
from rustyrl.progress import Progress
from rustyrl.run_folder import RunFolder
from rustyrl.supervisor import Death, Supervisor

__all__ = ["Crew", "default_actors", "idle_note"]

MAX_ACTORS = 1000
ALONE_S = 10.0  # how long a learner whose actors have all ended well may take to say why

Order = Callable[[dict[str, Any]], None]


class Crew:
    """Has the supervisor start and replace actors, and the learner send home, relieve or forget them."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        learner: LearnerKeeper,
        progress: Progress,
        order: Order,
        *,
        traced: bool = False,
        key: Path | None = None,
    ) -> None:
        """Have no actor yet.

        Args:
            config: of the run.
            folder: of the run.
            learner: of the run.
            progress: where to say things.
            order: tells the learner something, if it is there to hear it.
            traced: a profiler will look into the actors.
            key: the file that they join with, where links are encrypted.
        """
        cluster = config.cluster
        self._config = config
        self._folder = folder
        self._learner = learner
        self._progress = progress
        self._order = order
        self._traced = traced
        self._key = key
        self._link = ""
        self._dead: list[int] = []  # incarnations that the learner is to be told of
        self._alone_since: float | None = None
        self.auto: AutoScale | None = parse_range(cluster.auto) if cluster.auto else None
        self.supervisor = Supervisor(
            self._start_actor,
            folder.path / "logs" / "crashes",
            cluster.restarts,
            cluster.restart_window_s,
            lease_s=cluster.lease_s,
            start_s=cluster.start_deadline_s,
            seed=config.run.seed,
        )
        self.supervisor.wanted = default_actors() if cluster.actors < 0 else cluster.actors

    def begin(self, link: str) -> None:
        """Start the actors that are wanted, unless that was done; they join at ``link``."""
        self._link = link
        if not self.supervisor.berths:
            self.supervisor.scale(self.supervisor.wanted, Child.kill)

    def expected(self) -> int:
        """How many actors a learner that starts now is to wait for; it hears of no death before its time."""
        supervisor = self.supervisor
        self._dead.clear()
        if self._learner.child is not None:
            return sum(berth.running for berth in supervisor.berths)
        return supervisor.wanted if self._config.cluster.expect < 0 else self._config.cluster.expect

    def greet_learner(self) -> None:
        """Tell a learner that listens who died while it could not hear of it; everybody has time to come to it."""
        for incarnation in self._dead:
            self._order({"kind": "actor_died", "incarnation": incarnation})
        self.supervisor.await_hello()

    def mourn_learner(self) -> None:
        """The learner died: those that it would have sent home go at once."""
        for berth in self.supervisor.berths:
            if berth.leaving and berth.child is not None:
                berth.child.kill()

    # Scaling

    def answer_scale(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have another number of actors, or have it follow the learner's wait from now on."""
        before = self.supervisor.wanted
        try:
            if request.get("auto"):
                self.auto = parse_range(str(request["auto"]))
                wanted = min(max(before, self.auto.lowest), self.auto.highest)
            else:
                wanted = parse_count(str(request.get("actors")), before)
                self.auto = None
        except UsageError as error:
            return {"error": str(error)}
        note = self._scale(wanted, now=bool(request.get("now")))
        return {"before": before, "actors": wanted, "worlds": self._config.batch.worlds, "note": note}

    def answer_relieve(self, index: Any) -> dict[str, Any]:
        """Give the worlds of one actor to the others."""
        actors = [actor for actor in self._learner.report.get("actors", []) if actor["ready"]]
        found = next((actor for actor in actors if actor["index"] == index), None)
        if found is None:
            known = ", ".join(str(actor["index"]) for actor in actors)
            return {"error": f"there is no actor {index!r} to relieve; expected one of {known or 'none'}"}
        if found["relieved"]:
            return {"error": f"actor {index} is relieved already"}
        if all(actor["relieved"] or actor is found for actor in actors):
            return {"error": f"nobody else is there to take the worlds of actor {index}; rustyrl scale +1 starts one"}
        self._order({"kind": "relieve", "incarnation": found["incarnation"]})
        return {"index": index, "worlds": found["worlds"]}

    def scale_by_wait(self, *, running: bool) -> None:
        """Let the number of actors follow the learner's wait, if that was asked for."""
        report = self._learner.report
        if self.auto is None or not report:
            return
        if not running:
            self.auto.interrupt()
            return
        wanted = self.auto.decide(self.supervisor.wanted, Reading.of(report, self._learner.reported_at))
        if wanted is not None and wanted != self.supervisor.wanted:
            self._scale(wanted)

    def _scale(self, wanted: int, *, now: bool = False) -> str:
        """Have so many actors; what is worth knowing about that."""
        before, worlds = self.supervisor.wanted, self._config.batch.worlds
        present = {actor["incarnation"] for actor in self._learner.report.get("actors", []) if actor["ready"]}

        def retire(child: Child) -> None:
            if child.incarnation in present and not now:
                self._order({"kind": "retire", "incarnation": child.incarnation})
            else:
                child.kill()

        self.supervisor.scale(wanted, retire)
        for berth in self.supervisor.berths if now else []:
            if berth.leaving and berth.child is not None:  # one that was to finish its tickets, too
                berth.child.kill()
        note = ""
        if wanted > worlds:
            note = idle_note(wanted, worlds)
        elif not wanted:
            note = "no actor of this machine is left; training waits for actors that join by hand, or for scale N"
        self._progress.say(f"scaled from {before} to {wanted} actors{': ' + note if note else ''}")
        return note

    # Watching

    def turn(self, *, replace: bool) -> list[Death]:
        """Notice actors that ended, and have the learner know; those that did not end well.

        Args:
            replace: False while the run is being ended.
        """
        mourned = []
        for death in self.supervisor.turn(replace=replace):
            if death.child is not None:
                self._dead.append(death.child.incarnation)
                self._order({"kind": "actor_died", "incarnation": death.child.incarnation})
            if not death.expected:
                mourned.append(death)
        return mourned

    def mourn(self, death: Death) -> RunFailedError | None:
        """Say what an actor died of; the end of the run, if it keeps dying."""
        if death.loop:
            cluster = self._config.cluster
            return RunFailedError(
                f"{death.loop} died {cluster.restarts + 1} times within {cluster.restart_window_s:.0f} s; at last, "
                f"{death.cause}"
            )
        if death.restart_in_s is None:
            self._progress.say(death.cause)
            return None
        alive = sum(berth.running for berth in self.supervisor.berths)
        others = f"{alive} others go on" if alive else "training waits for it"
        see = f"; see {death.record}" if death.record else ""
        self._progress.say(f"{death.cause}\na new one starts in {death.restart_in_s:.2g} s, {others}{see}")
        return None

    def nobody_left(self) -> RunFailedError | None:
        """The end of the run, once every actor has ended for good and nobody joined by hand."""
        supervisor = self.supervisor
        if not supervisor.wanted or len(supervisor.berths) < supervisor.wanted or supervisor.any_running:
            self._alone_since = None
            return None
        ours = {child.incarnation for child in supervisor.children}
        others = [a for a in self._learner.report.get("actors", []) if a["ready"] and a["incarnation"] not in ours]
        if others or not self._learner.listening:
            return None
        self._alone_since = self._alone_since or time.monotonic()
        if time.monotonic() - self._alone_since < ALONE_S:
            return None  # those sent home ended with 0, a world broke its contract: the learner says why
        last = supervisor.children[-1]
        code, tail = last.process.returncode, last.tail()
        return RunFailedError(f"no actor is left; {last.name} ended with code {code}:\n{tail}")

    def _start_actor(self, index: int) -> Child:
        incarnation, box = secrets.randbits(62), BlackBox.create()
        arguments = ["--join", self._link, "--index", str(index), "--incarnation", str(incarnation)]
        arguments += [] if self._key is None else ["--key", str(self._key)]
        try:
            return start_child(
                f"actor {index}",
                ["rustyrl_actors", "run", *arguments],
                self._folder.path / "logs" / f"actor-{index}.log",
                actor=True,
                black_box=box,
                incarnation=incarnation,
                niceness=self._config.cluster.actor_niceness,
                traced=self._traced,
            )
        except OSError:
            if box is not None:
                box.close()
            raise


def default_actors() -> int:
    """Two actors on up to three cores, else one less than there are cores, which the learner keeps."""
    return max(2, available_cores() - 1)


def parse_count(text: str, now: int) -> int:
    """The number of actors that ``N``, ``+2`` or ``-1`` asks for; raises `UsageError`."""
    try:
        wanted = int(text) + (now if text[:1] in ("+", "-") else 0)
    except ValueError:
        raise UsageError(f"scale takes a number of actors, or a change like +2 or -1, got {text!r}") from None
    if not 0 <= wanted <= MAX_ACTORS:
        raise UsageError(f"{wanted} actors cannot be had; expected 0 to {MAX_ACTORS}")
    return wanted


def idle_note(actors: int, worlds: int) -> str:
    """What to say when there are more actors than worlds."""
    return (
        f"{actors - worlds} of {actors} actors will idle: the run has {worlds} worlds; a run with "
        f"--set batch.worlds={actors} feeds them all"
    )
