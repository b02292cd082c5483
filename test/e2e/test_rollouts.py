"""Adapters that change while a real server at TP 2 serves them: faults, pauses, new base weights, and constant load."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.rollouts.rollouts import SMALL, rollouts
from blocklora_testing.rollouts.trainers import as_one_file, broken
from blocklora_testing.server import Server, running

LONG = 160  # tokens of a request that is still under way when something happens to its adapter


@pytest.fixture(scope="module")
def llama(case) -> Case:
    return case("llama", 2)


@pytest.fixture(scope="module")
def server(llama: Case, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    # Memory for one adapter's image: what is put out comes again from the spool.
    flags = ["--tp", "2", "--served-model-name", "tiny", "--adapter-host-memory-gb", "0.0002"]
    flags += ["--adapter-spool-dir", str(folder), "--max-loaded-loras", "3", "--lora-paths"]
    flags += [f"start={llama.adapters['n4']}"]
    debug = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}
    with running(llama.model, *flags, log=folder / "log", environment=debug, warm=True) as server:
        yield server
    until(lambda: [path.name for path in folder.iterdir()] == ["log"])  # the spool goes with the server


def ask(server: Server, llama: Case, name: str, tokens: int = NEW_TOKENS) -> tuple[list[int], str]:
    """Greedy tokens for the second prompt, and the version that gave them."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": llama.prompts[1], "lora_path": name, "sampling_params": params}
    status, answer = server.call("/generate", body)
    assert status == 200, answer
    return answer["output_ids"], answer["meta_info"]["adapter_version"]


def expected(llama: Case, contents: str) -> list[int]:
    return llama.expected[contents][1]


def listed(server: Server, name: str) -> dict[str, Any]:
    return next(one for one in server.call("/adapters")[1]["data"] if one["name"] == name)


def bytes_of(llama: Case, contents: str) -> bytes:
    return as_one_file(llama.adapters[contents])


def under_way(server: Server, llama: Case, pool: ThreadPoolExecutor, name: str) -> Any:
    """A long request that runs."""
    answer = pool.submit(ask, server, llama, name, LONG)
    until(lambda: listed(server, name)["running"] == 1)
    return answer


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def name(server: Server, llama: Case) -> Iterator[str]:
    """An adapter that came as tensors, and of which nothing is left afterwards."""
    assert server.put("policy", bytes_of(llama, "n2"))[0] == 200
    yield "policy"
    assert server.call("/unload_lora_adapter", {"lora_name": "policy"})[0] == 200
    (spool,) = (path for path in server.log.parent.iterdir() if path.name != "log")
    until(lambda: not list(spool.iterdir()))


def test_versions_of_adapters_given_at_the_start_are_told(server: Server, llama: Case) -> None:
    tokens, version = ask(server, llama, "start")
    assert (tokens, version) == (expected(llama, "n4"), listed(server, "start")["version"])
    assert listed(server, "start")["content_hash"].startswith(version)


def test_an_update_under_way(server: Server, llama: Case, name: str) -> None:
    """A request that runs keeps its weights to the end; the next one has the new ones; what is cached stays apart."""
    before = ask(server, llama, name)
    with ThreadPoolExecutor() as pool:
        running_on = under_way(server, llama, pool, name)
        status, answer = server.put(name, bytes_of(llama, "n3"))
        assert status == 200
        shown = listed(server, name)
        assert (shown["version"], [one["version"] for one in shown["draining"]]) == (
            answer["adapter_version"],
            [before[1]],
        )
        assert ask(server, llama, name) == (expected(llama, "n3"), answer["adapter_version"])
        tokens, version = running_on.result()
    assert (tokens[:NEW_TOKENS], version) == (expected(llama, "n2"), before[1])
    until(lambda: listed(server, name)["draining"] == [])
    server.put(name, bytes_of(llama, "n2"))
    assert ask(server, llama, name) == before


