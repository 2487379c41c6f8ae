"""The receive thread: membership, tickets out, rollouts in, batches filled while training runs."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rustyrl.channels import Received, RolloutReceiver
from rustyrl.config import Config
from rustyrl.errors import ContractError, RunFailedError, WireError
from rustyrl.rollout import Ticket
from rustyrl.spec import EnvironmentSpec
from rustyrl.stages import Stages
from rustyrl.wire import (
    Fault,
    Goodbye,
    HandOver,
    Hello,
    Lease,
    Message,
    Ready,
    Refusal,
    Rejoin,
    RolloutHeader,
    TicketMessage,
    WeightsHeader,
    Welcome,
    WorldState,
    decode_rollout,
)
from rustyrl_learner.batch import BatchBuffer
from rustyrl_learner.ingest import admit
from rustyrl_learner.tickets import TicketBook

__all__ = ["Collector"]

log = logging.getLogger(__name__)

POLL_S = 0.5
PROBE_S = 1.0  # how often an actor hears that the learner lives, and the learner whether it can be reached
FIRST_BY_HAND = 1000  # actors that ask for no index get one from here on: those below are the launcher's
GOODBYE_S = 1.0  # for actors to finish their unroll and hear that the run is over


@dataclass(slots=True)
class _Actor:
    """One peer that said hello."""

    hello: Hello
    index: int
    seen: float
    probed: float
    ready: bool = False
    held_version: int = -1
    begun: int = 0  # env steps, by its last lease
    steps: int = 0
    rollouts: int = 0
    since: float = field(default_factory=time.monotonic)
    asked: dict[Ticket, float] = field(default_factory=dict)  # tickets that it owes an answer to, and since when


class Collector:
    """Runs the learner's end of the link in a thread of its own.

    The training thread takes complete batches with `next_batch`, answers each with `publish`, and never touches a
    socket. Everything else here belongs to the receive thread.
    """

    def __init__(
        self,
        receiver: RolloutReceiver,
        spec: EnvironmentSpec,
        config: Config,
        incarnation: int,
        expect: int,
        first_version: int,
        weights: bytes,
        *,
        pin: bool,
    ) -> None:
        self._receiver = receiver
        self._spec = spec
        self._config = config
        self._incarnation = incarnation
        self._expect = expect
        self._started = False
        self._book = TicketBook(config.batch.worlds, config.batch.max_policy_lag, first_version)
        self._blobs = {first_version: weights}
        self._newest = first_version
        self._actors: dict[bytes, _Actor] = {}
        self._filling: dict[int, BatchBuffer] = {}
        self._done: set[int] = set()
        self._next_batch = first_version
        self._free = [
            BatchBuffer(0, spec, config.batch.unroll_length, config.batch.worlds, pin)
            for _ in range(config.batch.max_policy_lag + 1)
        ]
        self._complete: queue.Queue[BatchBuffer | BaseException] = queue.Queue()
        self._orders: deque[tuple[str, Any]] = deque()
        self._rejected_strangers: dict[str, int] = {}
        self._asked: dict[int, float] = {}  # worlds whose state was asked for, and when
        self._dead: set[int] = set()  # incarnations, as in the next
        self._silent: set[int] = set()
        self._turned = time.monotonic()
        self._stages = Stages()
        self._stopping = threading.Event()
        self._goodbye = True
        self._snapshot: dict[str, Any] = {}
        self._snapshot = self._describe()
        self._thread = threading.Thread(target=self._run, name="receive", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def next_batch(self, timeout_s: float) -> BatchBuffer | None:
        """The next complete batch in order, or None when the time is over; raises what ended the thread."""
        try:
            item = self._complete.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def publish(self, buffer: BatchBuffer, version: int, weights: bytes, rejected: str | None = None) -> None:
        """Hand a batch's memory back and out goes what was made of it, ahead of the tickets that name it."""
        self._orders.append(("publish", (buffer, version, weights, rejected)))
        self._receiver.wake()

    def report_death(self, incarnation: int) -> None:
        """The launcher saw an actor process of this machine end."""
        self._orders.append(("death", incarnation))
        self._receiver.wake()

    def retire(self, incarnation: int) -> None:
        """Send an actor of this machine home once it has answered what it owes."""
        self._orders.append(("retire", incarnation))
        self._receiver.wake()

    def relieve(self, incarnation: int) -> None:
        """Give an actor's worlds, and what it has not answered yet, to the others."""
        self._orders.append(("relieve", incarnation))
        self._receiver.wake()

    def snapshot(self) -> dict[str, Any]:
        """Members and books, as of the last turn of the receive thread."""
        return self._snapshot

    def close(self, *, goodbye: bool = True) -> dict[str, Any]:
        """End the thread, close the sockets; the last snapshot.

        Args:
            goodbye: tell every actor that the run is over; else they wait for another learner.
        """
        self._goodbye = goodbye
        self._stopping.set()
        self._receiver.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._receiver.close()
        return self._snapshot

    def _run(self) -> None:
        deadline = time.monotonic() + self._config.cluster.start_deadline_s
        try:
            while not self._stopping.is_set():
                for received in self._receiver.receive(POLL_S):
                    self._handle(received)
                    del received
                self._follow_orders()
                self._expire_leases()
                self._probe()
                self._check_start(deadline)
                self._send_home()
                self._issue_tickets()
                self._snapshot = self._describe()
            self._follow_orders()
            self._snapshot = self._describe()
            if self._goodbye:
                self._say_goodbye()
        except BaseException as error:  # it is raised again in the training thread
            self._complete.put(error)
            if isinstance(error, ContractError | RunFailedError):  # else this process is replaced, and actors wait
                self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Tell every actor that the run is over and wait a little until they have heard it.

        What an actor has not read when the connection closes is lost to it.
        """
        waiting = {peer for peer in self._actors if self._receiver.send(peer, Goodbye())}
        deadline = time.monotonic() + GOODBYE_S
        while waiting and time.monotonic() < deadline:
            for received in self._receiver.receive(GOODBYE_S / 20):
                if isinstance(received.message, Goodbye):
                    waiting.discard(received.peer)

    def _handle(self, received: Received) -> None:
        """Take in one message of whoever sent it."""
        peer, actor = received.peer, self._actors.get(received.peer)
        match received.message:
            case Hello() as hello:
                self._welcome(peer, hello)
            case WireError(reason=reason) as error:
                self._count_stranger(reason)
                if actor is not None or reason == "wire-version":
                    self._receiver.send(peer, Refusal(str(error)))
                    self._lose(peer, f"it sent no message: {error}")
            case RolloutHeader() | Lease() | Ready() if actor is None:
                self._count_stranger("unknown-peer")
                self._receiver.send(peer, Rejoin())
            case message if actor is not None:
                self._handle_actor(peer, actor, message, received.blob)
            case other:
                self._count_stranger(f"unexpected-{type(other).__name__.lower()}")

    def _handle_actor(self, peer: bytes, actor: _Actor, message: Message, blob: memoryview) -> None:
        """Take in what an actor says that has said hello."""
        if not isinstance(message, Lease):
            actor.seen = time.monotonic()
        match message:
            case RolloutHeader() as header:
                self._take_rollout(peer, actor, header, blob)
            case Lease(steps):
                # One that owes an answer and takes no steps has lost its ticket on the way, or is stuck: it is not to
                # live for ever.
                if steps > actor.begun or not self._book.owing(peer):
                    actor.seen, actor.begun = time.monotonic(), steps
            case Ready(fingerprint):
                self._admit_actor(peer, actor, fingerprint)
            case WorldState() as state:
                if self._book.gives(peer, state.world):  # else it came too late
                    self._pass_on(state, blob)
            case Fault(reason) if actor.ready:
                raise ContractError(reason)
            case Goodbye() | Refusal():
                self._lose(peer, "it left")
            case other:
                self._count_stranger(f"unexpected-{type(other).__name__.lower()}")

    def _welcome(self, peer: bytes, hello: Hello) -> None:
        if peer in self._actors:
            self._count_stranger("second-hello")
            return
        if hello.incarnation in self._dead:
            return  # what a process had sent before it ended
        taken = {actor.index for actor in self._actors.values()}
        index = hello.index
        if index < 0:
            index = next(i for i in range(FIRST_BY_HAND, FIRST_BY_HAND + len(taken) + 1) if i not in taken)
        elif index in taken:
            self._count_stranger("index-taken")  # by one that died, as is about to be told: this one asks again
            return
        now = time.monotonic()
        self._silent.discard(hello.incarnation)
        self._actors[peer] = _Actor(hello, index, seen=now, probed=now)
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

    def _admit_actor(self, peer: bytes, actor: _Actor, fingerprint: str) -> None:
        if fingerprint != self._spec.fingerprint:
            self._receiver.send(
                peer,
                Refusal(
                    f"this run's environment {self._spec.env!r} has fingerprint {self._spec.fingerprint}, the actor's "
                    f"has {fingerprint}: install the same code and set the same parameters on both sides"
                ),
            )
            self._lose(peer, "it has another environment")
            return
        if not actor.ready:
            actor.ready = True
            self._book.join(peer, actor.index)
            log.info("actor %d joined (pid %d on %s)", actor.index, actor.hello.pid, actor.hello.host)

    def _take_rollout(self, peer: bytes, actor: _Actor, header: RolloutHeader, blob: memoryview) -> None:
        ticket = Ticket(header.batch, header.policy_version, header.worlds)
        if not self._book.owes(peer, ticket) or header.actor_incarnation != actor.hello.incarnation:
            self._count_stranger("ticket")
            return
        actor.asked.pop(ticket, None)
        try:
            with self._stages("decode"):
                rollout = decode_rollout(header, blob)
            with self._stages("admit"):
                admit(rollout, self._spec, self._config.batch.unroll_length, self._incarnation)
        except WireError as error:
            log.warning("refused a rollout of actor %d: %s", actor.index, error)
            if not self._book.reject(peer, ticket, error.reason):
                self._receiver.send(peer, Refusal(f"its rollouts were refused three times, last for {error}"))
                self._lose(peer, f"its rollouts are refused: {error}")
            return
        buffer = self._filling.get(ticket.batch)
        if buffer is None:
            buffer = self._filling[ticket.batch] = self._free.pop()
            buffer.begin(ticket.batch)
        with self._stages("place"):
            buffer.place(rollout)
        actor.steps += int(rollout.valid.sum())
        actor.rollouts += 1
        if self._book.accept(peer, ticket):
            self._done.add(ticket.batch)
        while self._next_batch in self._done:  # in order, whichever was complete first
            self._done.remove(self._next_batch)
            complete = self._filling.pop(self._next_batch)
            complete.receive_s = self._stages.take()
            self._complete.put(complete)
            self._next_batch += 1

    def _follow_orders(self) -> None:
        while self._orders:
            order, what = self._orders.popleft()
            if order == "death":
                self._bury(what)
                continue
            if order == "retire":
                for peer in self._peers_of(what):
                    self._book.retire(peer)
                continue
            if order == "relieve":
                for peer in self._peers_of(what):
                    if self._book.relieve(peer):
                        self._actors[peer].asked.clear()
                continue
            buffer, version, weights, rejected = what
            self._book.finish(buffer.number, rejected)
            self._free.append(buffer)
            self._newest = version
            self._blobs[version] = weights
            for old in [v for v in self._blobs if v < version - self._config.batch.max_policy_lag]:
                del self._blobs[old]

    def _bury(self, incarnation: int) -> None:
        """Take it that a process of this machine has ended, whether it had said hello or not."""
        if incarnation in self._dead:
            return
        self._dead.add(incarnation)
        for peer in self._peers_of(incarnation):
            self._lose(peer, "its process ended")
        if not self._started:  # it was one of those that batch 0 waits for
            self._expect = max(1, self._expect - 1)

    def _peers_of(self, incarnation: int) -> list[bytes]:
        """The peers that are this process."""
        return [peer for peer, actor in self._actors.items() if actor.hello.incarnation == incarnation]

    def _send_home(self) -> None:
        """Let leavers go that have answered everything."""
        for peer in self._book.retired():
            self._receiver.send(peer, Goodbye())
            self._lose(peer, "it was sent home")

    def _pass_on(self, state: WorldState, blob: memoryview) -> None:
        """Give a world that moved to who has it now, ahead of the ticket that names it."""
        self._asked.pop(state.world, None)
        owner = self._book.owner(state.world)
        whole = bool(state.arrays) and owner is not None and self._receiver.send(owner, state, bytes(blob))
        self._book.arrive(state.world, whole=whole)

    def _ask_for_states(self) -> None:
        """Have worlds that move handed over; who does not do it in time is not waited for."""
        now = time.monotonic()
        for peer, worlds in self._book.handovers():
            self._asked |= dict.fromkeys(worlds, now)
            if not self._receiver.send(peer, HandOver(worlds)):
                self._lose(peer, "it cannot be reached")
        for world in [w for w, since in self._asked.items() if now - since > self._config.cluster.lease_s]:
            del self._asked[world]
            self._book.arrive(world, whole=False)

    def _issue_tickets(self) -> None:
        if not self._started:
            return
        due = self._book.due(self._newest)
        self._ask_for_states()
        for peer, ticket in due:
            actor = self._actors.get(peer)
            if actor is None:  # lost a moment ago, and this ticket with it
                continue
            if actor.held_version != ticket.policy_version:  # the weights always travel ahead of the ticket
                header = WeightsHeader(self._incarnation, ticket.policy_version)
                if not self._receiver.send(peer, header, self._blobs[ticket.policy_version]):
                    self._lose(peer, "it cannot be reached")
                    continue
                actor.held_version = ticket.policy_version
            actor.asked[ticket] = time.monotonic()
            message = TicketMessage(self._incarnation, ticket.batch, ticket.policy_version, ticket.worlds)
            if not self._receiver.send(peer, message):
                self._lose(peer, "it cannot be reached")

    def _check_start(self, deadline: float) -> None:
        """Batch 0 waits for every actor that is expected, with a deadline."""
        if self._started:
            return
        ready = len(self._book.members)
        if ready >= self._expect:
            self._started = True
        elif time.monotonic() > deadline:
            limit_s = self._config.cluster.start_deadline_s
            if not ready:
                raise RunFailedError(f"no actor joined within {limit_s:.0f} s")
            log.warning("starting with %d of %d actors after %.0f s", ready, self._expect, limit_s)
            self._started = True

    def _expire_leases(self) -> None:
        now, before = time.monotonic(), self._turned
        self._turned = now
        if now - before > 2 * POLL_S:  # this process stood still, and what they said meanwhile is still to be read
            for actor in self._actors.values():
                actor.seen = min(now, actor.seen + now - before)  # who was heard just now already stands at now
        lease_s = self._config.cluster.lease_s
        start_s = max(lease_s, self._config.cluster.start_deadline_s)  # before it is ready it imports its world
        late = [p for p, a in self._actors.items() if now - a.seen > (lease_s if a.ready else start_s)]
        for peer in late:
            self._silent.add(self._actors[peer].hello.incarnation)
            self._lose(peer, f"silent for {now - self._actors[peer].seen:.0f} s")

    def _probe(self) -> None:
        """Let every actor hear from time to time that this learner lives; whose connection is gone is lost."""
        now = time.monotonic()
        for peer, actor in [(p, a) for p, a in self._actors.items() if now - a.probed > PROBE_S]:
            actor.probed = now
            if not self._receiver.send(peer, Lease()):
                self._lose(peer, "its connection is gone")

    def _lose(self, peer: bytes, why: str) -> None:
        actor = self._actors.pop(peer, None)
        if actor is None:
            return
        log.warning("actor %d is gone: %s", actor.index, why)
        self._book.leave(peer)

    def _count_stranger(self, reason: str) -> None:
        """Count what answers no ticket: it is no part of the books of tickets."""
        self._rejected_strangers[reason] = self._rejected_strangers.get(reason, 0) + 1

    def _describe(self) -> dict[str, Any]:
        worlds = {member.peer: len(member.worlds) for member in self._book.members}
        now = time.monotonic()
        relieved = {member.peer for member in self._book.members if member.relieved}
        return {
            "actors": [
                {
                    "index": actor.index,
                    "incarnation": actor.hello.incarnation,
                    "pid": actor.hello.pid,
                    "host": actor.hello.host,
                    "ready": actor.ready,
                    "worlds": worlds.get(peer, 0),
                    "sps": round(actor.steps / max(now - actor.since, 1e-9), 1),
                    "version": actor.held_version,
                    "rollouts": actor.rollouts,
                    "env_steps": actor.steps,
                    "silent_s": round(now - actor.seen, 3),
                    "owes_s": round(now - min(actor.asked.values(), default=now), 3),
                    "holds": any(ticket.batch == self._next_batch for ticket in actor.asked),
                    "relieved": peer in relieved,
                }
                for peer, actor in sorted(self._actors.items(), key=lambda item: item[1].index)
            ],
            "silent": sorted(self._silent),
            "tickets": msgspec.to_builtins(self._book.books()),
            "refused_messages": dict(self._rejected_strangers),
            "worlds_moved": self._book.worlds_moved,
            "worlds_restarted": self._book.worlds_restarted,
            "received_bytes": self._receiver.received_bytes,
            "sent_bytes": self._receiver.sent_bytes,
        }
