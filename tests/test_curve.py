"""Encrypted links: who has a key is in, everybody else is out, and nothing that was overheard is good for anything."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from clusters import ENDLESS, await_more, await_status, contributing, end, poll, speed, verb
from test_collector import CONFIG, SPEC, WEIGHTS
from typer.testing import CliRunner

from rustyrl.channels import Received, RolloutReceiver, RolloutSender
from rustyrl.cli import app
from rustyrl.curve import make_pair
from rustyrl.errors import RunFailedError, UsageError, WireError
from rustyrl.keys import FIRST, LAUNCHED, ActorKey, KeyRing, read_actor_key
from rustyrl.wire import Goodbye, Hello, Lease, Refusal, WeightsHeader, decode_header, encode_message
from rustyrl_learner.collector import Collector

HELLO = Hello(-1, 1, 2, "here")


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing.make(tmp_path / "keys")


@pytest.fixture
def learner(ring: KeyRing) -> Iterator[RolloutReceiver]:
    with RolloutReceiver("tcp://127.0.0.1:*", ring) as receiver:
        yield receiver


def hear(learner: RolloutReceiver) -> Received:
    return poll(lambda: list(learner.receive(0.05)), "a message")[0]


def first_key(ring: KeyRing) -> ActorKey:
    return read_actor_key(ring.path(FIRST))


def with_other(key: ActorKey, *, learner: bool = False) -> ActorKey:
    """The same with a pair, or a learner's key, that nobody knows."""
    public, secret = make_pair()
    if learner:
        return ActorKey(key.kind, key.name, public, key.public, key.secret)
    return ActorKey(key.kind, key.name, key.learner, public, secret)


class Proxy(threading.Thread):
    """Passes connections on, one at a time, and records what goes to the learner.

    ``inject`` sends more to the learner on the same connection, ``cut`` ends it.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(0.05)
        self.port = self._listening.getsockname()[1]
        self._target = port
        self._over = threading.Event()
        self.recorded: list[bytes] = []
        self.closed = threading.Event()
        self.inject = lambda _content: None
        self.cut = lambda: None

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(10)

    def run(self) -> None:
        with self._listening:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    actor, _ = self._listening.accept()
                    with actor, socket.create_connection(("127.0.0.1", self._target)) as learner:
                        self._pass_on(actor, learner)

    def _pass_on(self, actor: socket.socket, learner: socket.socket) -> None:
        self.inject = learner.sendall
        self.cut = lambda: actor.shutdown(socket.SHUT_RDWR)
        while not self._over.is_set():
            ready, _, _ = select.select([actor, learner], [], [], 0.2)
            for one in ready:
                content = b""
                with contextlib.suppress(OSError):
                    content = one.recv(65536)
                if not content:
                    self.closed.set()
                    return
                if one is actor:
                    self.recorded.append(content)
                with contextlib.suppress(OSError):
                    (learner if one is actor else actor).sendall(content)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def until_closed(connection: socket.socket) -> bytes:
    """What the other side says before it hangs up."""
    connection.settimeout(20)
    said = b""
    with contextlib.suppress(ConnectionError):
        while content := connection.recv(65536):
            said += content
    return said


def test_a_key_is_let_in_and_its_name_is_known(ring, learner):
    key = first_key(ring)
    with RolloutSender(learner.address, key) as actor:
        actor.send(HELLO)
        received = hear(learner)
        assert (received.message, received.key) == (HELLO, key.public)
        assert learner.gate.name(received.key) == FIRST
        assert learner.send(received.peer, Goodbye())
        assert actor.receive(5).message == Goodbye()
    assert learner.gate.refused == 0


@pytest.mark.parametrize("kind", ["stranger", "another run's learner", "no key"])
def test_everybody_else_is_refused_in_words(ring, learner, kind):
    key = first_key(ring)
    key = {"stranger": with_other(key), "another run's learner": with_other(key, learner=True), "no key": None}[kind]
    said = {"stranger": "does not let this key in", "no key": "wants a key: expected --key FILE"}.get(kind)
    with RolloutSender(learner.address, key) as actor:
        if said is None:  # nothing tells that from a learner that is not there yet
            with pytest.raises(TimeoutError, match="none is there, or the key is another run's"):
                actor.send(HELLO, timeout_s=0.4)
        else:
            with pytest.raises(RunFailedError, match=said):
                actor.send(HELLO, timeout_s=20)
            assert not actor.offer(Lease())
    assert list(learner.receive(0.2)) == []
    assert learner.gate.refused == (kind == "stranger")


def test_a_key_where_none_is_wanted_is_refused_in_words(ring):
    with RolloutReceiver("tcp://127.0.0.1:*") as plain, RolloutSender(plain.address, first_key(ring)) as actor:
        with pytest.raises(RunFailedError, match="does not take keys"):
            actor.send(HELLO, timeout_s=20)
        assert list(plain.receive(0.2)) == []


def test_beyond_loopback_nothing_listens_without_keys_unless_that_is_said(ring):
    with pytest.raises(UsageError, match="leaves this machine, and there are no keys"):
        RolloutReceiver("tcp://0.0.0.0:*")
    with RolloutReceiver("tcp://0.0.0.0:*", insecure=True) as receiver:
        assert receiver.gate is None


def test_without_an_authenticator_nobody_is_let_in(ring, learner):
    """ZeroMQ's own default is to let every key in."""
    learner.gate.close()
    with RolloutSender(learner.address, first_key(ring)) as actor, pytest.raises((TimeoutError, RunFailedError)):
        actor.send(HELLO, timeout_s=0.4)
    assert list(learner.receive(0.2)) == []