def test_the_same_bytes_keep_their_kv(server: Server, llama: Case, name: str) -> None:
    ask(server, llama, name)
    lora_id = listed(server, name)["lora_id"]
    assert server.put(name, bytes_of(llama, "n2"))[0] == 200
    params = {"temperature": 0, "max_new_tokens": 1}
    body = {"input_ids": llama.prompts[1], "lora_path": name, "sampling_params": params}
    answer = server.call("/generate", body)[1]
    assert answer["meta_info"]["cached_tokens"] == len(llama.prompts[1]) - 1
    assert listed(server, name)["lora_id"] == lora_id


@pytest.mark.parametrize("how", ["cut", "nan", "shapes", "no config", "unknown key"])
def test_what_is_refused_changes_nothing(server: Server, llama: Case, name: str, how: str) -> None:
    """``nan`` is in the part of one TP rank only."""
    before = ask(server, llama, name)
    if how == "unknown key":
        config = json.loads((llama.adapters["n3"] / "adapter_config.json").read_text()) | {"use_dora": True}
        tensors = safetensors.torch.load_file(llama.adapters["n3"] / "adapter_model.safetensors")
        data = safetensors.torch.save(tensors, {"adapter_config": json.dumps(config)})
    else:
        data = broken(llama.adapters["n3"], how)
    status, answer = server.put(name, data)
    assert (status, "adapter 'policy'" in answer["error"]["message"]) == (400, True), answer
    assert ask(server, llama, name) == before
    assert listed(server, name)["draining"] == []


def test_updates_at_once_and_an_unload_between_them(server: Server, llama: Case, name: str) -> None:
    with ThreadPoolExecutor() as pool:
        for _ in range(5):
            contents = ["n3", "n8", "plain"]
            answers = [*pool.map(lambda one: server.put(name, bytes_of(llama, one)), contents)]
            assert [status for status, _ in answers] == [200] * 3
            tokens, version = ask(server, llama, name)
            (last,) = {
                one for one, (_, answer) in zip(contents, answers, strict=True) if answer["adapter_version"] == version
            }
            assert tokens == expected(llama, last)
        unload = pool.submit(server.call, "/unload_lora_adapter", {"lora_name": name})
        update = pool.submit(server.put, name, bytes_of(llama, "n1"))
        assert (unload.result()[0], update.result()[0]) == (200, 200)
    server.put(name, bytes_of(llama, "n1"))
    assert ask(server, llama, name)[0] == expected(llama, "n1")


def test_what_came_as_tensors_survives_eviction_and_the_limit_of_names(server: Server, llama: Case, name: str) -> None:
    before = ask(server, llama, name)
    for other in ("n8", "plain", "n3"):  # host memory holds one image, and three adapters have a name
        body = {"lora_name": other, "lora_path": str(llama.adapters[other])}
        assert server.call("/load_lora_adapter", body)[0] == 200
        assert ask(server, llama, other)[0] == expected(llama, other)
    assert server.call("/flush_cache", {})[0] == 200
    assert ask(server, llama, name) == before
    for other in ("n8", "plain", "n3"):
        server.call("/unload_lora_adapter", {"lora_name": other})


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_pause_update_continue(server: Server, llama: Case, name: str, mode: str) -> None:
    old = ask(server, llama, name)[1]
    with ThreadPoolExecutor() as pool:
        running_on = under_way(server, llama, pool, name)
        assert server.call("/pause_generation", {"mode": mode})[0] == 200
        waiting = pool.submit(ask, server, llama, name)
        status, answer = server.put(name, bytes_of(llama, "n8"))
        assert status == 200
        assert server.call("/continue_generation", {})[0] == 200
        tokens, version = running_on.result()
        assert version == old
        assert tokens[:NEW_TOKENS] == expected(llama, "n2")[: len(tokens)]
        assert len(tokens) == LONG or mode == "abort"
        assert waiting.result() == (expected(llama, "n8"), answer["adapter_version"])


