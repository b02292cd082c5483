"""Tenants on a real server: keys, what is charged, and that what a client left is given back."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.server import Server, running
from prometheus_client.parser import text_string_to_metric_families

OPERATOR, ACME, OTHER = "operator-key", "acme-key", "other-key"
LIMIT_S = 60  # only a failing test waits so long


@pytest.fixture(scope="module")
def llama(case: Callable[[str, int], Case]) -> Case:
    return case("llama", 2)


@pytest.fixture(scope="module")
def server(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Acme has one adapter, and its limits let one request run; the other tenant has another adapter."""
    folder = tmp_path_factory.mktemp("tenants")
    one, other = sorted(llama.adapters)[:2]
    tenants = [
        {"name": "acme", "keys": [ACME], "adapters": [one], "limits": {"concurrent_requests": 1}},
        {"name": "other", "keys": [OTHER], "adapters": [other], "limits": {"tokens_per_minute": 40}},
    ]
    (folder / "tenants.json").write_text(json.dumps({"tenants": tenants}))
    flags = ["--enable-metrics", "--api-key", OPERATOR, "--tenants", str(folder / "tenants.json"), *llama.lora_paths]
    with running(llama.model, *flags, log=folder / "log", warm=True) as server:
        yield server


def generate(server: Server, key: str, adapter: str | None, prompt: list[int], **more: Any) -> tuple[int, Any]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return server.call(
        "/generate", {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling} | more, key=key
    )


def usage(server: Server) -> dict[tuple[str, ...], float]:
    """Samples of tenants: name without prefix and labels -> value."""
    page = server.call("/metrics")[1]
    return {
        (
            sample.name.removeprefix("sglang_blocklora:tenant_"),
            *(sample.labels[name] for name in ("tenant", "adapter", "limit") if name in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("sglang_blocklora:tenant_")
    }


def test_each_key_has_its_adapters_answers_and_nobody_elses(server: Server, llama: Case) -> None:
    one, other = sorted(llama.adapters)[:2]
    for key, adapter, prompt in ((ACME, one, 0), (OPERATOR, other, 1), (ACME, None, 1)):
        status, answer = generate(server, key, adapter, llama.prompts[prompt])
        assert (status, answer["output_ids"]) == (200, llama.expected[adapter][prompt])
    assert "does not exist" in generate(server, ACME, other, [5])[1]["error"]["message"]
    assert generate(server, "nobodys", one, [5])[0] == 401
    told = usage(server)
    first, second = llama.prompts[:2]
    assert told["requests_total", "acme", one] == 1
    assert told["prompt_tokens_total", "acme", one] == len(first)
    assert told["generation_tokens_total", "acme", one] == NEW_TOKENS
    assert told["prompt_tokens_total", "acme", "(base)"] == len(second)
    assert told["generation_tokens_total", "(operator)", other] == NEW_TOKENS


def test_what_a_client_left_is_charged_and_its_place_is_given_back(server: Server, llama: Case) -> None:
    """A stream of which two pieces were read."""
    one = sorted(llama.adapters)[0]
    body = {
        "input_ids": [5, 6],
        "lora_path": one,
        "stream": True,
        "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True},
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ACME}"}
    before = usage(server)
    request = urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as stream:
        stream.readline(), stream.readline()
        status, answer = generate(server, ACME, None, [5])
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    started = time.monotonic()
    while generate(server, ACME, None, [5])[0] == 429:
        assert time.monotonic() < started + LIMIT_S
        time.sleep(0.05)
    generated = usage(server)["generation_tokens_total", "acme", one] - before["generation_tokens_total", "acme", one]
    assert 1 <= generated < 1500
    assert usage(server)["refusals_total", "acme", "concurrent_requests"] >= 1


def test_tokens_that_are_used_up_come_back_after_the_seconds_that_are_told(server: Server, llama: Case) -> None:
    """Not waited for: the unit tests do, with a clock of their own."""
    other = sorted(llama.adapters)[1]
    body = {"model": other, "prompt": [5] * 40, "max_tokens": 1}
    assert server.call("/v1/completions", body, key=OTHER)[0] == 200
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {OTHER}"},
    )
    with pytest.raises(urllib.error.HTTPError) as error, urllib.request.urlopen(request):
        pass
    assert error.value.code == 429
    assert error.value.headers["Retry-After"] in ("2", "3")  # 41 of 40 are used: 2 tokens come back in 3 s
    error.value.close()
