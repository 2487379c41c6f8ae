"""The receive thread: tickets out, rollouts in, batches filled while training runs."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from rustyrl.channels import Received, RolloutReceiver
from rustyrl.config import Config
from rustyrl.errors import ContractError, RunFailedError, WireError, printable
from rustyrl.limits import Allowance, largest_message
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
    Snapshot,
    TicketMessage,
    WeightsHeader,
    WorldState,
    decode_rollout,
)
from rustyrl_learner.batch import BatchBuffer
from rustyrl_learner.device import CopyStream
from rustyrl_learner.gathering import Gathering, KeptWorld
from rustyrl_learner.ingest import admit
from rustyrl_learner.outbox import Outbox
from rustyrl_learner.owing import Owing
from rustyrl_learner.roster import Actor, Roster
from rustyrl_learner.tickets import TicketBook

__all__ = ["Collector"]

log = logging.getLogger(__name__)

POLL_S = 0.5
FULL_POLL_S = 0.01  # while something waits for room in a queue


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
        copies: CopyStream | None = None,
        worlds: Mapping[int, KeptWorld] | None = None,
    ) -> None:
        """Take up the learner's end.

        Args:
            receiver: the socket.
            spec: what is trained.
            config: how.
            incarnation: of this learner.
            expect: actors that the first batch waits for.
            first_version: of the policy that it begins with.
            weights: that policy.
            copies: takes batches to a GPU as soon as they are complete.
            worlds: of a checkpoint, given to their owners ahead of the first ticket.
        """
        self._receiver = receiver
        self._spec = spec
        self._config = config
        self._incarnation = incarnation
        self._expect = expect
        self._started = False
        self._book = TicketBook(config.batch.worlds, config.batch.max_policy_lag, first_version)
        self._blobs = {first_version: weights}
        self._newest = first_version
        self._roster = Roster(receiver, spec, config, incarnation, self._book)
        self._outbox = Outbox(receiver)
        self._kept = {world: kept for world, kept in (worlds or {}).items() if world < config.batch.worlds}
        if first_version:
            self._book.worlds_restarted = config.batch.worlds - len(self._kept)
        self._gathering: Gathering | None = None
        batch = config.batch
        self._owing = Owing(range(batch.worlds) if incarnation else ())
        self._allowance = Allowance(batch.worlds, batch.max_policy_lag, largest_message(spec, config))
        self._filling: dict[int, BatchBuffer] = {}
        self._done: set[int] = set()
        self._next_batch = first_version
        self._free = [
            BatchBuffer(0, spec, config.batch.unroll_length, config.batch.worlds, copies)
            for _ in range(config.batch.max_policy_lag + 1)
        ]
        self._complete: queue.Queue[BatchBuffer | BaseException] = queue.Queue()
        self._orders: deque[tuple[str, Any]] = deque()
        self._asked: dict[int, float] = {}  # worlds whose state was asked for, and when
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

    def gather(self, batch: int) -> Gathering:
        """Ask for copies of all worlds, which are to stand before this batch: all of the one before has come."""
        gathering = Gathering(batch)
        self._orders.append(("gather", gathering))
        self._receiver.wake()
        return gathering

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
                for received in self._receiver.receive(FULL_POLL_S if self._outbox.peers else POLL_S):
                    if not self._handle(received):
                        self._bear(received)
                    del received
                self._follow_orders()
                self._roster.check_keys()
                self._roster.expire()
                self._roster.probe(self._outbox.peers)
                self._check_start(deadline)
                self._roster.send_home()
                self._issue_tickets()
                self._turn_outbox()
                self._turn_gathering()
                self._snapshot = self._describe()
            self._follow_orders()
            self._snapshot = self._describe()
            if self._goodbye:
                self._roster.say_goodbye()
        except BaseException as error:  # it is raised again in the training thread
            self._complete.put(error)
            if self._gathering is not None:
                self._gathering.broken = True
                self._gathering.done.set()
            if isinstance(error, ContractError | RunFailedError):  # else this process is replaced, and actors wait
                self._roster.say_goodbye()

    def _bear(self, received: Received) -> None:
        """Cut off who sends more than anybody asked for."""
        if not self._allowance.spend(received.peer, received.size, received.header_size, time.monotonic()):
            self._roster.count("flood")
            why = "flood: it sent more messages that nobody asked for than an actor ever does"
            self._roster.cut_off(received.peer, received.key, why)

    def _handle(self, received: Received) -> bool:
        """Take in one message of whoever sent it; whether it was asked for."""
        peer, actor = received.peer, self._roster.actors.get(received.peer)
        # Its link was taken over, by a name that nobody else knew.
        if actor is not None and received.key not in ("", actor.key):
            self._roster.count("other-key")
            self._roster.cut_off(peer, received.key, "another key than its own came under its name")
            return False
        match received.message:
            case Hello() as hello:
                self._roster.welcome(peer, hello, received.key)
            case WireError(reason="key") as error:
                self._roster.revoke(peer, str(error))
            case WireError(reason=reason) as error:
                self._roster.count(reason)
                if actor is not None or reason == "wire-version":
                    self._receiver.send(peer, Refusal(str(error)))
                    self._roster.lose(peer, f"it sent no message: {error}")
            case RolloutHeader() | Lease() | Ready() if actor is None:
                self._roster.count("unknown-peer")
                self._receiver.send(peer, Rejoin())
            case message if actor is not None:
                return self._handle_actor(peer, actor, message, received.blob)
            case WorldState() as state:  # asked for by the learner before this one, or before its owner was given up
                self._roster.count("unknown-peer")
                return self._owing.settle(peer, state.world)
            case other:
                self._roster.count(f"unexpected-{type(other).__name__.lower()}")
        return False

    def _handle_actor(self, peer: bytes, actor: Actor, message: Message, blob: memoryview) -> bool:
        """Take in what an actor says that has said hello; whether it was asked for."""
        if not isinstance(message, Lease):
            actor.seen = time.monotonic()
        match message:
            case RolloutHeader() as header:
                return self._take_rollout(peer, actor, header, blob)
            case Lease(steps):
                self._roster.renew(peer, actor, steps)
            case Ready(fingerprint):
                self._roster.admit(peer, actor, fingerprint)
            case WorldState() as state:
                return self._take_world(peer, state, blob)
            case Fault(reason) if actor.ready:
                raise ContractError(printable(reason))
            case Goodbye() | Refusal():
                self._roster.lose(peer, "it left")
            case other:
                self._roster.count(f"unexpected-{type(other).__name__.lower()}")
        return False

    def _take_world(self, peer: bytes, state: WorldState, blob: memoryview) -> bool:
        """Take in the state of a world; whether it was asked for, be it that it comes too late."""
        asked = self._owing.settle(peer, state.world)
        try:
            if self._gathering is not None and self._gathering.take(peer, state, blob):
                return True
        except WireError as error:  # no honest actor sends one, and this one would begin anew with each checkpoint
            self._roster.count(error.reason)
            self._receiver.send(
                peer, Refusal(f"the state of world {state.world} is not what its message says: {error}")
            )
            self._roster.lose(peer, f"it sent a broken state of world {state.world}: {error}")
            return True
        if self._book.gives(peer, state.world):
            self._pass_on(state, blob)
            return True
        return asked

    def _take_rollout(self, peer: bytes, actor: Actor, header: RolloutHeader, blob: memoryview) -> bool:
        """Take in a rollout; whether it answers a ticket."""
        ticket = Ticket(header.batch, header.policy_version, header.worlds)
        if not self._book.owes(peer, ticket) or header.actor_incarnation != actor.hello.incarnation:
            self._roster.count("ticket")
            return False
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
                self._roster.lose(peer, f"its rollouts are refused: {error}")
            return True
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
            with self._stages("place"):
                complete.complete()
            complete.receive_s = self._stages.take()
            self._complete.put(complete)
            self._next_batch += 1
        return True

    def _follow_orders(self) -> None:
        while self._orders:
            order, what = self._orders.popleft()
            if order == "death":
                if self._roster.bury(what) and not self._started:  # it was one of those that batch 0 waits for
                    self._expect = max(1, self._expect - 1)
                continue
            if order == "retire":
                for peer in self._roster.peers_of(what):
                    self._book.retire(peer)
                continue
            if order == "relieve":
                for peer in self._roster.peers_of(what):
                    if self._book.relieve(peer):
                        self._roster.actors[peer].asked.clear()
                continue
            if order == "gather":
                self._ask_for_copies(what)
                continue
            buffer, version, weights, rejected = what
            self._book.finish(buffer.number, rejected)
            self._free.append(buffer)
            self._newest = version
            self._blobs[version] = weights
            for old in [v for v in self._blobs if v < version - self._config.batch.max_policy_lag]:
                del self._blobs[old]

    def _pass_on(self, state: WorldState, blob: memoryview) -> None:
        """Give a world that moved to who has it now, ahead of the ticket that names it."""
        self._asked.pop(state.world, None)
        owner = self._book.owner(state.world)
        whole = bool(state.arrays) and owner is not None and self._outbox.send(owner, state, bytes(blob))
        self._book.arrive(state.world, whole=whole)

    def _ask_for_copies(self, gathering: Gathering) -> None:
        """Have every world copied by its owner."""
        self._gathering = gathering
        for member in self._book.members:
            if member.worlds and self._outbox.send(member.peer, Snapshot(tuple(member.worlds))):
                gathering.ask(member.peer, tuple(member.worlds))
                self._owing.ask(member.peer, member.worlds)

    def _ask_for_states(self) -> None:
        """Have worlds that move handed over; who does not do it in time is not waited for."""
        now = time.monotonic()
        for peer, worlds in self._book.handovers():
            self._asked |= dict.fromkeys(worlds, now)
            self._owing.ask(peer, worlds)
            if not self._outbox.send(peer, HandOver(worlds)):
                self._roster.lose(peer, "it cannot be reached")
        for world in [w for w, since in self._asked.items() if now - since > self._config.cluster.lease_s]:
            del self._asked[world]
            self._book.arrive(world, whole=False)

    def _issue_tickets(self) -> None:
        if not self._started:
            return
        due = self._book.due(self._newest)
        self._ask_for_states()
        for peer, ticket in due:
            actor = self._roster.actors.get(peer)
            if actor is None:  # lost a moment ago, and this ticket with it
                continue
            for world in ticket.worlds if self._kept else ():
                if (kept := self._kept.pop(world, None)) is not None:
                    self._outbox.send(peer, *kept)
            if actor.held_version != ticket.policy_version:  # the weights always travel ahead of the ticket
                header = WeightsHeader(self._incarnation, ticket.policy_version)
                if not self._outbox.send(peer, header, self._blobs[ticket.policy_version]):
                    self._roster.lose(peer, "it cannot be reached")
                    continue
                actor.held_version = ticket.policy_version
            actor.asked[ticket] = time.monotonic()
            message = TicketMessage(self._incarnation, ticket.batch, ticket.policy_version, ticket.worlds)
            if not self._outbox.send(peer, message):
                self._roster.lose(peer, "it cannot be reached")

    def _turn_outbox(self) -> None:
        """Send what waited for room; who reads lives."""
        for peer in self._outbox.peers - self._roster.actors.keys():
            self._outbox.forget(peer)
        for peer in self._outbox.flush():
            self._roster.actors[peer].seen = time.monotonic()

    def _turn_gathering(self) -> None:
        """Wait no more for who is gone, and for nobody once everything has come."""
        gathering = self._gathering
        if gathering is None:
            return
        for peer in gathering.givers - self._roster.actors.keys():
            gathering.lose(peer)
        if not gathering.givers:
            gathering.done.set()
            self._gathering = None

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

    def _describe(self) -> dict[str, Any]:
        return {
            **self._roster.describe(self._next_batch),
            "tickets": msgspec.to_builtins(self._book.books()),
            "worlds_moved": self._book.worlds_moved,
            "worlds_restarted": self._book.worlds_restarted,
            "received_bytes": self._receiver.received_bytes,
            "sent_bytes": self._receiver.sent_bytes,
        }
