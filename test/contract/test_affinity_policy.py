"""``--schedule-policy adapter-affinity`` on SGLang's real policy class and radix cache, without a server."""

from __future__ import annotations

import os
import random
import warnings
from array import array
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_blocklora.memory.prefix import request_key
from sglang_blocklora.requests.activation import ActivatedId
from sglang_blocklora.settings import Settings

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
    from blocklora_patches.scheduler.queue_order import (
        MATCHES_PER_STEP,
        AdapterAffinityPolicy,
        _deferred,
        adapter_fits,
    )
    from blocklora_testing.real_cache import digest, new_cache, scheduler_over
    from sglang.srt.managers.schedule_policy import CacheAwarePolicy
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


class Pool:
    """Adapters of 1000 slots: in the arena, in host memory, on disk."""

    max_adapters_per_batch = 2

    def __init__(self) -> None:
        self.loaded = {name: SimpleNamespace(name=name, slots=1000) for name in ("here", "there", "far")}
        self.reading: set[str] = set()
        self.images = SimpleNamespace(
            in_host_memory=lambda key: key in {"here", "there"}, is_being_read=self.reading.__contains__
        )

    def is_resident(self, key: str) -> bool:
        return key == "here"

    def bring_in(self, keys: Iterable[str]) -> bool:
        raise AssertionError("what fits is the test's word")

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
    made = scheduler_over(UnifiedRadixCache(params), Pool())
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


def fits(scheduler: Any, req: Any, running: set[str | None], answer: bool) -> bool:
    """Whether ``req`` may join ``running`` where SGLang and the adapters say ``answer``."""
    return adapter_fits(scheduler, req, running, lambda: True, lambda: answer)


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


@pytest.mark.parametrize("kind", [AdapterPrefixCache, UnifiedRadixCache])
def test_activated_adapters_share_a_new_prefix_with_the_base_model(kind) -> None:
    """Where the cache is one in which they do: the first of all who ask about a context computes it for the others."""
    scheduler = scheduler_over(new_cache(1, 600, kind=kind), Pool())
    policy = AdapterAffinityPolicy(scheduler, Settings())
    context = list(range(100, 140))
    others = [activated([*context, i], name, 40) for i, name in enumerate(("here", "there"))]
    early, tenant = activated([*context, 7], "here", 20), activated([*context, 8], "there", 40, own_extra="tenant")
    plain, base = request([*context, 9], "far"), request([*context, 10])
    deferred = policy._match([others[0], early, tenant, plain, others[1], base])
    assert deferred == ({others[1].rid, base.rid} if kind is AdapterPrefixCache else set())


def test_the_context_that_the_base_model_left_counts_for_an_activated_adapter(scheduler) -> None:
    tree = new_cache(1, 600)
    for name in ("here", "there"):
        tree.know(name, digest(name), 40, activated=True)
    slots = tree.token_to_kv_pool_allocator.alloc(40)
    tree.insert(InsertParams(key=RadixKey(array("q", range(100, 140)), None), value=slots))
    policy = AdapterAffinityPolicy(scheduler_over(tree, Pool()), Settings())
    new, known = activated([*range(200, 240), 7], "here", 40), activated([*range(100, 140), 7], "here", 40)
    queue = [new, known]
    policy.calc_priority(queue)
    assert queue == [known, new]
    assert (known.num_matched_prefix_tokens, new.num_matched_prefix_tokens) == (40, 0)
    assert new.blocklora_cost_tokens - known.blocklora_cost_tokens == 40


def activated(tokens: list[int], adapter: str, first: int, own_extra: str | None = None) -> Any:
    """A request whose invocation begins at token ``first``, as ``activate`` leaves it."""
    made = request(tokens, adapter)
    made.lora_id = ActivatedId(adapter, first)
    made.extra_key = request_key(made.lora_id, own_extra, first)
    return made


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
    assert not fits(scheduler, there, {"here"}, False)
    assert fits(scheduler, base, {"here"}, False)


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
    assert not fits(scheduler, there, {"here"}, False)
    assert not fits(scheduler, base, {"here"}, True)
    scheduler.policy.calc_priority(queue)
    assert not fits(scheduler, there, set(), False), "nothing runs, so nothing will end"
    assert fits(scheduler, base, set(), True)


def test_nobody_else_waits_for_an_adapter_that_is_being_read(scheduler) -> None:
    """However overdue its requests are: a read takes as long as the storage does."""
    scheduler.tp_worker.model_runner.lora_manager.pool.reading.add("far")
    far = request([1], "far")
    queue = [far]
    for i in range(4):
        queue.append(request([10 + i]))
        scheduler.policy.calc_priority(queue)
        queue.pop(next(j for j, req in enumerate(queue) if req is not far))
        assert not fits(scheduler, far, {"here"}, False)
        assert fits(scheduler, request([30 + i]), {"here"}, True)


