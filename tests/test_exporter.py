"""The Prometheus endpoint: what it says, where it listens, and that the launcher is never held up by it."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import pytest
import statuses
from clusters import poll, rustyrl
from prometheus_client.parser import text_string_to_metric_families

from rustyrl.errors import UsageError
from rustyrl.exporter import Exporter, families, parse_address
from rustyrl.metrics import FIGURES, PREFIX

ROOT = Path(__file__).parent.parent


def scrape(url: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Metrics by name and by the labels that not all have."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ("run", "env")))
            assert {"run", "env"} <= sample.labels.keys()
            assert labels not in found.setdefault(sample.name, {}), (sample.name, labels)
            found[sample.name][labels] = sample.value
    return found


def test_a_status_is_scraped_over_http_and_the_port_is_given_back():
    status = statuses.crowded()
    with Exporter("127.0.0.1:0") as exporter:
        assert scrape(exporter.url) == {}
        exporter.offer(lambda: status)
        exporter.offer(lambda: pytest.fail("looked again within a second"))
        found = scrape(exporter.url)
        assert found.keys() == {PREFIX + figure.name for figure in FIGURES}
        assert found["rustyrl_trained_steps_total"] == {(): 1234567890.0}
        assert len(found["rustyrl_actor_steps_total"]) == 64
        assert found["rustyrl_actor_held_ratio"][(("actor", "7"),)] == 0.98
        assert found["rustyrl_tickets_rejected_total"][(("reason", "warm-up"),)] == 64.0
        assert found["rustyrl_state"][(("state", "running"),)] == 1.0
        assert found["rustyrl_gpu_busy_ratio"] == {(): 0.45}
        assert (("actor", "1"),) not in found["rustyrl_actor_memory_bytes"]  # on another host
        with pytest.raises(UsageError, match="in use"):
            Exporter(exporter.url.removeprefix("http://").removesuffix("/metrics"))
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(exporter.url, timeout=5)


@pytest.mark.parametrize("make", [statuses.starting, statuses.recovering, statuses.slow])
def test_what_is_not_known_is_left_out(make):
    names = {metric.name for metric in families(make())}
    assert "rustyrl_learner_up" in names
    assert "rustyrl_gpu_memory_bytes" not in names


def test_an_actor_index_that_two_have_for_a_moment_is_no_duplicate():
    status = statuses.recorded()
    status["actors"].append(status["actors"][0])
    for metric in families(status):
        labels = [tuple(sorted(sample.labels.items())) for sample in metric.samples]
        assert len(labels) == len(set(labels))


def test_a_scraper_that_says_nothing_holds_nobody_up():
    with Exporter("127.0.0.1:0") as exporter:
        port = int(re.search(r":(\d+)/", exporter.url)[1])
        with socket.create_connection(("127.0.0.1", port)):
            exporter.offer(statuses.recorded)
            assert poll(lambda: scrape(exporter.url), "an answer to another one")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("0.0.0.0:9095", "can be reached from other machines"),
        ("192.168.1.5:9095", "can be reached from other machines"),
        ("example.org:9095", "can be reached from other machines"),
        ("[::]:9095", "can be reached from other machines"),
        ("9095", "takes HOST:PORT"),
        ("127.0.0.1", "takes HOST:PORT"),
        ("127.0.0.1:70000", "takes HOST:PORT"),
        (":9095", "takes HOST:PORT"),
    ],
)
def test_only_addresses_of_this_machine_are_accepted(address, said):
    with pytest.raises(UsageError, match=said):
        parse_address(address)


def test_loopback_addresses_are_read():
    assert parse_address("localhost:9095") == ("127.0.0.1", 9095)
    assert parse_address("127.0.0.2:0") == ("127.0.0.2", 0)
    assert parse_address("[::1]:9095") == ("::1", 9095)


def test_a_port_in_use_is_bad_use_and_nothing_is_started(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run = tmp_path / "run"
        code, _, err = rustyrl("train", "cartpole", "--run", str(run), "--set", f"cluster.prometheus={address}")
    assert code == 2
    assert f"cannot listen on {address}" in err
    assert "Traceback" not in err
    assert not run.exists()


def test_every_metric_and_every_field_is_documented():
    page = (ROOT / "docs" / "status.md").read_text()
    told = dict(re.findall(r"^\| `(rustyrl_\w+)` \| ([^|]*)\|", page, re.MULTILINE))
    assert told.keys() == {PREFIX + figure.name for figure in FIGURES}
    status = statuses.crowded()
    for figure in FIGURES:
        labels = sorted({label for found, _ in figure.samples(status) for label in found})
        assert told[PREFIX + figure.name].strip() == ", ".join(f"`{label}`" for label in labels)
    fields = set(re.findall(r"`([\w.\[\]]+)`", "\n".join(re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE))))
    leaves = {"training", "losses", "stages_s", "update_s", "lag_steps", "rejected", "refused_messages", "eval"}
    given = field_names({**status, "crashes": [{}], "auto": None}, leaves)
    assert given <= fields, given - fields
    assert {f for f in fields if not f.startswith("rustyrl_")} - given <= {"gpu", "tickets_before[]"}


def field_names(status: dict, leaves: set[str]) -> set[str]:
    """``a``, ``a.b`` and ``a[].b`` for everything in a status."""
    names = set()
    for key, value in status.items():
        if isinstance(value, dict) and key not in leaves:
            names |= {f"{key}.{inner}" for inner in value}
        elif isinstance(value, list) and value and isinstance(value[0], dict) and value[0]:
            names |= {f"{key}[].{inner}" for row in value for inner in row}
        elif isinstance(value, list) and key != "held_by":
            names.add(f"{key}[]")
        else:
            names.add(key)
    return names
