"""The recipes for several nodes have their APIs' forms, and every node is started as one of the same server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from sglang_blocklora import launch_server

from benchmark.record import REPOSITORY

SCHEMAS = yaml.safe_load((REPOSITORY / "test/unit/deploy_schemas.yaml").read_text())
NODES = 2
# What the controller tells each pod of a group.
LWS = {"LWS_GROUP_SIZE": str(NODES), "LWS_LEADER_ADDRESS": "llama-0.llama"}


def parts(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a recipe by their kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((REPOSITORY / "deploy" / name).read_text())}


def check(document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMAS[document["kind"]] | {"$defs": SCHEMAS["$defs"]})


@pytest.mark.parametrize("name", ["lws/server.yaml", "ray/server.yaml"])
def test_recipes_have_the_form_of_their_apis(name: str) -> None:
    documents = parts(name)
    assert len(documents) == 3
    for document in documents.values():
        check(document)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("LeaderWorkerSet", {"size": 2}), ("LeaderWorkerSet", {"replicas": "2"}), ("RayJob", {"entryPoint": "python3"})],
)
def test_a_field_that_the_api_does_not_have_is_found(kind: str, wrong: dict[str, Any]) -> None:
    document = parts("lws/server.yaml" if kind == "LeaderWorkerSet" else "ray/server.yaml")[kind]
    document["spec"] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def launcher_flags(arguments: list[str], shared: Path) -> dict[str, str]:
    """Flags of a launcher's command, which our own parser takes; ``shared`` lies where the volume does."""
    given = [one.replace("=/shared", f"={shared}") for one in arguments]
    settings, rest = launch_server.parse(given)
    assert {settings.adapter_dirs[0], settings.adapter_spool_dir, settings.adapter_cache_dir} == {
        f"{shared}/{name}" for name in ("adapters", "spool", "cache")
    }
    pairs = [one.removeprefix("--").partition("=") for one in rest if "=" in one]
    return {name: value for name, _, value in pairs}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    for name in ("adapters", "spool", "cache"):
        (tmp_path / name).mkdir()
    return tmp_path.resolve()


def check_pod(pod: dict[str, Any], claim: dict[str, Any], flags: dict[str, str]) -> None:
    """A pod has the GPUs of a node and what all nodes must see, on a volume that several may write."""
    (container,) = pod["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) * NODES == int(flags["tp"])
    assert int(flags["port"]) in [one["containerPort"] for one in container["ports"]]
    (volume,) = [one for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts[volume["name"]] == "/shared"
    assert mounts.keys() == {one["name"] for one in pod["spec"]["volumes"]}


def test_a_group_of_pods_is_one_server(shared: Path) -> None:
    documents = parts("lws/server.yaml")
    template = documents["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert template["size"] == NODES
    assert "leaderTemplate" not in template, "the leader's is the workers'"
    pod = template["workerTemplate"]
    command = pod["spec"]["containers"][0]["command"]
    assert command[:3] == ["python3", "-m", "sglang_blocklora.launch_server"]
    ranks = []
    for rank in range(NODES):
        told = command[3:]
        for name, value in (LWS | {"LWS_WORKER_INDEX": str(rank)}).items():
            told = [text.replace(f"$({name})", value) for text in told]
        assert not [text for text in told if "$(LWS" in text]
        flags = launcher_flags(told, shared)
        ranks.append(flags.pop("node-rank"))
        assert (flags["nnodes"], flags["dist-init-addr"]) == (str(NODES), "llama-0.llama:20000")
    assert ranks == ["0", "1"]
    check_pod(pod, documents["PersistentVolumeClaim"], flags)
    service = documents["Service"]["spec"]
    assert service["selector"] == {
        "leaderworkerset.sigs.k8s.io/name": documents["LeaderWorkerSet"]["metadata"]["name"],
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }
    assert [one["targetPort"] for one in service["ports"]] == [int(flags["port"])]


def test_a_ray_cluster_is_one_server(shared: Path) -> None:
    documents = parts("ray/server.yaml")
    spec = documents["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == NODES - 1
    assert workers["template"] == cluster["headGroupSpec"]["template"]
    script, *arguments = shlex.split(spec["entrypoint"])[1:]
    own, launcher = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    assert own == ["--nodes", str(NODES), "--gpus", "8"]
    flags = launcher_flags(launcher, shared)
    assert not {"nnodes", "node-rank", "dist-init-addr"} & flags.keys(), "the script gives them"
    check_pod(workers["template"], documents["PersistentVolumeClaim"], flags)
    mounts = {one["name"]: one["mountPath"] for one in workers["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert script == f"{mounts['serve']}/serve.py"
    assert (REPOSITORY / "deploy/ray/serve.py").exists()
    selector = documents["Service"]["spec"]["selector"]
    assert selector == workers["template"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
