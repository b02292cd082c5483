"""What is deployed beside other projects has the form that they document."""

from __future__ import annotations

from typing import Any

import yaml
from sglang_blocklora import launch_server
from sglang_blocklora.sources.urls import is_below, located

from benchmark.record import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
# llm-d-router: parameters of core-metrics-extractor, and of pull request 2792.
ENGINE_CONFIG = {
    "name",
    "queuedRequestsSpec",
    "runningRequestsSpec",
    "kvUsageSpec",
    "loraSpec",
    "cacheInfoSpec",
    "cacheBlockSizeLabelName",
    "cacheNumBlocksLabelName",
    "cacheBlockSizeSpec",
    "cacheNumBlocksSpec",
    "loraLoadedSpec",
    "loraGPULoadedSpec",
    "loraGPUSlotsSpec",
}
RESERVED_ENGINE = "default"
# AIBrix v1alpha1: fields of a ModelAdapter, and labels that its controller looks for on pods.
MODEL_ADAPTER = {
    "baseModel",
    "podSelector",
    "artifactURL",
    "schedulerName",
    "replicas",
    "additionalConfig",
    "credentialsSecretRef",
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_endpoint_picker_reads_our_series_with_its_own_keys() -> None:
    config = read("llm-d/endpoint-picker.yaml")
    assert (config["apiVersion"], config["kind"]) == ("llm-d.ai/v1alpha1", "EndpointPickerConfig")
    plugins = {one.get("name", one["type"]): one for one in config["plugins"]}
    used = [one["pluginRef"] for profile in config["schedulingProfiles"] for one in profile["plugins"]]
    for source in config["dataLayer"]["sources"]:
        used += [source["pluginRef"], *(one["pluginRef"] for one in source["extractors"])]
    assert set(used) == set(plugins), "each plugin is referred to, and no other is"
    parameters = plugins["core-metrics-extractor"]["parameters"]
    assert parameters.keys() <= {"engineLabelKey", "defaultEngine", "engineConfigs"}
    (engine,) = parameters["engineConfigs"]
    assert engine.keys() <= ENGINE_CONFIG
    assert parameters["defaultEngine"] == engine["name"] != RESERVED_ENGINE


def test_a_model_adapter_selects_the_pods_of_its_base_and_a_url_that_they_may_fetch() -> None:
    adapter, base = read("aibrix/adapter.yaml"), read("aibrix/base.yaml")
    assert (adapter["apiVersion"], adapter["kind"]) == ("model.aibrix.ai/v1alpha1", "ModelAdapter")
    spec, pod = adapter["spec"], base["spec"]["template"]
    assert spec.keys() <= MODEL_ADAPTER
    assert spec.get("replicas") in (None, 1)
    assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert base["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["labels"]["model.aibrix.ai/engine"] == "sglang"
    (container,) = pod["spec"]["containers"]
    settings, rest = launch_server.parse(container["command"][3:])
    assert is_below(located(spec["artifactURL"]), settings.adapter_roots)
    port = str(container["ports"][0]["containerPort"])
    assert f"--port={port}" in rest
    assert adapter["metadata"]["labels"]["model.aibrix.ai/port"] == port
    served = spec["baseModel"]
    assert f"--served-model-name={served}" in rest
    assert pod["metadata"]["labels"]["model.aibrix.ai/name"] == served


def test_every_file_of_deploy_is_named_in_a_document() -> None:
    told = "".join(path.read_text() for path in (REPOSITORY / "docs").glob("*.md"))
    files = [path.relative_to(REPOSITORY).as_posix() for path in sorted(DEPLOY.rglob("*")) if path.is_file()]
    assert [name for name in files if f"`{name}`" not in told] == []
    assert len(files) >= 3
