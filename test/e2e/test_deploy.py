"""What routers read and call, on a real server: all that ``deploy/`` names is there, with its labels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from blocklora_testing.case import ADMIN_KEY, NEW_TOKENS, Case
from blocklora_testing.server import Server
from prometheus_client.parser import text_string_to_metric_families

from benchmark.record import REPOSITORY


@pytest.fixture
def pinned(api_server: Server, api_case: Case) -> Iterator[str]:
    """An adapter that is pinned and resident, while the test runs."""
    assert api_server.tokens(api_case.prompts[0], "sql", NEW_TOKENS)
    assert api_server.call("/adapters/sql/pin", {}, key=ADMIN_KEY)[0] == 200
    yield "sql"
    assert api_server.call("/adapters/sql/unpin", {}, key=ADMIN_KEY)[0] == 200


def test_the_endpoint_picker_finds_every_series_that_it_is_told_to_read(api_server: Server, pinned: str) -> None:
    families = {one.name: one for one in text_string_to_metric_families(api_server.call("/metrics")[1])}
    config = yaml.safe_load((REPOSITORY / "deploy/llm-d/endpoint-picker.yaml").read_text())
    (extractor,) = [one for one in config["plugins"] if one["type"] == "core-metrics-extractor"]
    (engine,) = extractor["parameters"]["engineConfigs"]
    specs = {key: value for key, value in engine.items() if key.endswith("Spec")}
    assert {name for name in specs.values() if name not in families or not families[name].samples} == set()
    loaded = {one.labels["adapter_name"]: one for one in families[engine["loraLoadedSpec"]].samples}
    facts = {one["name"]: one for one in api_server.call("/adapters")[1]["data"]}
    levels = {"resident": "gpu", "host": "cpu"}
    assert {name: one.labels["level"] for name, one in loaded.items()} == {
        name: levels[one["tier"]] for name, one in facts.items() if one["tier"] in levels
    }
    assert all(one.labels["rank"] == str(facts[name]["rank"]) for name, one in loaded.items())
    assert {name for name, one in loaded.items() if one.labels["pinned"] == "true"} == {pinned}
    (count,) = families[engine["loraGPULoadedSpec"]].samples
    assert count.value == sum(one["tier"] == "resident" for one in facts.values())
    assert count.labels["model_name"] == "llama"
    seconds = families["vllm:lora_adapter_load_seconds"]
    assert seconds.type == "histogram"
    assert {one.labels["transition"] for one in seconds.samples} == {"load", "activate"}


def test_aibrix_loads_and_unloads_as_its_controller_does(api_server: Server, api_case: Case) -> None:
    def models() -> set[str]:
        return {one["id"] for one in api_server.call("/v1/models", key=ADMIN_KEY)[1]["data"]}

    body = {"lora_name": "brix", "lora_path": str(api_case.adapters["n8"])}
    assert "brix" not in models()
    assert api_server.call("/load_lora_adapter", body, key=ADMIN_KEY)[0] in (200, 201)
    assert "brix" in models()
    assert api_server.tokens(api_case.prompts[0], "brix", NEW_TOKENS) == api_case.expected["n8"][0]
    assert api_server.call("/unload_lora_adapter", {"lora_name": "brix"}, key=ADMIN_KEY)[0] == 200
    assert "brix" not in models()
