"""What a front decides without a server: the adapter of a request, the replica, flags, what is told."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from sglang_blocklora import route
from sglang_blocklora.fleet.asked import adapter_of
from sglang_blocklora.fleet.replicas import Fleet, NoReplica
from sglang_blocklora.scheduling.replicas import choose_replica, preference


@pytest.mark.parametrize(
    ("path", "body", "adapter"),
    [
        ("/v1/completions", {"model": "sql"}, "sql"),
        ("/v1/completions", {"model": "llama:sql", "lora_path": "no"}, "sql"),
        ("/v1/completions", {"model": "llama"}, None),
        ("/v1/completions", {"model": "default"}, None),
        ("/v1/completions", {}, None),
        ("/v1/completions", {"model": 3}, None),
        ("/v1/completions", ["sql"], None),
        ("/api/chat", {"model": "sql:latest"}, "sql"),
        ("/api/chat", {"model": "llama:latest"}, None),
        ("/v1/completions", {"model": "sql:latest"}, "sql:latest"),
        ("/generate", {"model": "sql"}, None),
        ("/generate", {"lora_path": "sql"}, "sql"),
        ("/generate", {"lora_path": [None, "a", "b"]}, "a"),
        ("/generate", {"lora_path": []}, None),
    ],
)
def test_the_adapter_of_a_request(path: str, body: Any, adapter: str | None) -> None:
    assert adapter_of(path, json.dumps(body).encode(), "llama") == adapter


@pytest.mark.parametrize("body", [b"", b"{", b"\xff"])
def test_a_body_that_is_no_json_is_left_to_a_replica(body: bytes) -> None:
    assert adapter_of("/v1/completions", body, "llama") is None


def test_a_fleet_chooses_among_those_that_have_the_adapter() -> None:
    fleet = Fleet(["http://a", "http://b", "http://c"])
    with pytest.raises(NoReplica, match="of 3 are 0 up"):
        fleet.choose("sql")
    for one in fleet.replicas:
        fleet.found(one)
    order = preference("sql", ("http://a", "http://b", "http://c"))
    assert choose_replica("sql", dict.fromkeys(order, 0)) == fleet.choose("sql").url == order[0]
    first = fleet.choose("sql")
    assert fleet.choose("sql", [first]).url == order[1]
    first.owed.add("sql")
    assert fleet.choose("sql").url == order[1]
    first.owed.clear()
    fleet.lost(first, "gone")
    assert fleet.choose("sql").url == order[1]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "--replica is missing"),
        (["--replica", "10.0.0.1:30000"], "--replica 10.0.0.1:30000 is not the address"),
        (["--replica", "http://a/v1"], "is not the address"),
        (["--replica", "http://a", "--replica", "http://a/"], "one twice"),
        (["--replica", "http://a", "--check-seconds", "0"], "--check-seconds"),
    ],
)
def test_impossible_flags_stop_with_a_message(argv: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        route.parse(argv)


def test_flags() -> None:
    settings = route.parse(["--replica", "http://a:1/", "--replica=https://b", "--api-key", "k"])
    assert settings.replica == ("http://a:1", "https://b")
    assert settings.managing_key == "k"
    assert (settings.host, settings.port) == ("127.0.0.1", 30000)


def test_up_and_down_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fleet = Fleet(["http://a"])
    (replica,) = fleet.replicas
    for change in (fleet.found, fleet.found):
        change(replica)
    for _ in range(2):
        fleet.lost(replica, "gone")
    fleet.lost(replica, "gone otherwise")
    told = [record.message.removeprefix("Replica http://a is ") for record in caplog.records]
    assert told == ["up.", "down: gone", "down: gone otherwise"]
