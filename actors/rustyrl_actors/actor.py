"""The actor process: tickets in, rollouts out."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time

from rustyrl.black_box import BlackBox
from rustyrl.channels import RolloutSender
from rustyrl.errors import ContractError, RunFailedError, UsageError, WireError, printable
from rustyrl.keys import ActorKey
from rustyrl.stages import Stages
from rustyrl.wire import (
    Fault,
    Goodbye,
    HandOver,
    Hello,
    Ready,
    Refusal,
    Rejoin,
    Snapshot,
    TicketMessage,
    WeightsHeader,
    Welcome,
    WorldState,
    decode_weights_message,
    encode_rollout,
)
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.fleet import Fleet
from rustyrl_actors.pulse import LEASE_S, Pulse

__all__ = ["run_actor"]

log = logging.getLogger(__name__)

JOIN_S = 60.0  # how long a learner may take to answer hello
AWAY_S = 300.0  # how long a learner may be away, restarting or behind a broken link, before an actor gives it up


def run_actor(address: str, index: int, incarnation: int, box: BlackBox | None, key: ActorKey | None = None) -> None:
    """Join the learner at ``address`` and answer its tickets until it says goodbye.

    A learner that goes away is waited for, and its successor joined.

    Args:
        address: where the learner listens.
        index: this actor's place among the actors, -1 for any free one.
        incarnation: tells this process from every other that had or will have this index.
        box: where to say what is being done; None if nobody looks.
        key: what to join with, where links are encrypted.

    Raises:
        RunFailedError: the learner refused this actor, did not answer or went away.
    """
    with RolloutSender(address, key) as link:
        try:
            hello = Hello(index, incarnation, os.getpid(), _host())
            welcome = _join(link, hello)
            fleet = _build_fleet(link, welcome, incarnation, Pulse(link, box))
            try:
                _answer_tickets(link, fleet, hello)
            finally:
                fleet.close()
        except ConnectionAbortedError:
            log.info("the run is over")
        except (TimeoutError, WireError) as error:
            raise RunFailedError(f"{address}: {error}") from None
        except ContractError as error:
            link.send(Fault(str(error)[:4000]), timeout_s=1.0)
            raise
        except RunFailedError:  # the learner, or what listens in its place, does not want this actor
            raise
        except BaseException as error:  # a world that raised, a signal: the learner is not to wait for the lease
            with contextlib.suppress(TimeoutError, ConnectionAbortedError):
                link.send(Refusal(f"{type(error).__name__}: {error}"[:1000]), timeout_s=1.0)
            raise


def _answer_tickets(link: RolloutSender, fleet: Fleet, hello: Hello) -> None:
    stages = Stages()
    heard = time.monotonic()
    while True:
        with stages("wait"):
            received = link.receive(LEASE_S)
        if received is None and link.was_cut:
            log.info("the connection to the learner broke: joining anew")
            _rejoin(link, fleet, hello)
            heard = time.monotonic()
            continue
        if received is None:
            fleet.pulse.lease()
            if time.monotonic() - heard > AWAY_S:
                raise TimeoutError(f"nothing was heard of the learner for {AWAY_S:.0f} s")
            continue
        heard = time.monotonic()
        match received.message:
            case WeightsHeader() as header:
                with stages("load"):
                    fleet.load(decode_weights_message(received.blob), header.policy_version)
            case TicketMessage() as message:
                recording = fleet.answer(message.ticket, stages)
                fleet.pulse.rest(answered=False)
                with stages("encode"):
                    frame, blob = encode_rollout(recording.rollout)
                with stages("send"):
                    recording.sent = link.send_frames(frame, blob, AWAY_S)
                fleet.pulse.rest(answered=True)
            case HandOver() | Snapshot() as request:
                _send_worlds(link, fleet, request)
            case WorldState() as state:
                fleet.take(state, received.blob)
            case Rejoin():
                log.info("the learner does not know this actor, or has a successor: joining anew")
                _rejoin(link, fleet, hello)
            case Goodbye():
                log.info("the run is over")
                link.offer(Goodbye())
                return
            case Refusal(reason):
                beside = f"; this actor has {fleet.spaces}" if fleet.fingerprint in reason else ""
                raise RunFailedError(f"the learner refused this actor: {printable(reason)}{beside}")


def _send_worlds(link: RolloutSender, fleet: Fleet, request: HandOver | Snapshot) -> None:
    """Give worlds away, or copies of them."""
    state = fleet.give if isinstance(request, HandOver) else fleet.copy
    for world in request.worlds:
        link.send(*state(world), timeout_s=AWAY_S)


def _rejoin(link: RolloutSender, fleet: Fleet, hello: Hello) -> None:
    """Join the same learner, or its successor, anew."""
    fleet.follow(_join(link, hello, AWAY_S))
    link.send(Ready(fleet.fingerprint), timeout_s=AWAY_S)


def _join(link: RolloutSender, hello: Hello, limit_s: float = JOIN_S) -> Welcome:
    """Say hello until it is answered: the learner may still be starting. What came before the answer is of no account.

    A hello is lost if the connection breaks, or the learner dies, before it is read.
    """
    deadline = time.monotonic() + limit_s
    link.send(hello, timeout_s=limit_s)
    said, lost = time.monotonic(), False
    while (left := deadline - time.monotonic()) > 0:
        received = link.receive(min(left, LEASE_S))
        lost |= link.was_cut
        if (lost or time.monotonic() - said > LEASE_S) and link.offer(hello):
            said, lost = time.monotonic(), False
        match received and received.message:
            case Welcome() as welcome:
                return welcome
            case Refusal(reason):
                raise RunFailedError(f"the learner refused this actor: {printable(reason)}")
            case Goodbye():
                raise RunFailedError("the run is over")
    raise TimeoutError(f"the learner did not answer within {limit_s:.0f} s")


def _host() -> str:
    """The name of this machine, as the wire takes it."""
    return socket.gethostname()[:255].encode("ascii", "replace").decode()


def _build_fleet(link: RolloutSender, welcome: Welcome, incarnation: int, pulse: Pulse) -> Fleet:
    pulse.build(0, 0)
    try:
        source = find_environment(welcome.env, welcome.env_config)
    except UsageError as error:
        link.send(Refusal(str(error)))
        raise
    pulse.rest(answered=False)
    link.send(Ready(source.spec.fingerprint), timeout_s=AWAY_S)
    log.info("joined as actor %d: %s, fingerprint %s", welcome.index, welcome.env, source.spec.fingerprint)
    return Fleet(source, welcome, incarnation, pulse)
