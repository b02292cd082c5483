"""Loading adapters ahead, on SGLang's real radix cache: never at the cost of what runs or comes first."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from blocklora_testing.real_cache import digest, key_of, new_cache
from blocklora_testing.toy import host_only_images
from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.unified_pool import UnifiedPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.hooks import install
    from blocklora_patches.scheduler import admission, look_ahead
    from blocklora_patches.scheduler.look_ahead import ARENA_HEAD_REQUESTS, _get_new_batch_prefill
    from blocklora_patches.scheduler.queue_order import AdapterAffinityPolicy
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams

SLOTS = {"a": 60, "b": 80, "c": 100, "d": 30}
POOL_TOKENS = 240


class Look:
    """A scheduler of which one request runs, with adapter a; b is resident and idle; c and d are not resident."""

    def __init__(self) -> None:
        self.cache = new_cache(1, POOL_TOKENS)
        self.pool = UnifiedPool(64, host_only_images(), DecisionLog(None, 0))
        self.pool.arena = SimpleNamespace(write=lambda slots, image: None)
        self.pool.bind_cache(self.cache)
        for name, slots in SLOTS.items():
            shard = AdapterShard(name=name, rank=1, nblocks=1, slots=slots, descriptors=(), scalings=(), shares=())
            adapter = LoadedAdapter(name, "", shard, slots, False, digest(name), "")
            self.pool.add(self.id(name), adapter, torch.zeros(1, 2, slots, 8))
        assert self.pool.fits([self.id("a"), self.id("b")])
        running = self.request("a")
        self.cache.inc_lock_ref(running.last_node)
        manager = SimpleNamespace(unified=True, pool=self.pool, decisions=DecisionLog(None, 0))
        self.result = SimpleNamespace(running_batch=SimpleNamespace(reqs=[running]), batch_to_run=None)
        self.scheduler = SimpleNamespace(
            policy=object.__new__(AdapterAffinityPolicy),
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
            tree_cache=self.cache,
            page_size=1,
            chunked_req=None,
        )

    def id(self, name: str | None) -> str | None:
        return name and name * 32

    def request(self, name: str | None, tokens: tuple[int, ...] = (1,)) -> SimpleNamespace:
        """A waiting request that was matched."""
        key = key_of(tokens, self.id(name))
        node = self.cache.match_prefix(MatchPrefixParams(key=key)).last_device_node
        return SimpleNamespace(lora_id=self.id(name), last_node=node)

    def ahead(self, *waiting: SimpleNamespace) -> set[str]:
        """Names of the adapters that are resident after one step."""
        self.scheduler.waiting_queue = list(waiting)
        _get_new_batch_prefill(self.result, self.scheduler, None)
        return {name for name in SLOTS if self.pool.is_resident(self.id(name))}


def test_free_room_is_used_one_adapter_a_step_in_the_queues_order() -> None:
    look = Look()
    assert look.ahead(look.request("b"), look.request("d"), look.request("c")) == {"a", "b", "d"}


def test_the_running_batch_keeps_room_for_its_next_step() -> None:
    """100 slots are free, as many as c takes, and b waits."""
    look = Look()
    assert look.ahead(look.request("c"), look.request("b")) == {"a", "b"}
    look.result.running_batch.reqs = []
    assert look.ahead(look.request("c"), look.request("b")) == {"a", "b", "c"}


def test_far_down_the_queue_no_adapter_takes_room() -> None:
    look = Look()
    head = [look.request("b") for _ in range(ARENA_HEAD_REQUESTS)]
    assert look.ahead(*head, look.request("d")) == {"a", "b"}
    assert look.ahead(*head[1:], look.request("d")) == {"a", "b", "d"}


def test_an_idle_adapter_that_nobody_before_needs_gives_way() -> None:
    look = Look()
    assert look.ahead(look.request("c")) == {"a", "b", "c"}
    assert look.ahead(look.request("c"), look.request("d")) == {"a", "c", "d"}


@pytest.mark.parametrize("place", [0, 2], ids=["behind", "before"])
@pytest.mark.parametrize("other", ["b", None])
def test_what_another_waiting_request_needs_stays(other: str | None, place: int) -> None:
    """100 slots are free, of which 60 then hold the KV of a prompt that waits before or behind c."""
    look = Look()
    prompt = tuple(range(60))
    slots = look.cache.token_to_kv_pool_allocator.alloc(len(prompt))
    look.cache.insert(InsertParams(key=key_of(prompt, look.id(other)), value=slots))
    others = [look.request(other, prompt), look.request("b")]
    assert look.ahead(*others[:place], look.request("c"), *others[place:]) == {"a", "b"}
    found = look.cache.match_prefix(MatchPrefixParams(key=key_of(prompt, look.id(other))))
    assert len(found.device_indices) == len(prompt)
    assert look.cache.protected_size() == SLOTS["a"], "a lock was left behind"
    look.request("b"), look.request(other, prompt)  # used last, so that without locks they would still go for c
    assert "c" in look.ahead(look.request("c"))


def test_requests_whose_adapter_failed_are_gone_before_anything_is_read_for_them() -> None:
    """Hooks on one method run in the order of installation."""
    order = [hook for hook in install.HOOKS if hook.target.endswith("Scheduler.get_new_batch_prefill")]
    assert order == [admission.HOOKS[-1], *look_ahead.HOOKS]