def test_a_key_that_is_made_while_the_learner_runs_is_let_in(ring, learner):
    key = read_actor_key(ring.add("late"))
    poll(lambda: list(learner.receive(0.05)) or learner.gate.name(key.public), "the key to be seen")
    with RolloutSender(learner.address, key) as actor:
        actor.send(HELLO)
        assert hear(learner).key == key.public


def test_what_comes_with_a_revoked_key_is_no_message_any_more(ring, learner):
    key = first_key(ring)
    with RolloutSender(learner.address, key) as actor:
        actor.send(HELLO)
        peer = hear(learner).peer
        ring.revoke(FIRST)
        poll(lambda: list(learner.receive(0.05)) or learner.gate.name(key.public) is None, "the revocation to be seen")
        actor.send(Lease(1))
        received = hear(learner)
        assert isinstance(received.message, WireError)
        assert (received.message.reason, received.key) == ("key", "")
        assert learner.send(peer, Refusal("why"))
        learner.cut(peer, key.public)
        assert actor.receive(5).message == Refusal("why")
        for _ in range(100):
            actor.offer(Lease(2))
        assert list(learner.receive(0.3)) == []
        poll(lambda: list(learner.receive(0.05)) or not learner.send(peer, Goodbye()), "nobody to be there")
        assert list(learner.receive(0.05)) == []
    with RolloutSender(learner.address, key) as again, pytest.raises(RunFailedError, match="does not let this key in"):
        again.send(HELLO, timeout_s=20)


def test_a_key_that_was_cut_off_may_come_back_later(ring, learner, monkeypatch):
    monkeypatch.setattr("rustyrl.curve.BARRED_S", 1.0)
    key = first_key(ring)
    assert [learner.gate.bar(key.public) for _ in range(3)] == [1.0, 2.0, 4.0]
    with RolloutSender(learner.address, key) as actor, pytest.raises(RunFailedError, match="cut off for a while"):
        actor.send(HELLO, timeout_s=20)
    monkeypatch.setattr("rustyrl.curve.BARRED_MAX_S", 0.1)
    learner.gate.bar(key.public)
    time.sleep(0.2)
    with RolloutSender(learner.address, key) as actor:
        actor.send(HELLO)
        assert hear(learner).key == key.public


