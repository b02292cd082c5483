"""Two data parallel replicas: adapters come and go on both, and an adapter's requests go to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.server import Server, running

LOADED = ("plain", "n1", "n2", "n3", "n4", "mixed")


@pytest.fixture(scope="module")
def llama(case) -> Case:
    return case("llama", 4)


@pytest.fixture(scope="module")
def server(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--dp-size", "2", "--max-running-requests", "32"]
    flags += ["--lora-paths", *(f"{name}={llama.adapters[name]}" for name in LOADED)]
    with running(llama.model, *flags, log=log) as server:
        yield server


def ask(server: Server, prompt: list[int], adapter: str | None, new_tokens: int, **options: Any) -> tuple[list, int]:
    """Tokens, and the replica that made them."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling, **options}
    status, answer = server.call("/generate", body)
    assert status == 200, answer
    return answer["output_ids"], answer["meta_info"]["dp_rank"]


def test_tokens_are_right_and_an_adapter_stays_on_one_replica(server: Server, llama: Case) -> None:
    asked = [(i, name) for i in range(len(llama.prompts)) for name in (*LOADED, None)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: ask(server, llama.prompts[one[0]], one[1], NEW_TOKENS), asked * 2))
    assert [tokens for tokens, _ in found] == [llama.expected[name][i] for i, name in asked * 2]
    replicas = {name: set() for name in LOADED}
    for _ in range(3):
        for name in LOADED:
            replicas[name].add(ask(server, llama.prompts[0], name, 1)[1])
    assert all(len(used) == 1 for used in replicas.values())
    assert set.union(*replicas.values()) == {0, 1}


def test_a_flood_for_one_adapter_spreads_within_the_bound(server: Server, llama: Case) -> None:
    """24 requests at once: at most ceil(5/4 * 24 / 2) = 15 on a replica. They are long, so that none ends before."""
    with ThreadPoolExecutor(24) as pool:
        used = Counter(replica for _, replica in pool.map(lambda _: ask(server, [1, 2], "n2", 600), range(24)))
    assert used.keys() == {0, 1}
    assert max(used.values()) <= 15


def test_adapters_come_and_go_on_both_replicas(server: Server, llama: Case) -> None:
    load = {"lora_name": "new", "lora_path": str(llama.adapters["n8"])}
    assert server.call("/v1/load_lora_adapter", load | {"lora_path": "/nowhere"})[0] == 400
    # The second time the same bytes are still in both replicas' caches.
    for path, loads in (("/v1/load_lora_adapter", 2), ("/load_lora_adapter", 0)):
        assert server.call(path, load)[0] == 200
        assert server.call(path, load)[0] == 400
        for replica in (0, 1):
            found = ask(server, llama.prompts[1], "new", NEW_TOKENS, routed_dp_rank=replica)
            assert found == (llama.expected["n8"][1], replica)
        assert server.call("/adapters/new/pin", {})[0] == 200
        (facts,) = [one for one in server.call("/adapters")[1]["data"] if one["name"] == "new"]
        assert (facts["tier"], facts["loads"], facts["pinned"]) == ("resident", loads, True)
        assert server.call("/unload_lora_adapter", {"lora_name": "new"})[0] == 200
        assert server.call("/generate", {"text": "x", "lora_path": "new"})[0] == 400
    assert server.call("/unload_lora_adapter", {"lora_name": "new"})[0] == 400
