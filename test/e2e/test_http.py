"""Adapters over HTTP at TP 2: vLLM's load and unload, the list, pins, keys, and what routers and Prometheus read."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from blocklora_testing.case import ADMIN_KEY, NAMES, NEW_TOKENS, Case
from blocklora_testing.server import Server
from prometheus_client.parser import text_string_to_metric_families
from sglang_blocklora.adapters.content_hash import content_hash
from sglang_blocklora.reporting.secrets import HIDDEN
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.inspect_adapter import inspect_adapter
from sglang_blocklora.tools.sizing import size

LOADED = tuple(NAMES)


@pytest.fixture(scope="module")
def llama(api_case: Case) -> Case:
    return api_case


@pytest.fixture(scope="module")
def server(api_server: Server) -> Server:
    return api_server


def call(server: Server, path: str, body: Mapping[str, Any] | None = None, key: str | None = ADMIN_KEY) -> tuple:
    return server.call(path, body, key=key)


def adapters(server: Server) -> dict[str, dict]:
    return {one["name"]: one for one in call(server, "/adapters?limit=1000", key=None)[1]["data"]}


def test_list_tells_what_each_adapter_is(server: Server, llama: Case) -> None:
    found = adapters(server)
    told = call(server, "/adapters", key=None)[1]["slots"]
    assert set(found) == set(LOADED)
    for name in LOADED:
        own = found[name]
        path = llama.adapters[NAMES[name]]
        assert own["path"] == str(path)
        assert own["content_hash"] == content_hash(path)
        config = json.loads((path / "adapter_config.json").read_text())
        assert own["rank"] == config["r"]
        assert own["nblocks"] == (config["use_bdlora"] or {"nblocks": 1})["nblocks"]
        assert (own["running"], own["waiting"], own["pinned"], own["last_error"]) == (0, 0, False, None)
        # 2 layers, K and V plane, one KV head of 24 float32 numbers on each TP rank.
        assert own["bytes_per_tp_rank"] == own["slots"] * 2 * 2 * 24 * 4
        (cost,) = inspect_adapter(path, BaseSizes.read(llama.model), [2], torch.float32).tp
        assert (own["slots"], own["bytes_per_tp_rank"]) == (cost.slots, cost.arena_bytes)
        assert max(cost.bytes_per_rank) <= own["bytes_per_tp_rank"]
        fits = {"slots": told["total"], "free_bytes": 0, "kv_tokens": 0, "host_bytes": 0}
        sizing = size(BaseSizes.read(llama.model), own["rank"], own["nblocks"], 2, torch.float32, **fits)
        assert (sizing.slots_per_adapter, sizing.bytes_per_adapter) == (own["slots"], own["bytes_per_tp_rank"])
        assert sizing.resident == 3072 // own["slots"]


def test_list_is_paged(server: Server) -> None:
    names, after, pages = [], None, 0
    while True:
        query = "/adapters?limit=2" + (f"&after={after}" if after else "")
        body = call(server, query, key=None)[1]
        assert body["total"] == len(LOADED)
        names += [one["name"] for one in body["data"]]
        after, pages = body["last_id"], pages + 1
        if not body["has_more"]:
            break
    assert names == sorted(LOADED)
    assert pages == 2
    for name in names:
        assert call(server, f"/adapters/{name}", key=None) == (200, adapters(server)[name])
    status, answer = call(server, "/adapters/nobody", key=None)
    assert (status, answer["error"]["param"]) == (404, "name")
    assert "Adapters: legal" in answer["error"]["message"]
    assert call(server, "/adapters?limit=0", key=None)[0] == 400


def test_residency_and_counts_follow_requests(server: Server, llama: Case) -> None:
    before = adapters(server)["sql"]
    for _ in range(2):
        assert server.tokens(llama.prompts[0], "sql", NEW_TOKENS) == llama.expected[NAMES["sql"]][0]
    after = adapters(server)["sql"]
    assert after["tier"] == "resident"
    assert after["hits"] + after["misses"] == before["hits"] + before["misses"] + 2
    assert after["hits"] >= before["hits"] + 1
    assert after["loads"] - after["evictions"] == 1


def test_vllm_load_and_unload(server: Server, llama: Case) -> None:
    body = {"lora_name": "new", "lora_path": str(llama.adapters["n8"])}
    assert call(server, "/v1/load_lora_adapter", body) == (200, "Success: LoRA adapter 'new' added successfully.")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert "new" in {model.id for model in client.models.list()}
        answer = client.completions.create(model="new", prompt=llama.prompts[0], max_tokens=4, temperature=0)
        assert answer.model == "new"
    assert server.tokens(llama.prompts[0], "new", NEW_TOKENS) == llama.expected["n8"][0]
    again = call(server, "/v1/load_lora_adapter", body)
    assert again[0] == 400
    assert "already loaded" in again[1]["error"]["message"]
    assert again[1]["error"].keys() == {"message", "type", "param", "code"}
    done = call(server, "/v1/unload_lora_adapter", {"lora_name": "new", "lora_int_id": 1})
    assert done == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert "new" not in adapters(server)
    assert call(server, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404


def test_an_adapter_can_be_unloaded_whatever_its_requests_came_to(server: Server, llama: Case) -> None:
    """Several answers to one prompt, prompts that are refused, and a client that goes away."""
    assert (
        call(server, "/v1/load_lora_adapter", {"lora_name": "used", "lora_path": str(llama.adapters["n8"])})[0] == 200
    )
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="used", prompt=llama.prompts[0], n=3, max_tokens=4, temperature=0)
        assert len({choice.text for choice in answer.choices}) == 1
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="used", prompt=[1] * 100_000, max_tokens=4)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="used", prompt=[llama.prompts[0], [1] * 100_000], n=2, max_tokens=4)
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="used", prompt=llama.prompts[0], max_tokens=400, timeout=0.2)
    assert call(server, "/v1/unload_lora_adapter", {"lora_name": "used"})[0] == 200
    assert "used" not in adapters(server)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lora_name": "x", "lora_path": "/nowhere"}, "no folder"),
        ({"lora_name": "", "lora_path": "/nowhere"}, "a name that is empty"),
        ({"lora_name": "x", "lora_path": ""}, "is no path"),
        ({"lora_name": "x", "lora_path": "/nowhere", "load_inplace": True}, "/nowhere"),
    ],
)
def test_refused_loads_have_openai_error_bodies_and_take_nothing(server: Server, body: dict, message: str) -> None:
    status, answer = call(server, "/v1/load_lora_adapter", body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(adapters(server)) == set(LOADED)


def test_admin_key_protects_what_changes_something(server: Server, llama: Case) -> None:
    load = {"lora_name": "x", "lora_path": str(llama.adapters["n8"])}
    for path, body in (
        ("/v1/load_lora_adapter", load),
        ("/load_lora_adapter", load),
        ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
        ("/adapters/sql/pin", {}),
        ("/adapters/sql/unpin", {}),
    ):
        for key in (None, "wrong"):
            assert call(server, path, body, key=key)[0] == 401, path
    assert call(server, "/adapters", key=None)[0] == 200
    assert set(adapters(server)) == set(LOADED)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_no_key_is_told(server: Server, path: str) -> None:
    """SGLang's own tells the admin key to everybody who may generate."""
    status, answer = call(server, path, key=None)
    assert (status, answer["served_model_name"]) == (200, "llama")
    assert f"--admin-api-key {HIDDEN}" in answer["launch_command"]
    assert answer["admin_api_key"] == HIDDEN
    assert ADMIN_KEY not in json.dumps(answer)