def test_a_server_without_adapters_or_radix_cache_has_an_order_too(scheduler) -> None:
    scheduler.tp_worker.model_runner.lora_manager = None
    scheduler.tree_cache = SimpleNamespace(disable=True)
    scheduler.policy = AdapterAffinityPolicy(scheduler, Settings())
    queue = [request([1]), request([2])]
    before = list(queue)
    scheduler.policy.calc_priority(queue)
    scheduler.policy.calc_priority([])
    assert queue == before


def test_an_adapter_that_did_not_fit_is_asked_about_once_a_pass(scheduler) -> None:
    queue = [request([i], adapter) for i in range(3) for adapter in ("there", "far")]
    scheduler.policy.calc_priority(queue)
    asked: list[str] = []
    for _ in range(2):
        for req in queue:
            assert not adapter_fits(
                scheduler, req, {"here"}, lambda: True, lambda req=req: bool(asked.append(req.lora_id))
            )
        assert sorted(asked) == ["far", "there"]
        asked.clear()
        scheduler.policy.calc_priority(queue)
    scheduler.lora_drainer = object()  # upstream's lets some requests of an adapter pass
    for req in queue:
        adapter_fits(scheduler, req, {"here"}, lambda: True, lambda req=req: bool(asked.append(req.lora_id)))
    assert len(asked) == len(queue)


def test_a_batch_has_no_more_adapters_than_it_may(scheduler) -> None:
    """Nobody is asked where it is full; the base model and the adapters that it has may join it."""
    queue = [request([1], "far"), request([2], "here"), request([3])]
    scheduler.policy.calc_priority(queue)
    running = {None, "here", "there"}
    assert [fits(scheduler, req, running, True) for req in queue] == [req.lora_id != "far" for req in queue]


def test_a_request_without_room_says_nothing_of_its_adapter(scheduler) -> None:
    """Its prompt is too long beside pins that came; a short one of the same adapter goes."""
    queue = [request([1], "here"), request([2], "here")]
    scheduler.policy.calc_priority(queue)
    assert not adapter_fits(scheduler, queue[0], {"here"}, lambda: False, lambda: True)
    assert fits(scheduler, queue[1], {"here"}, True)


@pytest.mark.parametrize("seed", range(20))
def test_requests_are_deferred_as_upstream_does_it(scheduler, seed: int) -> None:
    """Random prompts that share up to 40 tokens, in namespaces of their own."""
    draw = random.Random(seed)
    beginnings = [[kind] * 31 + [kind + 10, *range(20)] for kind in range(3)]
    cache(scheduler, beginnings[0])
    queue = []
    for i in range(MATCHES_PER_STEP):
        req = request([*draw.choice(beginnings)[: draw.choice([4, 31, 32, 33, 50])], 100 + i], draw.choice([None, "u"]))
        req.cache_salt = draw.choice([None, "s"])
        queue.append(req)
    expected = scheduler.policy._compute_prefix_matches(list(queue), CacheAwarePolicy.LPM)
    assert _deferred(queue, activated_share=False) == expected
    assert expected, "nothing was deferred: the test shows nothing"


def test_a_queue_that_is_looked_up_where_something_changed_knows_all_that_is_cached() -> None:
    """After random inserts, evictions, loads and flushes every lookup that was left out would have found the same."""
    draw, left_out = random.Random(0), 0
    tree = new_cache(1, 600)
    scheduler = scheduler_over(tree, Pool())
    policy = AdapterAffinityPolicy(scheduler, Settings())
    names = ("here", "there", "far")
    for name in names:
        tree.know(name, digest(name), 40)
    prompts = [[kind, *range(30)] for kind in range(6)]
    queue = [request(prompt, name) for prompt in prompts for name in (None, *names)]
    for step in range(400):
        name, prompt = draw.choice((None, *names)), draw.choice(prompts)
        action = draw.choice(["insert", "insert", "evict", "load", "nothing", "nothing", "flush"])
        if action == "insert" and tree.can_admit(name):
            slots = tree.token_to_kv_pool_allocator.alloc(len(prompt))
            if slots is not None:
                tree.insert(InsertParams(key=RadixKey(array("q", prompt), name), value=slots))
        elif action == "evict":
            tree.evict(EvictParams(num_tokens=draw.randint(1, 100)))
        elif action == "load" and name is not None and not tree.can_admit(name):
            slots = tree.reserve(name)
            if slots is not None:
                tree.publish(name, slots)
        elif action == "flush" and step % 10 == 0:
            tree.reset()
            tree.token_to_kv_pool_allocator.clear()
        policy.calc_priority(queue)
        left_out += sum(not policy._is_stale(req) for req in queue)
        for req in queue:
            key = RadixKey(req.origin_input_ids, req.extra_key)
            assert req.num_matched_prefix_tokens == min(tree.cached_tokens(key), 30), (step, action, req.rid)
    assert left_out > 1000, "every prefix was looked up in every step: the test shows nothing"