def broken_link(learner: RolloutReceiver, key: ActorKey, stack: contextlib.ExitStack) -> RolloutSender:
    """An actor that was in, whose key is barred for what another with it did, and whose connection has just broken."""
    proxy = stack.enter_context(Proxy(port_of(learner.address)))
    actor = stack.enter_context(RolloutSender(f"tcp://127.0.0.1:{proxy.port}", key))
    actor.send(HELLO)
    assert hear(learner).message == HELLO
    assert not actor.was_cut
    learner.gate.bar(key.public)
    proxy.cut()
    assert actor.receive(20) is None
    assert actor.was_cut
    return actor


def test_who_was_in_and_is_barred_when_its_connection_breaks_knocks_until_it_is_in_again(ring, learner, monkeypatch):
    monkeypatch.setattr("rustyrl.channels.AGAIN_S", 0.05)
    monkeypatch.setattr("rustyrl.curve.BARRED_S", 600.0)
    with contextlib.ExitStack() as stack:
        actor = broken_link(learner, first_key(ring), stack)
        with pytest.raises(TimeoutError):
            actor.send(HELLO, timeout_s=0.2)
        poll(lambda: actor.receive(0.1) or learner.gate.refused >= 3, "three refusals")
        learner.gate._barred.clear()  # as time does
        actor.send(Lease(3), timeout_s=20)
        received = hear(learner)
        assert (received.message, received.key) == (Lease(3), first_key(ring).public)
        assert learner.send(received.peer, Goodbye())
        assert actor.receive(5).message == Goodbye()
        assert not actor.was_cut  # since it is in again


def test_who_was_in_and_stays_refused_gives_up_in_words(ring, learner, monkeypatch):
    monkeypatch.setattr("rustyrl.channels.AGAIN_S", 0.05)
    monkeypatch.setattr("rustyrl.channels.REFUSED_S", 0.15)
    with contextlib.ExitStack() as stack:
        actor = broken_link(learner, first_key(ring), stack)
        with pytest.raises(RunFailedError, match="does not let this key in"):
            actor.receive(20)
        assert learner.gate.refused > 1


@pytest.mark.parametrize(("name", "barred"), [(FIRST, True), (LAUNCHED, False)])
def test_the_key_of_the_runs_own_actors_is_not_barred_so_that_they_can_be_replaced(ring, learner, name, barred):
    key = read_actor_key(ring.path(name))
    with RolloutSender(learner.address, key) as actor:
        actor.send(HELLO)
        learner.cut(hear(learner).peer, key.public)
    with RolloutSender(learner.address, key) as replacement:
        with pytest.raises(RunFailedError) if barred else contextlib.nullcontext():
            replacement.send(HELLO, timeout_s=20)
        assert barred or hear(learner).message == HELLO


def test_what_was_overheard_is_of_no_use_on_another_connection_nor_twice_on_the_same(ring, learner):
    with (
        Proxy(port_of(learner.address)) as proxy,
        RolloutSender(f"tcp://127.0.0.1:{proxy.port}", first_key(ring)) as actor,
    ):
        actor.send(HELLO)
        assert hear(learner).message == HELLO
        overheard = b"".join(proxy.recorded)
        count = len(proxy.recorded)
        actor.send(WeightsHeader(0, 7), b"a blob that is easy to find")
        assert hear(learner).message == WeightsHeader(0, 7)
        message = b"".join(proxy.recorded[count:])
        assert b"a blob that is easy" not in message  # it is encrypted
        assert len(message) > 27
        with socket.create_connection(("127.0.0.1", port_of(learner.address))) as thief:
            thief.sendall(overheard + message)
            until_closed(thief)
        assert list(learner.receive(0.2)) == []
        proxy.inject(message)  # the same bytes again, where they were good once
        assert proxy.closed.wait(20)
        assert list(learner.receive(0.2)) == []
    assert learner.gate.refused == 0