def test_pinned_adapters_stay_and_at_most_half_of_the_memory_can_be_pinned(
    server: Server, llama: Case, tmp_path: Path
) -> None:
    for name in ("nobody", "some/body", "some%2Fbody"):
        status, answer = call(server, f"/adapters/{name}/pin", {})
        assert (status, "Adapters: legal, sql, support." in answer["error"]["message"]) == (404, True)
    assert call(server, "/adapters/sql/pin", {}) == (200, {"name": "sql", "pinned": True})
    copies = [f"copy{i}" for i in range(8)]
    try:
        server.tokens(llama.prompts[0], "sql", 2)
        for i, name in enumerate(copies):
            shutil.copytree(llama.adapters["n8"], tmp_path / name)
            config = tmp_path / name / "adapter_config.json"
            config.write_text(
                json.dumps(json.loads(config.read_text()) | {"lora_alpha": i + 1})
            )  # equal bytes are shared
            assert (
                call(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path / name)})[0] == 200
            )
        for name in copies:
            server.tokens(llama.prompts[0], name, 2)
        found = adapters(server)
        assert {one["tier"] for one in found.values()} == {"resident", "host"}, "the copies should not all fit"
        assert found["sql"]["tier"] == "resident"
        assert found["sql"]["pinned"]
        assert sum(one["evictions"] for one in found.values()) > 0
        answers = {name: call(server, f"/adapters/{name}/pin", {}) for name in copies}
        refused = [name for name, (status, _) in answers.items() if status == 400]
        assert refused
        assert "at most half" in answers[refused[0]][1]["error"]["message"]
        assert adapters(server)[refused[0]]["last_error"] is None, "nothing is wrong with it"
        assert not adapters(server)[refused[0]]["pinned"]
    finally:
        for name in copies:
            call(server, "/v1/unload_lora_adapter", {"lora_name": name})
    assert call(server, "/adapters/sql/unpin", {}) == (200, {"name": "sql", "pinned": False})
    assert not adapters(server)["sql"]["pinned"]


