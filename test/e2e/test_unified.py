"""Unified memory on a real server at TP 2: many more adapters than fit, in the KV cache's own slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from blocklora_testing.server import Server, running, same_decisions
from blocklora_testing.upstream import KV_BEYOND_ANSWER

ADAPTERS = 40
NEW_TOKENS = 8
POOL_TOKENS = 4096  # about six adapters of some 500 slots each, and KV
MOVING = ("a0", "a3")  # adapters whose contents come and go under a second name too


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40 adapters, prompts with a shared beginning, and what PEFT answers: ``expected[adapter][prompt index]``."""
    folder = tmp_path_factory.mktemp("unified")
    model = build_model(folder / "model", "llama")
    choices = {f"a{i}": AdapterChoice([None, 1, 2, 4][i % 4], rank=4) for i in range(ADAPTERS)}
    adapters = build_adapters(model, folder / "adapters", choices)
    generator = torch.Generator().manual_seed(7)
    shared = torch.randint(0, VOCAB, (48,), generator=generator).tolist()
    prompts = [shared + torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 9, 17)]
    return model, adapters, prompts, peft_tokens(model, adapters, prompts, NEW_TOKENS)


@pytest.fixture(scope="module")
def server(many, tmp_path_factory) -> Iterator[Server]:
    model, adapters, _, _ = many
    folder = tmp_path_factory.mktemp("unified-server")
    flags = ["--tp", "2", "--adapter-memory", "unified", "--max-total-tokens", str(POOL_TOKENS)]
    flags += [
        "--adapter-eviction",
        "cost-aware",
        "--adapter-decision-log",
        str(folder / "decisions"),
        "--max-running-requests",
        "16",
    ]
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
    debug = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}  # whenever idle, every slot has exactly one owner
    with running(model, *flags, *paths, log=folder / "log", environment=debug, warm=True) as server:
        yield server
    first = same_decisions(folder / "decisions")
    assert first.count('"load"') > ADAPTERS, "nothing was evicted and loaded again: the pool is too large for this test"


def requests(many, rounds: int, seed: int) -> list[tuple[list[int], str | None]]:
    """A popular head and a long tail: adapter index = floor(n * u^3); every tenth request is the base model's."""
    _, adapters, prompts, _ = many
    generator = torch.Generator().manual_seed(seed)
    names = list(adapters)
    chosen = (torch.rand(rounds, generator=generator) ** 3 * len(names)).long().tolist()
    return [(prompts[i % len(prompts)], None if i % 10 == 9 else names[index]) for i, index in enumerate(chosen)]


def check(server: Server, many, asked: list[tuple[list[int], str | None]]) -> None:
    _, _, prompts, expected = many
    for start in range(0, len(asked), 25):
        batch = asked[start : start + 25]
        found = server.many(batch, NEW_TOKENS)
        assert found == [expected[name][prompts.index(prompt)] for prompt, name in batch]


def test_400_requests_over_40_adapters_in_a_pool_for_6(server: Server, many) -> None:
    check(server, many, requests(many, 400, seed=1))


def test_the_same_while_adapters_are_unloaded_and_loaded_again(server: Server, many) -> None:
    _, adapters, prompts, expected = many
    failures: list[object] = []
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            for source in MOVING:
                load = {"lora_name": "moving", "lora_path": str(adapters[source])}
                steps = [("load", server.call("/load_lora_adapter", load)[0])]
                found = server.tokens(prompts[0], "moving", NEW_TOKENS)
                steps.append(("tokens", 200 if found == expected[source][0] else found))
                steps.append(("unload", server.call("/unload_lora_adapter", {"lora_name": "moving"})[0]))
                failures.extend(step for step in steps if step[1] != 200)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        check(server, many, requests(many, 100, seed=2))
    finally:
        done.set()
        thread.join()
    assert not failures


def test_salts_separate_kv_but_share_weights(server: Server, many) -> None:
    """The same prompt under two salts and without one: right tokens, and no KV of the other."""
    _, _, prompts, expected = many

    def ask(salt: str | None) -> int:
        body = {
            "input_ids": prompts[2],
            "lora_path": "a1",
            "cache_salt": salt,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        status, answer = server.call("/generate", body)
        assert status == 200, answer
        assert answer["output_ids"] == expected["a1"][2]
        return answer["meta_info"]["cached_tokens"]

    assert ask("one") == 0
    assert ask("one") > 0
    assert ask("two") == 0


def test_flush_drops_adapters_too_and_they_come_back(server: Server, many) -> None:
    _, _, prompts, expected = many
    assert server.call("/flush_cache", {})[0] == 200
    for name in ("a2", "a2", None):
        assert server.tokens(prompts[1], name, NEW_TOKENS) == expected[name][1]


def test_slots_are_reported_by_owner(server: Server, many) -> None:
    """Flushed and then used by two: whoever has slots is named, and all add up to the pool."""
    _, adapters, prompts, expected = many
    assert server.call("/flush_cache", {})[0] == 200
    for name in ("a5", "a5", None):
        assert server.tokens(prompts[0], name, NEW_TOKENS) == expected[name][0]
    answer = server.call("/adapters?limit=1000")[1]
    slots, listed = answer["slots"], {one["name"]: one for one in answer["data"]}
    assert slots["total"] == POOL_TOKENS
    assert slots["free"] + slots["in_use"] + slots["adapter"] + slots["kv"] == POOL_TOKENS
    tokens = len(prompts[0]) + NEW_TOKENS - 1 + KV_BEYOND_ANSWER
    assert slots["owners"] == {
        "a5": {"adapter": listed["a5"]["slots"], "kv": tokens},
        "(base)": {"adapter": 0, "kv": tokens},
    }
    assert (slots["in_use"], slots["invalid_kv_share"]) == (0, 0)
    assert sum(one["tier"] == "resident" for one in listed.values()) == 1
    # Names with the same contents share slots: a load counts for the one that asked, an eviction for all of them.
    alone = {name: one for name, one in listed.items() if name not in MOVING}
    assert all(one["loads"] - one["evictions"] == (name == "a5") for name, one in alone.items())
    assert sum(one["hits"] for one in listed.values()) > ADAPTERS
    assert adapters.keys() == listed.keys()