@pytest.mark.parametrize("first", ["in_place", "retract", "abort"])
@pytest.mark.parametrize("second", ["in_place", "retract", "abort"])
def test_no_order_of_calls_locks_up(server: Server, llama: Case, name: str, first: str, second: str) -> None:
    with ThreadPoolExecutor() as pool:
        running_on = under_way(server, llama, pool, name)
        for mode in (first, second):
            assert server.call("/pause_generation", {"mode": mode}, timeout=60)[0] == 200
        unload = pool.submit(server.call, "/unload_lora_adapter", {"lora_name": name}, 60)
        update = pool.submit(server.put, name, bytes_of(llama, "n3"))
        assert (unload.result()[0], update.result()[0]) == (200, 200)
        assert server.call("/continue_generation", {}, timeout=60)[0] == 200
        running_on.result()
    server.put(name, bytes_of(llama, "n3"))
    assert ask(server, llama, name)[0] == expected(llama, "n3")


def test_new_base_weights_drop_the_kv_that_became_wrong(server: Server, llama: Case, name: str, tmp_path: Path) -> None:
    from blocklora_testing.models import build_model, peft_tokens

    other = build_model(tmp_path / "other", "llama", kv_heads=2, seed=9)
    fresh = peft_tokens(other, {"n2": llama.adapters["n2"]}, llama.prompts, NEW_TOKENS)
    assert fresh["n2"][1] != expected(llama, "n2")
    assert server.tokens(llama.prompts[1], None, NEW_TOKENS) == llama.expected[None][1]
    before = ask(server, llama, name)
    assert before[0] == expected(llama, "n2")
    try:
        for mode in (None, "retract"):
            for folder, answers in ((other, fresh), (llama.model, llama.expected)):
                if mode is not None:
                    server.call("/pause_generation", {"mode": mode})
                status, answer = server.call("/update_weights_from_disk", {"model_path": str(folder)})
                assert (status, answer["success"]) == (200, True), answer
                if mode is not None:
                    server.call("/continue_generation", {})
                assert ask(server, llama, name) == (answers["n2"][1], before[1]), "its own weights are as before"
                assert server.tokens(llama.prompts[1], None, NEW_TOKENS) == answers[None][1]
    finally:
        server.call("/update_weights_from_disk", {"model_path": str(llama.model)})


def test_a_client_that_goes_away_half_way(server: Server, llama: Case, name: str) -> None:
    before, data = ask(server, llama, name), bytes_of(llama, "n3")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"PUT /adapters/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data[: len(data) // 2])
        time.sleep(0.3)
    (spool,) = (path for path in server.log.parent.iterdir() if path.name != "log")
    until(lambda: len(list(spool.iterdir())) == 1)
    assert ask(server, llama, name) == before


def test_an_update_does_not_hold_up_others(server: Server, llama: Case, name: str) -> None:
    """Requests of another adapter go on while updates are prepared: all end, and rightly."""
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:

        def others() -> int:
            count = 0
            while not stop.is_set():
                assert ask(server, llama, "start")[0] == expected(llama, "n4")
                count += 1
            return count

        asking = pool.submit(others)
        for contents in ("n3", "n8", "n1", "n2") * 3:
            assert server.put(name, bytes_of(llama, contents))[0] == 200
            assert ask(server, llama, name)[0] == expected(llama, contents)
        stop.set()
        assert asking.result() > 0


@pytest.mark.matrix
def test_constant_load(tmp_path: Path) -> None:
    """``make rollouts-test`` with smaller numbers."""
    result = rollouts(tmp_path, SMALL, seed=1)
    assert result.tally.problems == []
    assert [f"{check.name}: {check.found}" for check in result.checks if not check.held] == []
    right = {kind for kind, row in result.tally.rows.items() if row.right}
    assert {"generate", "stream", "batch", "completions", "demand", "update: put", "update: json"} <= right
