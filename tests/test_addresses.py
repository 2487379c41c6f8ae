"""Addresses: what is one, what protects a link there, and how others name it."""

from __future__ import annotations

import pytest

from rustyrl.addresses import join_address, listen_address, local_address, named_address, security_of
from rustyrl.errors import UsageError


@pytest.mark.parametrize(
    ("address", "bound", "security"),
    [
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555", "loopback"),
        ("tcp://127.9.9.9:1", "tcp://127.9.9.9:1", "loopback"),
        ("tcp://localhost:0", "tcp://127.0.0.1:*", "loopback"),
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "loopback"),
        ("tcp://[::1]:0", "tcp://[::1]:*", "loopback"),
        ("ipc:///tmp/link", "ipc:///tmp/link", "ipc"),
        ("tcp://0.0.0.0:5555", "tcp://0.0.0.0:5555", "curve"),
        ("tcp://[::]:5555", "tcp://[::]:5555", "curve"),
        ("tcp://192.0.2.7:1", "tcp://192.0.2.7:1", "curve"),
        ("tcp://[2001:db8::7]:1", "tcp://[2001:db8::7]:1", "curve"),
        ("tcp://lo:5555", "tcp://lo:5555", "curve"),  # an interface by name: nobody looks where it leads
    ],
)
def test_addresses_to_listen_on_are_taken_and_what_protects_them_is_known(address, bound, security):
    assert listen_address(address) == bound
    assert security_of(bound, insecure=False) == security
    assert security_of(bound, insecure=True) == security.replace("curve", "insecure")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "is no address"),
        ("tcp://", "is no address"),
        ("udp://x:1", "is no address"),
        ("ipc://", "is no address"),
        ("tcp://127.0.0.1", "is no address"),
        ("tcp://127.0.0.1:x", "is no address"),
        ("tcp://127.0.0.1:1/path", "is no address"),
        ("tcp://user@127.0.0.1:1:2", "is no address"),
        ("tcp://::1:5555", "is no address"),
        ("tcp://[::1:5555", "is no address"),
        ("tcp://127.0.0.1:\u0661", "is no address"),  # a digit, elsewhere
        ("tcp://:5555", "names no host"),
        ("tcp://[]:5555", "names no host"),
        ("tcp://[127.0.0.1]:5555", "names no host"),
        ("tcp://127.0.0.1:99999", "no port 99999"),
        ("tcp://*:5555", "tcp://0.0.0.0:PORT"),
        ("tcp://nobody.invalid:5555", "there is no machine 'nobody.invalid'"),
    ],
)
def test_other_addresses_are_refused_with_what_was_expected(address, said):
    with pytest.raises(UsageError, match=said.replace("[", r"\[")):
        listen_address(address)
    with pytest.raises(UsageError):
        join_address(address, keyed=False, insecure=True)


def test_joining_another_machine_takes_a_key_or_a_word():
    for away in ("tcp://192.0.2.7:5555", "tcp://[2001:db8::7]:5555"):
        with pytest.raises(UsageError, match="leaves this machine: expected --key FILE"):
            join_address(away, keyed=False, insecure=False)
        assert join_address(away, keyed=True, insecure=False) == away
        assert join_address(away, keyed=False, insecure=True) == away
    assert join_address("tcp://localhost:5555", keyed=False, insecure=False) == "tcp://127.0.0.1:5555"
    assert join_address("tcp://[::1]:5555", keyed=False, insecure=False) == "tcp://[::1]:5555"
    with pytest.raises(UsageError, match="give one of them"):
        join_address("tcp://127.0.0.1:5555", keyed=True, insecure=True)
    with pytest.raises(UsageError, match="takes no --key"):
        join_address("ipc:///tmp/link", keyed=True, insecure=False)
    with pytest.raises(UsageError, match="no port to join"):
        join_address("tcp://127.0.0.1:0", keyed=False, insecure=False)
    with pytest.raises(UsageError, match="is no machine; name the learner's"):
        join_address("tcp://0.0.0.0:5555", keyed=True, insecure=False)


def test_all_interfaces_are_one_address_here_and_another_elsewhere():
    assert local_address("tcp://0.0.0.0:5555") == "tcp://127.0.0.1:5555"
    assert local_address("tcp://[::]:5555") == "tcp://[::1]:5555"
    assert local_address("tcp://192.0.2.7:5555") == "tcp://192.0.2.7:5555"
    assert local_address("ipc:///tmp/link") == named_address("ipc:///tmp/link") == "ipc:///tmp/link"
    assert named_address("tcp://192.0.2.7:5555") == "tcp://192.0.2.7:5555"
    for bound in ("tcp://0.0.0.0:5555", "tcp://[::]:5555"):
        named = named_address(bound)
        assert named.endswith(":5555")
        assert "0.0.0.0" not in named
        assert "[::]" not in named
