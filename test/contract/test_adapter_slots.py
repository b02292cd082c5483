"""What an adapter holds while it is resident, and how many a batch may have: on SGLang's real tree and allocator."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from blocklora_testing.real_cache import digest, new_cache
from blocklora_testing.tiers import LAYERS, WIDTH, numbered
from blocklora_testing.toy import host_only_images
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.unified_pool import KVArena, UnifiedPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model import lora_manager

POOL_TOKENS = 5000
KEYS = [f"{number:032d}" for number in range(5)]


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_resident_adapter_keeps_its_slot_numbers_and_not_the_free_list_they_came_from(page_size: int) -> None:
    """With pages of one token SGLang's allocator gives a view of its whole free list."""
    cache = new_cache(page_size, POOL_TOKENS)
    cache.know(KEYS[0], digest("a"), 48)
    reserved = cache.reserve(KEYS[0])
    cache.publish(KEYS[0], reserved)
    for slots in (reserved, cache.slots_of(KEYS[0])):
        assert slots.untyped_storage().nbytes() == 48 * 8


def pool_of(adapters: int) -> UnifiedPool:
    """A pool of so many adapters a batch, one more than that in it."""
    pool = UnifiedPool(adapters, host_only_images(), DecisionLog(None, 0))
    buffers = [torch.empty(POOL_TOKENS + 1, 1, WIDTH) for _ in range(2 * LAYERS)]
    pool.bind_arena(KVArena(buffers[:LAYERS], buffers[LAYERS:]), POOL_TOKENS)
    pool.bind_cache(new_cache(1, POOL_TOKENS))
    for number, key in enumerate(KEYS[: adapters + 1]):
        pool.add(key, *numbered(number, 10))
    return pool


def test_an_adapter_unloaded_under_its_last_requests_still_counts_in_the_batch() -> None:
    """The kernels' metadata have room for so many and no more: one too many would end the server."""
    pool = pool_of(4)
    running = KEYS[:4]
    assert pool.bring_in(running)
    pool.begin_step(running)
    pool.remove(running[0])
    assert not pool.bring_in([*running, KEYS[4]]), "five adapters run at once"
    pool.begin_step(running)
    assert pool.bring_in([*running[1:], KEYS[4]]), "its requests have ended"


def test_slots_of_an_evicted_adapter_are_let_go() -> None:
    pool = pool_of(4)
    assert pool.bring_in(KEYS[:2])
    pool.begin_step(KEYS[:2])
    assert set(pool.resident) == set(KEYS[:2])
    pool.cache.reset()
    assert not pool.resident


@pytest.mark.parametrize(("chunk", "tokens"), [(2048, 2048), (-1, 16384), (None, 16384)])
def test_metadata_of_a_batch_are_made_for_the_largest_prefill_at_the_start(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, tokens: int
) -> None:
    """They used to grow while serving, at the first prefill of more than 4096 tokens."""
    schedule = SimpleNamespace(chunked_prefill_size=chunk, max_prefill_tokens=16384)
    monkeypatch.setattr(lora_manager, "get_schedule", lambda: schedule)
    assert lora_manager.most_prefill_tokens() == tokens