def test_a_name_that_another_key_takes_over_is_lost_to_both(ring, tmp_path):
    """Names are random and told to nobody, so that only who has seen the learner's memory can try."""
    thief_key = read_actor_key(ring.add("thief"))
    receiver = RolloutReceiver("tcp://127.0.0.1:*", ring)
    thread = Collector(receiver, SPEC, CONFIG, 0, 1, 0, WEIGHTS)
    thread.start()
    try:
        with RolloutSender(receiver.address, first_key(ring)) as actor, zmq.Context() as context:
            actor.send(HELLO)
            poll(lambda: len(thread.snapshot()["actors"]) == 1, "the actor")
            with context.socket(zmq.DEALER) as thief:
                thief.linger = 0
                thief.identity = next(iter(thread._roster.actors))
                thief.curve_serverkey = thief_key.learner.encode()
                thief.curve_publickey, thief.curve_secretkey = thief_key.public.encode(), thief_key.secret.encode()
                thief.connect(receiver.address)
                thief.send_multipart([encode_message(Lease(1)), b""])
                poll(lambda: thread.snapshot()["refused_messages"] == {"other-key": 1}, "the theft to be seen")
                assert thread.snapshot()["actors"] == []
                thief.send_multipart([encode_message(HELLO), b""])
                assert not thief.poll(300) or isinstance(decode_header(thief.recv_multipart()[0]), Refusal)
                assert thread.snapshot()["actors"] == []
    finally:
        thread.close()


def test_ipv6_and_names_of_machines(ring):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        receiver = RolloutReceiver("tcp://[::1]:*", ring)
    except UsageError:
        pytest.skip("no IPv6 here")
    with receiver, RolloutSender(receiver.address, first_key(ring)) as actor:
        assert receiver.address.startswith("tcp://[::1]:")
        actor.send(HELLO)
        assert hear(receiver).message == HELLO


# Whole clusters

ACTOR = [sys.executable, "-c", "from rustyrl.main import main; main()", "actor"]


@pytest.fixture
def join() -> Iterator:
    """Start ``rustyrl actor ...``; everything is killed after the test."""
    actors: list[subprocess.Popen] = []

    def begin(*arguments: str, key: bytes = b"") -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        actor = subprocess.Popen([*ACTOR, *arguments], **pipes)
        actors.append(actor)
        if key:
            actor.stdin.write(key)
        actor.stdin.close()
        return actor

    yield begin
    for actor in actors:
        actor.kill()
        actor.wait(10)
        actor.stdout.close()


def listening(start):
    """A run with one actor of its own, which may not be there yet, and where others join it."""
    cluster = start(*ENDLESS, "--actors", "1", "--listen", "tcp://0.0.0.0:0", "--set", "run.checkpoint_every=2")
    status = await_status(cluster, lambda status: status["link"]["address"], "a listening learner")
    assert status["link"]["security"] == "curve"
    return cluster, status["link"]["address"]


def begin(start):
    cluster, link = listening(start)
    await_status(cluster, lambda status: contributing(status) == {0: 4}, "the first actor")
    return cluster, link


def secrets(cluster) -> list[str]:
    ring = KeyRing(cluster.run / "keys")
    return [ring.learner().secret, *(read_actor_key(ring.path(name)).secret for name in (FIRST, LAUNCHED))]


def shown(cluster, others: list[subprocess.Popen]) -> Iterator[tuple[str, bytes]]:
    """Everything that others than their owner may come to see: files, arguments, environments, what was said."""
    for folder, _, names in os.walk(cluster.run):
        for path in (Path(folder) / name for name in names if Path(folder).name != "keys"):
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that has made room for another one
                if path.is_file():
                    yield str(path), path.read_bytes()
    launcher = psutil.Process(cluster.process.pid)
    ours = [launcher, *launcher.children(recursive=True), *(psutil.Process(other.pid) for other in others)]
    assert len(ours) >= 3
    for process in ours:
        for what in ("cmdline", "environ"):
            yield f"{what} of {process.pid}", Path(f"/proc/{process.pid}/{what}").read_bytes()
    for text in cluster.said():
        yield "the launcher's output", text.encode()
    for arguments in (["status"], ["status", "--json"], ["keys", "list"], ["keys", "list", "--json"]):
        yield " ".join(arguments), said_by(*arguments, "--run", str(cluster.run))


