"""The page of ``GET /adapters/ui`` in a real browser, on the real server that tests of the API share."""

from __future__ import annotations

import urllib.request

import pytest
from blocklora_testing.browser import CHROMIUM, browser
from blocklora_testing.case import ADMIN_KEY, Case
from blocklora_testing.server import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")


def test_an_adapter_is_loaded_used_pinned_and_unloaded_on_the_page(api_server: Server, api_case: Case) -> None:
    name = "by hand/ü"
    row = f"[...document.querySelectorAll('#rows tr')].find(row => row.cells[0].textContent === {name!r})"
    state = "document.getElementById('state').textContent"
    with browser() as tab:
        tab.open(f"{api_server.url}/adapters/ui")
        tab.wait("document.querySelectorAll('#rows tr').length >= 3")
        fill = "(form => {{ form.lora_name.value = {!r}; form.lora_path.value = {!r}; form.requestSubmit() }})"
        load = fill.format(name, str(api_case.adapters["n8"])) + "(document.getElementById('load'))"
        tab.value(load)
        tab.wait(f"document.getElementById('state').className === 'error' && !{state}.includes('Loading')")
        tab.value(f"document.getElementById('key').value = {ADMIN_KEY!r}")
        tab.value(load)
        tab.wait(f"!!{row}")
        api_server.tokens(api_case.prompts[0], name, 4)
        tab.wait(f"{row}?.cells[1].textContent === 'resident'")
        tab.value(f"{row}.querySelectorAll('button')[0].click()")
        tab.wait(f"{row}?.cells[1].textContent === 'resident, pinned'")
        told = {one["name"]: one for one in api_server.call("/adapters")[1]["data"]}
        assert told[name]["pinned"]
        assert tab.value(f"Number({row}.cells[2].textContent)") == told[name]["slots"]
        assert tab.value(f"{row}.cells[9].textContent") != "\u2013", "its first token was timed"
        tab.value(f"{row}.querySelectorAll('button')[1].click()")
        tab.wait(f"!{row}")
        assert name not in {one["name"] for one in api_server.call("/adapters")[1]["data"]}
        assert tab.problems == []


def test_the_page_may_run_no_script_but_its_own(api_server: Server) -> None:
    with urllib.request.urlopen(f"{api_server.url}/adapters/ui") as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
