"""The page of ``GET /adapters/ui`` in a real browser, over made-up answers of a server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from blocklora_testing.browser import CHROMIUM, Tab, browser
from sglang_blocklora import reporting
from sglang_blocklora.memory.counts import AdapterCount
from sglang_blocklora.reporting.facts import (
    AdapterFacts,
    Facts,
    OwnedSlots,
    Requests,
    SlotFacts,
    Waiting,
    page,
    queue_told,
    slots_told,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")
PAGE = Path(reporting.__file__).with_name("page.html")
HOSTILE = "<img src=x onerror=\"document.title='taken'\">/a?b"
# Where pictures of the document are written: PICTURES=docs/screenshots pytest test/unit/test_page.py
PICTURES = os.environ.get("PICTURES")


def adapter(name: str, tier: str = "resident", **others: Any) -> AdapterFacts:
    known: dict[str, Any] = {
        "path": f"/adapters/{name}",
        "lora_id": f"id-{name}",
        "pinned": False,
        "rank": 16,
        "slots": 96,
    }
    return AdapterFacts(name=name, tier=tier, **known | others)


def facts(*adapters: AdapterFacts, queue: list[Waiting] | None = None, waiting: int = 0) -> Facts:
    owners = {
        one.name: OwnedSlots(adapter=96, kv=40 + i % 300) for i, one in enumerate(adapters) if one.tier == "resident"
    }
    owners["(base)"] = OwnedSlots(kv=900)
    weights, kv = (sum(getattr(one, field) for one in owners.values()) for field in ("adapter", "kv"))
    slots = SlotFacts(
        total=weights + kv + 2300, free=2000, in_use=300, adapter=weights, kv=kv, invalid_kv=0, owners=owners
    )
    return Facts(
        adapters=[*adapters],
        base=Requests(waiting=waiting),
        max_adapters_per_batch=64,
        slots=slots,
        queue=queue or [],
    )


class Made:
    """A server that answers with ``facts`` and notes what it is asked to do."""

    def __init__(self) -> None:
        self.facts, self.metrics = facts(), ""
        self.posts: list[tuple[str, Any, str | None]] = []
        self.refusal: str | None = None
        made = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                at = urlsplit(self.path)
                if at.path == "/adapters/ui":
                    self._say(200, PAGE.read_bytes(), "text/html")
                elif at.path == "/adapters":
                    asked = parse_qs(at.query)
                    told = page(made.facts.adapters, int(asked["limit"][0]), asked.get("after", [None])[0])
                    told |= {"slots": slots_told(made.facts.slots), "queue": queue_told(made.facts)}
                    self._say(200, json.dumps(told).encode(), "application/json")
                else:
                    self._say(200, made.metrics.encode(), "text/plain")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                made.posts.append((unquote(self.path), body, self.headers.get("Authorization")))
                told = {"error": {"message": made.refusal}} if made.refusal else {}
                self._say(403 if made.refusal else 200, json.dumps(told).encode(), "application/json")

            def _say(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/adapters/ui"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab
        assert tab.problems == []


@pytest.fixture
def made() -> Iterator[Made]:
    server = Made()
    yield server
    server.close()


def picture(tab: Tab, name: str) -> None:
    if PICTURES:
        tab.picture(Path(PICTURES) / f"{name}.png")


def names(tab: Tab) -> list[str]:
    return tab.value("[...document.querySelectorAll('#rows tr')].map(row => row.cells[0].firstChild.textContent)")


def test_a_server_without_adapters_says_what_to_do(tab: Tab, made: Made) -> None:
    tab.open(made.url)
    tab.wait(
        "!document.getElementById('empty').hidden && document.getElementById('state').textContent.startsWith('Live')"
    )
    assert "Nobody waits" in tab.value("document.getElementById('queue').textContent")
    assert not tab.value("!!document.querySelector('table').offsetParent")
    picture(tab, "adapters_ui_empty")


def test_adapters_memory_queue_and_ttft_are_shown(tab: Tab, made: Made) -> None:
    count = AdapterCount(hits=31, misses=4, loads=2)
    made.facts = facts(
        adapter("sql", pinned=True, counts=count, requests=Requests(running=3, waiting=2)),
        adapter("support", counts=AdapterCount(hits=12, misses=1, loads=1)),
        adapter("legal", "host", last_error="adapter 'legal': found no tensor; expected LoRA weights."),
        adapter(HOSTILE, "disk", lora_id=None, rank=None, slots=None),
        queue=[Waiting(adapter="sql", prompt_tokens=812), Waiting(adapter=None, prompt_tokens=55)],
        waiting=1,
    )
    made.metrics = "".join(
        f'sglang_blocklora:adapter_time_to_first_token_seconds_{kind}{{adapter="sql"}} {value}\n'
        for kind, value in (("sum", 1.5), ("count", 6.0))
    )
    tab.open(made.url)
    tab.wait("document.querySelectorAll('#rows tr').length === 4")
    assert sorted(names(tab)) == sorted(["sql", "support", "legal", HOSTILE])
    row = tab.value(
        "[...document.querySelectorAll('#rows tr')].find(row => row.cells[0].textContent === 'sql').innerText"
    )
    assert row.split("\t")[:10] == ["sql", "resident, pinned", "96", "16", "3", "2", "31", "4", "2", "250"]
    assert tab.value("document.title") == "Adapters", "a name is never markup"
    queue = tab.value("document.getElementById('queue').textContent")
    assert queue == "3 waiting. First: sql (812 tokens), base model (55 tokens)"
    kinds = tab.value("[...document.querySelectorAll('#map div')].map(cell => cell.className)")
    assert {"weights", "kv", "use", "free"} == set(kinds)
    assert "2,000" in tab.value("document.getElementById('legend').innerText")
    picture(tab, "adapters_ui")
    tab.call("Emulation.setEmulatedVisionDeficiency", type="achromatopsia")
    picture(tab, "adapters_ui_no_colour")
    tab.call("Emulation.setEmulatedVisionDeficiency", type="none")
    styles = "[...document.querySelectorAll('.swatch')].map(one => getComputedStyle(one).backgroundImage)"
    assert len(set(tab.value(styles))) >= 3, "kinds differ by pattern, not by colour alone"


def test_everything_is_done_by_keyboard(tab: Tab, made: Made) -> None:
    made.facts = facts(adapter("sql"), adapter("other", "disk", lora_id=None))
    tab.open(made.url)
    tab.wait("document.querySelectorAll('#rows tr').length === 2")

    def go_to(label: str) -> None:
        """Tab until the thing of that name has the focus."""
        for _ in range(40):
            told = tab.value(
                "(e => e.getAttribute('aria-label') || e.name || e.id || e.textContent)(document.activeElement)"
            )
            if told == label:
                return
            tab.press("Tab")
        raise AssertionError(f"{label} is not reached")

    go_to("key")
    tab.type("secret")
    go_to("Slots")
    tab.press("Enter")
    assert tab.value("document.querySelector('[aria-sort]').textContent") == "Slots"
    go_to("Load other")
    tab.press("Space")
    tab.wait("document.getElementById('state').textContent !== 'Asking …'")
    go_to("lora_name")
    tab.type("new")
    go_to("lora_path")
    tab.type("s3://models/new")
    tab.press("Enter")
    tab.open(made.url)  # buttons of the last row behind it are reached from the start
    tab.wait("document.querySelectorAll('#rows tr').length === 2")
    go_to("Pin sql")
    tab.press("Enter")
    go_to("Unload sql")
    tab.press("Enter")
    for _ in range(200):
        if len(made.posts) == 4:
            break
        tab.value("new Promise(done => setTimeout(done, 20))")
    assert [(path, body) for path, body, _ in made.posts] == [
        ("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "/adapters/other"}),
        ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "s3://models/new"}),
        ("/adapters/sql/pin", {}),
        ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
    ]
    assert [key for *_, key in made.posts[:2]] == ["Bearer secret"] * 2
    assert tab.value("getComputedStyle(document.activeElement).outlineStyle") != "none", "the focus is seen"


def test_a_refusal_is_shown_and_changes_nothing(tab: Tab, made: Made) -> None:
    made.facts, made.refusal = facts(adapter("sql")), "pinned adapters may take at most half of the slots"
    tab.open(made.url)
    tab.wait("document.querySelectorAll('#rows tr').length === 1")
    tab.value("document.querySelector('[data-action=\"Pin sql\"]').click()")
    tab.wait("document.getElementById('state').textContent.includes('at most half')")
    assert tab.value("document.getElementById('state').className") == "error"
    made.close()
    tab.wait("document.getElementById('state').textContent.startsWith('Not up to date')")


def test_a_thousand_adapters_are_found_sorted_and_filtered(tab: Tab, made: Made) -> None:
    tiers = ("resident", "host", "disk")
    made.facts = facts(*(adapter(f"tenant-{i:04}", tiers[i % 3], counts=AdapterCount(hits=i)) for i in range(1200)))
    tab.open(made.url)
    tab.wait("document.querySelectorAll('#rows tr').length === 100")
    assert "1200 known, 400 resident" in tab.value("document.body.innerText")
    assert "389 others" in tab.value("document.getElementById('map').textContent"), "the map stays readable"
    tab.value("[...document.querySelectorAll('th button')].find(one => one.textContent === 'Hits').click()")
    assert names(tab)[:2] == ["tenant-1199", "tenant-1198"]
    picture(tab, "adapters_ui_thousand")
    tab.value("document.getElementById('more').click()")
    assert len(names(tab)) == 200
    tab.value("document.getElementById('filter').focus()")
    tab.type("0042")
    tab.wait("document.querySelectorAll('#rows tr').length === 1")
    assert names(tab) == ["tenant-0042"]


def test_the_page_asks_no_other_host() -> None:
    text = PAGE.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text