def said_by(*arguments: str) -> bytes:
    """What a verb prints, run in this process."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output.encode()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("crash", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_actors_of_other_machines_join_with_a_key_and_a_revoked_one_is_cut_off(start, join, crash):
    cluster, link = listening(start)
    key = cluster.run / "keys" / f"{FIRST}.key"
    line = next(line for line in cluster.said()[1].splitlines() if "on another machine" in line)
    assert f"{key} ." in line
    assert f"rustyrl actor --join tcp://{line.partition('--join tcp://')[2].split()[0]} --key default.key" in line
    actor = join("--join", link, "--key", "-", key=key.read_bytes())
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1000: 2}, "both actors")
    if crash:  # which is recorded, and the next learner has the same keys
        os.kill(cluster.children("rustyrl_learner")[0].pid, signal.SIGSEGV)
    status = await_status(
        cluster, lambda s: contributing(s) == {0: 2, 1000: 2} and s["learner"]["restarts"] == crash, "both"
    )
    assert {row["index"]: row["key"] for row in status["actors"]} == {0: LAUNCHED, 1000: FIRST}
    assert bool(status["crashes"]) == crash
    found = secrets(cluster)
    for where, content in shown(cluster, [actor]):
        assert not any(secret.encode() in content for secret in found), where
    if crash:
        plain = join("--join", link)
        assert plain.wait(60) == 1
        assert b"wants a key" in plain.stdout.read()
    assert b"revoked default" in said_by("keys", "revoke", FIRST, "--run", str(cluster.run))
    assert actor.wait(60) == 1
    assert b"was revoked" in actor.stdout.read()
    status = await_status(cluster, lambda status: contributing(status) == {0: 4}, "all worlds to be with the first")
    assert status["wire"]["refused_handshakes"] == 0
    assert status["actor_restarts"] == 0
    await_more(cluster, 1)
    end(cluster)


def floods_until_refused(link: RolloutSender) -> bool:
    """Say much that nobody asked for, and whether the answer is no."""
    for _ in range(100):
        link.offer(Lease(1))
    received = link.receive(0.05)
    return received is not None and isinstance(received.message, Refusal)


@pytest.mark.faults
def test_an_actor_outlasts_that_another_with_its_key_is_cut_off(start, join):
    """Its key is barred for 10 s just when its connection breaks."""
    cluster, link = begin(start)
    path = cluster.run / "keys" / f"{FIRST}.key"
    with Proxy(port_of(link)) as proxy:
        actor = join("--join", f"tcp://127.0.0.1:{proxy.port}", "--key", "-", key=path.read_bytes())
        await_status(cluster, lambda status: contributing(status) == {0: 2, 1000: 2}, "the other actor")
        with RolloutSender(link, read_actor_key(path)) as flood:
            poll(lambda: floods_until_refused(flood), "it to be cut off")
        proxy.cut()
        await_status(cluster, lambda status: status["wire"]["refused_handshakes"] >= 2, "it to be refused")
        assert actor.poll() is None
        await_status(cluster, lambda status: contributing(status) == {0: 2, 1000: 2}, "it to be back")
        end(cluster)
        assert actor.wait(60) == 0


@pytest.mark.slow
def test_an_insecure_link_is_said_loudly_and_joined_without_a_key(start, join):
    cluster = start(*ENDLESS, "--actors", "0", "--listen", "tcp://0.0.0.0:0", "--insecure")
    status = await_status(cluster, lambda status: status["link"]["address"], "a listening learner")
    assert status["link"]["security"] == "insecure"
    assert not (cluster.run / "keys").exists()
    actor = join("--join", status["link"]["address"], "--insecure")
    await_status(cluster, lambda status: contributing(status) == {1000: 4}, "the actor")
    assert "WARNING: --insecure" in cluster.said()[1]
    assert b"! insecure" in said_by("status", "--run", str(cluster.run))
    end(cluster)
    assert actor.wait(60) == 0
    assert b"WARNING: --insecure" in actor.stdout.read()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_ten_thousand_refused_handshakes_leave_training_and_logs_alone(start):
    cluster, link = begin(start)
    before = speed(cluster)
    logs = [cluster.run / "logs" / "learner.log", cluster.run / "logs" / "actor-0.log"]
    sizes = [path.stat().st_size for path in logs]
    server = first_key(KeyRing(cluster.run / "keys")).learner.encode()
    started, tried = time.monotonic(), 0
    during = []
    measured = threading.Thread(target=lambda: during.append(speed(cluster)))
    measured.start()
    with zmq.Context() as context:
        while tried < 10_000:
            public, secret = zmq.curve_keypair()
            batch, watched = [], zmq.Poller()
            for _ in range(50):
                stranger = context.socket(zmq.DEALER)
                stranger.linger = 0
                stranger.curve_serverkey, stranger.curve_publickey, stranger.curve_secretkey = server, public, secret
                monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
                watched.register(monitor, zmq.POLLIN)
                stranger.connect(link)
                batch.append((stranger, monitor))
            waiting = {monitor for _, monitor in batch}
            while waiting:
                ready = dict(watched.poll(20_000))
                assert ready, "a handshake that nobody refuses"
                for monitor in ready:
                    watched.unregister(monitor)
                    waiting.discard(monitor)
            for stranger, monitor in batch:
                stranger.disable_monitor()
                monitor.close()
                stranger.close()
            tried += len(batch)
    took = time.monotonic() - started
    measured.join()
    print(f"{tried / took:,.0f} refused handshakes/s; steps/s {before:,.0f} before, {during[0]:,.0f} meanwhile")
    await_status(cluster, lambda status: status["wire"]["refused_handshakes"] == tried, "all to be counted")
    assert [path.stat().st_size for path in logs] == sizes
    await_more(cluster, 3)
    status = verb(cluster, "status")
    assert contributing(status) == {0: 4}
    assert status["tickets"]["lost"] == status["learner"]["restarts"] == status["actor_restarts"] == 0
    end(cluster)


@pytest.mark.faults
@pytest.mark.parametrize("allowed", [None, 128])
def test_hundreds_of_half_open_connections_are_closed_while_training_goes_on(start, join, allowed):
    """With fewer descriptors than connections, those that are there go on, and a warning says what is the matter."""
    cluster, link = begin(start)
    learner = cluster.children("rustyrl_learner")[0]
    if allowed is not None:
        learner.rlimit(psutil.RLIMIT_NOFILE, (allowed, allowed))
    idle = learner.num_fds()
    before = speed(cluster)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(24, b"\0") + bytes(31)
    half = bytes([4, 200, 5]) + b"HELLO" + bytes(50)  # a command that says it is longer
    opened = []
    try:
        for number in range(300):
            connection = socket.create_connection(("127.0.0.1", port_of(link)))
            connection.sendall((b"", greeting[:10], greeting, greeting + half)[number % 4])
            opened.append(connection)
        most = learner.num_fds()
        during = speed(cluster)
        for connection in opened:
            until_closed(connection)
    finally:
        for connection in opened:
            connection.close()
    poll(lambda: learner.num_fds() <= idle + 2, "descriptors to be given back")
    print(f"descriptors {idle} idle, {most} at most; steps/s {before:,.0f} before, {during:,.0f} meanwhile")
    assert ("descriptors of the learner are in use" in cluster.said()[1]) == (allowed is not None)
    await_more(cluster, 3)
    actor = join("--join", link, "--key", "-", key=(cluster.run / "keys" / f"{FIRST}.key").read_bytes())
    await_status(cluster, lambda status: contributing(status) == {0: 2, 1000: 2}, "another actor")
    end(cluster)
    assert actor.wait(60) == 0
