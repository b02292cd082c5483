"""``--schedule-policy adapter-affinity`` on SGLang's real policy class and radix cache, without a server."""

from __future__ import annotations

import os
import warnings
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.settings import Settings

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.scheduler.queue_order import MATCHES_PER_STEP, AdapterAffinityPolicy, adapter_fits
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


class Pool:
    """Adapters of 1000 slots: in the arena, in host memory, on disk. None fits beside another one."""

    def __init__(self) -> None:
        self.loaded = {name: SimpleNamespace(name=name, slots=1000) for name in ("here", "there", "far")}
        self.reading: set[str] = set()
        self.images = SimpleNamespace(
            in_host_memory=lambda key: key in {"here", "there"}, is_being_read=self.reading.__contains__
        )

    def is_resident(self, key: str) -> bool:
        return key == "here"

    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None:
        return None


@pytest.fixture
def scheduler() -> SimpleNamespace:
    """What the policy asks of a scheduler, over a real radix cache."""
    allocator = TokenToKVPoolAllocator(4096, torch.float32, "cpu", None, False)
    requests = ReqToTokenPool(size=8, max_context_len=64, device="cpu", enable_memory_saver=False)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=requests,
        token_to_kv_pool_allocator=allocator,
        page_size=1,
        tree_components=(ComponentType.FULL,),
    )
    manager = SimpleNamespace(pool=Pool(), decisions=DecisionLog(None, 0))
    made = SimpleNamespace(
        tree_cache=UnifiedRadixCache(params),
        enable_hierarchical_cache=False,
        enable_priority_scheduling=False,
        schedule_low_priority_values_first=False,
        chunked_prefill_size=100_000,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
        lora_drainer=None,
    )
    made.policy = AdapterAffinityPolicy(made, Settings(adapter_max_wait_steps=2))
    return made


def request(tokens: list[int], adapter: str | None = None, priority: int | None = None) -> Any:
    return SimpleNamespace(
        rid=str(tokens),
        lora_id=adapter,
        extra_key=adapter,
        cache_salt=None,
        priority=priority,
        origin_input_ids=array("q", tokens),
        output_ids=array("q"),
        sampling_params=SimpleNamespace(max_new_tokens=8),
        session=None,
        last_node=None,
        num_matched_prefix_tokens=0,
        mamba_branching_seqlen=None,
        kv=SimpleNamespace(cache_protected_len=0),
        _compute_max_prefix_len=lambda length: length - 1,
    )


def cache(scheduler: Any, tokens: list[int]) -> None:
    slots = scheduler.tree_cache.token_to_kv_pool_allocator.alloc(len(tokens))
    scheduler.tree_cache.insert(InsertParams(key=RadixKey(array("q", tokens)), value=slots))


def test_cached_prefixes_and_resident_adapters_go_first(scheduler) -> None:
    cache(scheduler, list(range(40)))
    unlike, like = request([500, 501]), request([*range(40), 77])
    far, there, here = request([5, 6], "far"), request([1, 2], "there"), request([3, 4], "here")
    queue = [far, there, unlike, here, like]
    scheduler.policy.calc_priority(queue)
    assert queue == [like, unlike, here, there, far]
    assert like.num_matched_prefix_tokens == 40


def test_one_of_two_requests_with_the_same_new_prefix_waits(scheduler) -> None:
    """As upstream's longest-prefix policy has it: the second finds the prefix in the cache a step later."""
    shared = list(range(100, 140))
    queue = [request([*shared, 1]), request([*shared, 2]), request([7, 8])]
    first, second, other = queue
    scheduler.policy.calc_priority(queue)
    assert queue == [first, other, second]


def test_priorities_go_first_where_they_are_on(scheduler) -> None:
    scheduler.enable_priority_scheduling = True
    scheduler.policy = AdapterAffinityPolicy(scheduler, Settings())
    low, high = request([1], "here", priority=-(2**63)), request([2], "there", priority=5)
    queue = [low, high]
    scheduler.policy.calc_priority(queue)
    assert queue == [high, low]


def test_priorities_count_nothing_where_they_are_off(scheduler) -> None:
    """Upstream keeps what a client asks for all the same: nobody may jump the queue by it."""
    first, second = request([1], "here", priority=0), request([2], "here", priority=1_000_000)
    queue = [first, second]
    scheduler.policy.calc_priority(queue)
    assert queue == [first, second]


def test_lookups_of_a_step_are_bounded_and_reach_everybody(scheduler, monkeypatch) -> None:
    queue = [request([1000 + i, i]) for i in range(3 * MATCHES_PER_STEP)]
    lookups: list[int] = []
    match = scheduler.tree_cache.match_prefix
    monkeypatch.setattr(scheduler.tree_cache, "match_prefix", lambda params: lookups.append(1) or match(params))
    for _ in range(3):
        lookups.clear()
        scheduler.policy.calc_priority(queue)
        assert len(lookups) == MATCHES_PER_STEP
    assert all(req.last_node is not None for req in queue)


def test_base_requests_fit_whatever_the_adapters_say(scheduler) -> None:
    queue = [request([1]), request([2], "there")]
    base, there = queue
    scheduler.policy.calc_priority(queue)
    assert not adapter_fits(scheduler, there, {"here"}, lambda: False)
    assert adapter_fits(scheduler, base, {"here"}, lambda: False)


def test_behind_an_overdue_request_that_does_not_fit_all_wait_until_it_does(scheduler) -> None:
    there = request([1], "there")
    queue = [there]
    for i in range(2):  # the bound: each time a later request goes first
        queue.append(request([10 + i]))
        scheduler.policy.calc_priority(queue)
        queue.pop(next(j for j, req in enumerate(queue) if req is not there))
    base = request([20])
    queue.append(base)
    scheduler.policy.calc_priority(queue)
    assert queue == [there, base]
    assert not adapter_fits(scheduler, there, {"here"}, lambda: False)
    assert not adapter_fits(scheduler, base, {"here"}, lambda: True)
    scheduler.policy.calc_priority(queue)
    assert not adapter_fits(scheduler, there, set(), lambda: False), "nothing runs, so nothing will end"
    assert adapter_fits(scheduler, base, set(), lambda: True)


def test_nobody_else_waits_for_an_adapter_that_is_being_read(scheduler) -> None:
    """However overdue its requests are: a read takes as long as the storage does."""
    scheduler.tp_worker.model_runner.lora_manager.pool.reading.add("far")
    far = request([1], "far")
    queue = [far]
    for i in range(4):
        queue.append(request([10 + i]))
        scheduler.policy.calc_priority(queue)
        queue.pop(next(j for j, req in enumerate(queue) if req is not far))
        assert not adapter_fits(scheduler, far, {"here"}, lambda: False)
        assert adapter_fits(scheduler, request([30 + i]), {"here"}, lambda: True)


def test_a_server_without_adapters_or_radix_cache_has_an_order_too(scheduler) -> None:
    scheduler.tp_worker.model_runner.lora_manager = None
    scheduler.tree_cache = SimpleNamespace(disable=True)
    scheduler.policy = AdapterAffinityPolicy(scheduler, Settings())
    queue = [request([1]), request([2])]
    before = list(queue)
    scheduler.policy.calc_priority(queue)
    scheduler.policy.calc_priority([])
    assert queue == before