# Each of these ended the server (at TP 1), or was answered with nonsense (at TP 2), before it was refused.
ENDINGS: dict[str, dict[str, Any]] = {
    "an id beyond the vocabulary": {"input_ids": [5, 10**6]},
    "a negative id": {"input_ids": [-1]},
    "in a batch": {"input_ids": [[5], [10**6]]},
    "stop_token_ids": {"sampling_params": {"stop_token_ids": [10**6], "min_new_tokens": 2}},
    "half a token": {"sampling_params": {"max_new_tokens": 2.5}},
    "logit_bias": {"sampling_params": {"logit_bias": {"5": "x"}}},
    "half a beam": {"sampling_params": {"beam_width": 2.5}},
    "top_k": {"sampling_params": {"top_k": 2**40, "temperature": 1}},
    "top_logprobs_num": {"return_logprob": True, "top_logprobs_num": 10**6},
    "logprob_start_len": {"return_logprob": True, "logprob_start_len": -7},
}


@pytest.mark.parametrize("name", ENDINGS)
def test_no_request_ends_the_server(server: Server, llama: Case, name: str) -> None:
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 4}} | ENDINGS[name]
    for adapter in (None, "sql"):
        assert call(server, "/generate", body | {"lora_path": adapter})[0] == 400
        assert server.tokens(llama.prompts[0], adapter, NEW_TOKENS) == llama.expected[adapter and NAMES[adapter]][0]


def test_a_session_that_is_replaced_does_not_end_the_server(server: Server) -> None:
    """SGLang's first turn as its own examples write it, and again."""
    session = call(server, "/open_session", {"capacity_of_str_len": 100})[1].strip('"')
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}
    body |= {"session_params": {"id": session, "rid": None, "offset": -1, "replace": True}}
    for _ in range(3):
        assert call(server, "/generate", body)[0] == 200
    assert call(server, "/close_session", {"session_id": session})[0] == 200


def series(server: Server, prefix: str) -> dict[tuple[str, tuple], float]:
    """Samples of ``/metrics`` by name and sorted labels, read by prometheus_client's own parser."""
    text = call(server, "/metrics", key=None)[1]
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(prefix)
    }


def test_metrics_count_per_adapter(server: Server, llama: Case) -> None:
    def value(found: dict, name: str, adapter: str, **labels: str) -> float:
        key = (f"sglang_blocklora:{name}", tuple(sorted({"adapter": adapter, **labels}.items())))
        return found.get(key, 0.0)

    before = series(server, "sglang_blocklora:")
    prompt = [7] * 40
    for adapter in ("support", "support", None):
        server.tokens(prompt, adapter, 3)
    after = series(server, "sglang_blocklora:")
    for adapter, count in (("support", 2), ("(base)", 1)):
        gained = {
            name: value(after, name, adapter) - value(before, name, adapter)
            for name in (
                "adapter_requests_total",
                "adapter_prompt_tokens_total",
                "adapter_generation_tokens_total",
                "adapter_time_to_first_token_seconds_count",
                "adapter_prefix_hit_tokens_total",
            )
        }
        hits = gained.pop("adapter_prefix_hit_tokens_total")
        assert gained == {
            "adapter_requests_total": count,
            "adapter_prompt_tokens_total": 40 * count,
            "adapter_generation_tokens_total": 3 * count,
            "adapter_time_to_first_token_seconds_count": count,
        }
        assert hits == (39 if adapter == "support" else 0)  # the second request finds the first one's prompt
    facts = adapters(server)["support"]
    assert value(after, "adapter_loads_total", "support") == facts["loads"]
    assert value(after, "adapter_load_seconds_total", "support") == pytest.approx(facts["load_seconds"])
    assert value(after, "adapter_evictions_total", "support") == facts["evictions"]
    assert after["sglang_blocklora:adapter_slots", (("kind", "adapter"), ("owner", "support"))] == facts["slots"]


def lora_requests_info(server: Server) -> tuple[float, int, list[str], list[str]]:
    """As the gateway's endpoint picker reads it: the sample with the newest value; comma-separated names."""
    text = call(server, "/metrics", key=None)[1]
    pattern = re.compile(r"^vllm:lora_requests_info\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
    samples = []
    for match in pattern.finditer(text):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"]))
        assert labels.keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
        names = [[n for n in labels[f"{state}_lora_adapters"].split(",") if n] for state in ("running", "waiting")]
        samples.append((float(match["value"]), int(labels["max_lora"]), *names))
    assert "# TYPE vllm:lora_requests_info gauge" in text
    return max(samples)


def test_routers_read_running_and_waiting_adapters(server: Server, llama: Case) -> None:
    value, max_lora, running_names, waiting_names = lora_requests_info(server)
    assert abs(value - time.time()) < 60
    assert (max_lora, running_names, waiting_names) == (4, [], [])
    # Six long requests on four places: two adapters run and somebody waits.
    requests = [(llama.prompts[0], LOADED[i % 3]) for i in range(6)]
    thread = threading.Thread(target=server.many, args=(requests, 200))
    thread.start()
    seen_running: set[str] = set()
    seen_waiting: set[str] = set()
    while thread.is_alive():
        _, _, now_running, now_waiting = lora_requests_info(server)
        seen_running |= set(now_running)
        seen_waiting |= set(now_waiting)
    thread.join()
    assert seen_running == set(LOADED)
    assert seen_waiting <= set(LOADED)
    assert seen_waiting
    assert lora_requests_info(server)[2:] == ([], [])
