"""In static memory KV is filed under contents: what SGLang stores outlives the server, and adapters of its name."""

from __future__ import annotations

import warnings
from array import array
from types import SimpleNamespace

from sglang_blocklora.memory.static_pool import StaticPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.scheduler import request
    from blocklora_patches.scheduler.activation import activate
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

PAGE = 16
TOKENS = array("q", range(3 * PAGE))
NAMED = LoRARef.deterministic_id("sql", "/adapters/sql")  # of --lora-paths: the same after each restart


def pages(lora_id: str | None, contents: str, own_extra: str = "", invocation: tuple[int, ...] = ()) -> list[str]:
    """Under what SGLang stores the pages of a request's KV."""
    adapter = SimpleNamespace(content_hash=contents, shard=SimpleNamespace(invocation=invocation))
    pool = SimpleNamespace(loaded={lora_id: adapter})
    pool.kv_owner = lambda key: StaticPool.kv_owner(pool, key)
    runner = SimpleNamespace(lora_manager=SimpleNamespace(pool=pool))
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    # As SGLang makes a request: the client's extra key, then the id.
    req = SimpleNamespace(lora_id=lora_id, extra_key=f"{own_extra}{lora_id or ''}" or None, origin_input_ids=TOKENS)
    req.customized_info = None
    request._init(None, req)
    for _ in range(2):  # when it comes, and when it comes back
        activate(scheduler, req)
    return get_storage_hash_str(RadixKey(TOKENS, req.extra_key), page_size=PAGE)


def test_the_same_contents_find_their_kv_and_others_do_not() -> None:
    assert pages(NAMED, "a") == pages(NAMED, "a") == pages("of another load", "a")
    others = [
        pages(NAMED, "b"),
        pages(NAMED, "a", own_extra="tenant"),
        pages(NAMED, "a", invocation=(5, 6)),
        pages(NAMED, "a", invocation=(6, 7)),
        pages(None, "", own_extra="a"),
        pages(None, ""),
    ]
    found = [page for one in [pages(NAMED, "a"), *others] for page in one]
    assert len(found) == len(set(found)) == 7 * len(TOKENS) // PAGE


def test_the_base_models_kv_is_stored_as_upstreams() -> None:
    assert pages(None, "") == get_storage_hash_str(RadixKey(TOKENS, None), page_size=PAGE)
