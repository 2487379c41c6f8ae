"""Who is at the learner's end of the link: welcomed, heard of, probed, given up, sent home."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from rustyrl.channels import RolloutReceiver
from rustyrl.config import Config
from rustyrl.rollout import Ticket
from rustyrl.spec import EnvironmentSpec, spaces_text
from rustyrl.wire import Goodbye, Hello, Lease, Refusal, Welcome
from rustyrl_learner.tickets import TicketBook

__all__ = ["Actor", "Roster"]

log = logging.getLogger(__name__)

STANDSTILL_S = 1.0  # the receive thread turns at least twice as often, unless its process is stopped
PROBE_S = 1.0  # how often an actor hears that the learner lives, and the learner whether it can be reached
FIRST_BY_HAND = 1000  # actors that ask for no index get one from here on: those below are the launcher's
MAX_ACTORS = 4096  # more than there are tickets for
GOODBYE_S = 1.0  # for actors to finish their unroll and hear that the run is over


@dataclass(slots=True)
class Actor:
    """One peer that said hello.

    seen, probed: when it was heard last, and when it was sent something to see whether it can be reached
    held_version: of the policy that it was sent last
    begun: env steps that it had begun by its last lease
    asked: tickets that it owes an answer to, and since when
    key: the public half of the key that it came with; "" where links are not encrypted
    """

    hello: Hello
    index: int
    seen: float
    probed: float
    ready: bool = False
    held_version: int = -1
    begun: int = 0
    steps: int = 0
    rollouts: int = 0
    since: float = field(default_factory=time.monotonic)
    asked: dict[Ticket, float] = field(default_factory=dict)
    key: str = ""


class Roster:
    """The actors by their peer names. Belongs to the receive thread, as the book does."""

    def __init__(
        self, receiver: RolloutReceiver, spec: EnvironmentSpec, config: Config, incarnation: int, book: TicketBook
    ) -> None:
        self._receiver = receiver
        self._spec = spec
        self._config = config
        self._incarnation = incarnation
        self._book = book
        self._dead: set[int] = set()  # incarnations, as in the next
        self._silent: set[int] = set()
        self._refused: dict[str, int] = {}
        self._turned = time.monotonic()
        self.actors: dict[bytes, Actor] = {}

    def welcome(self, peer: bytes, hello: Hello, key: str = "") -> None:
        """Give an actor its index and tell it what to build; nothing if it is dead, or its index is taken.

        One that is known and says hello again has lost its connection and made another: what it was asked for, or only
        the welcome, may never have come to it.
        """
        if peer in self.actors:
            self.count("second-hello")
            if self.actors[peer].ready:
                self.lose(peer, "its connection broke, and it comes anew")
            else:
                del self.actors[peer]
        if len(self.actors) >= MAX_ACTORS:
            self.count("full")
            self._receiver.send(peer, Refusal(f"the learner has {MAX_ACTORS} actors, and takes no more"))
            return
        if hello.incarnation in self._dead:
            return  # what a process had sent before it ended
        taken = {actor.index for actor in self.actors.values()}
        index = hello.index
        if index < 0:
            index = next(i for i in range(FIRST_BY_HAND, FIRST_BY_HAND + len(taken) + 1) if i not in taken)
        elif index in taken:
            self.count("index-taken")  # by one that died, as is about to be told: this one asks again
            return
        now = time.monotonic()
        self._silent.discard(hello.incarnation)
        self.actors[peer] = Actor(hello, index, seen=now, probed=now, key=key)
        config = self._config
        self._receiver.send(
            peer,
            Welcome(
                index=index,
                learner_incarnation=self._incarnation,
                env=config.run.env,
                env_config=config.env,
                seed=config.run.seed,
                unroll_length=config.batch.unroll_length,
                stagger=config.actor.stagger,
                poison=config.actor.poison,
            ),
        )

    def admit(self, peer: bytes, actor: Actor, fingerprint: str) -> None:
        """Count an actor in for tickets, if its environment is this run's."""
        if fingerprint != self._spec.fingerprint:
            self._receiver.send(
                peer,
                Refusal(
                    f"this run's environment {self._spec.env!r} has fingerprint {self._spec.fingerprint}, the actor's "
                    f"has {fingerprint}: install the same code and set the same parameters on both sides. The run has "
                    f"{spaces_text(self._spec.observation, self._spec.action)[:2000]}"
                ),
            )
            self.lose(peer, "it has another environment")
            return
        if not actor.ready:
            actor.ready = True
            self._book.join(peer, actor.index)
            log.info("actor %d joined (pid %d on %s)", actor.index, actor.hello.pid, actor.hello.host)

    def renew(self, peer: bytes, actor: Actor, steps: int) -> None:
        """Take in a lease, with the env steps that the actor has begun.

        One that owes an answer and begins no step has lost its ticket on the way, or is stuck: it is not to live for
        ever.
        """
        if steps > actor.begun or not self._book.owing(peer):
            actor.seen, actor.begun = time.monotonic(), steps

    def peers_of(self, incarnation: int) -> list[bytes]:
        """The peers that are this process."""
        return [peer for peer, actor in self.actors.items() if actor.hello.incarnation == incarnation]

    def bury(self, incarnation: int) -> bool:
        """Take it that a process has ended, whether it had said hello or not; False if that was known."""
        if incarnation in self._dead:
            return False
        self._dead.add(incarnation)
        for peer in self.peers_of(incarnation):
            self.lose(peer, "its process ended")
        return True

    def lose(self, peer: bytes, why: str) -> None:
        """Count an actor out; its tickets are lost."""
        actor = self.actors.pop(peer, None)
        if actor is None:
            return
        log.warning("actor %d is gone: %s", actor.index, why)
        self._book.leave(peer)

    def cut_off(self, peer: bytes, key: str, why: str) -> None:
        """Tell a peer why, count it out if it was in, and read no more of what it sends."""
        self._receiver.send(peer, Refusal(why))
        self.lose(peer, why)
        self._receiver.cut(peer, key)

    def check_keys(self) -> None:
        """Cut off whose keys were revoked."""
        gate = self._receiver.gate
        if gate is None:
            return
        for peer in [peer for peer, actor in self.actors.items() if gate.name(actor.key) is None]:
            self.revoke(peer, "")

    def revoke(self, peer: bytes, why: str) -> None:
        """Cut off whose key is let in no more; ``why`` is for one that never said hello."""
        actor = self.actors.get(peer)
        self.count("key")
        self.cut_off(peer, "", why if actor is None else f"the key of actor {actor.index} was revoked")

    def expire(self) -> None:
        """Give up who gave no sign of life for the time of a lease."""
        now, before = time.monotonic(), self._turned
        self._turned = now
        if now - before > STANDSTILL_S:  # this process stood still, and what they said meanwhile is still to be read
            for actor in self.actors.values():
                actor.seen = min(now, actor.seen + now - before)  # who was heard just now already stands at now
        lease_s = self._config.cluster.lease_s
        start_s = max(lease_s, self._config.cluster.start_deadline_s)  # before it is ready it imports its world
        late = [p for p, a in self.actors.items() if now - a.seen > (lease_s if a.ready else start_s)]
        for peer in late:
            self._silent.add(self.actors[peer].hello.incarnation)
            self.lose(peer, f"silent for {now - self.actors[peer].seen:.0f} s")

    def probe(self, waiting: frozenset[bytes] = frozenset()) -> None:
        """Let every actor hear from time to time that this learner lives; whose connection is gone is lost.

        Args:
            waiting: actors whose queue is full, as that of one that is gone may seem to be.
        """
        now = time.monotonic()
        for peer, actor in [(p, a) for p, a in self.actors.items() if now - a.probed > PROBE_S and p not in waiting]:
            actor.probed = now
            if not self._receiver.send(peer, Lease()):
                self.lose(peer, "its connection is gone")

    def send_home(self) -> None:
        """Let leavers go that have answered everything."""
        for peer in self._book.retired():
            self._receiver.send(peer, Goodbye())
            self.lose(peer, "it was sent home")

    def say_goodbye(self) -> None:
        """Tell every actor that the run is over and wait a little until they have heard it.

        What an actor has not read when the connection closes is lost to it.
        """
        waiting = {peer for peer in self.actors if self._receiver.send(peer, Goodbye())}
        deadline = time.monotonic() + GOODBYE_S
        while waiting and time.monotonic() < deadline:
            for received in self._receiver.receive(GOODBYE_S / 20):
                if isinstance(received.message, Goodbye):
                    waiting.discard(received.peer)

    def count(self, reason: str) -> None:
        """Count what answers no ticket: it is no part of the books of tickets."""
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def describe(self, next_batch: int) -> dict[str, Any]:
        """Every actor, who was given up as silent, and what was refused; ``next_batch`` is the one that is filled."""
        members = {member.peer: member for member in self._book.members}
        now, gate = time.monotonic(), self._receiver.gate
        return {
            "actors": [
                {
                    "index": actor.index,
                    "incarnation": actor.hello.incarnation,
                    "pid": actor.hello.pid,
                    "host": actor.hello.host,
                    "key": "" if gate is None else gate.name(actor.key) or "",
                    "ready": actor.ready,
                    "worlds": len(members[peer].worlds) if peer in members else 0,
                    "sps": round(actor.steps / max(now - actor.since, 1e-9), 1),
                    "version": actor.held_version,
                    "rollouts": actor.rollouts,
                    "env_steps": actor.steps,
                    "silent_s": round(now - actor.seen, 3),
                    "owes_s": round(now - min(actor.asked.values(), default=now), 3),
                    "holds": any(ticket.batch == next_batch for ticket in actor.asked),
                    "relieved": peer in members and members[peer].relieved,
                }
                for peer, actor in sorted(self.actors.items(), key=lambda item: item[1].index)
            ],
            "silent": sorted(self._silent),
            "refused_messages": dict(self._refused),
            "refused_handshakes": 0 if gate is None else gate.refused,
        }
