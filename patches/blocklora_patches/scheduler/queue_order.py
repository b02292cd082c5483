"""Puts our order of the waiting queue in place of SGLang's (``managers/schedule_policy.py``).

SGLang is told "fcfs", which it accepts together with priorities, and its policy object is ours. Every call of
``calc_priority`` is a step: SGLang then admits requests from the head of the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.managers.schedule_policy import (
    CLIP_MAX_NEW_TOKENS,
    IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD,
    IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD,
    CacheAwarePolicy,
    SchedulePolicy,
)
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_disagg
from sglang_blocklora.memory.prefix import request_key, split_key
from sglang_blocklora.requests.activation import ActivatedId
from sglang_blocklora.scheduling.order import (
    BATCH_TOKENS_PER_SLOT,
    DISK_LOAD_TOKENS_PER_SLOT,
    HOST_LOAD_TOKENS_PER_SLOT,
)
from sglang_blocklora.scheduling.policy import AffinityPolicy
from sglang_blocklora.settings import Settings

from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
from blocklora_patches.hooks.hook import Hook, Process

# Requests whose cached prefix is looked up in a step: those not looked up yet, then the head of the last order.
MATCHES_PER_STEP = 64
# Steps after which a prefix is looked up again though nothing changed: that counts as a use, and keeps it cached.
REFRESH_STEPS = 16


class AdapterAffinityPolicy(SchedulePolicy):
    """Orders the waiting queue by ``AffinityPolicy``; keeps a request's ticket on the request."""

    def __init__(self, scheduler: Any, settings: Settings) -> None:
        super().__init__(
            "fcfs",
            scheduler.tree_cache,
            scheduler.enable_hierarchical_cache,
            scheduler.enable_priority_scheduling,
            scheduler.schedule_low_priority_values_first,
        )
        self._manager = scheduler.tp_worker.model_runner.lora_manager
        self._affinity = AffinityPolicy(
            settings.adapter_max_wait_steps,
            settings.adapter_round_chunks * (scheduler.chunked_prefill_size or scheduler.max_prefill_tokens),
            settings.adapter_weights,
        )
        self._refused: dict[str | None, bool] = {}  # adapters that did not fit in this pass -> whether they will

    def calc_priority(self, waiting_queue: list[Any], running_batch: Any = None, processed_tokens: int = 0) -> None:
        self._refused.clear()
        for req in waiting_queue:
            if not hasattr(req, "blocklora_ticket"):
                req.blocklora_ticket = self._affinity.ticket(self._adapter_name(req.lora_id))
                req.blocklora_cost_tokens = _cost_tokens(req)
                self._record("arrive", arrival=req.blocklora_ticket.arrival, adapter=self._adapter_name(req.lora_id))
        deferred = self._match(waiting_queue)
        running = {req.lora_id for req in running_batch.reqs} if running_batch is not None else set()
        load_tokens = {key: self._load_tokens(key, running) for key in {req.lora_id: None for req in waiting_queue}}
        order = self._affinity.order(
            [req.blocklora_ticket for req in waiting_queue],
            [self._priority(req) for req in waiting_queue],
            [req.num_matched_prefix_tokens for req in waiting_queue],
            [load_tokens[req.lora_id] for req in waiting_queue],
            [req.blocklora_cost_tokens for req in waiting_queue],
            [req.rid in deferred for req in waiting_queue],
        )
        waiting_queue[:] = [waiting_queue[i] for i in order.tolist()]
        arrivals = [req.blocklora_ticket.arrival for req in waiting_queue]
        self._record("order", step=self._affinity.steps, arrivals=arrivals, turns=self._affinity.turns.tolist())

    def refuses(self, req: Any) -> bool:
        """Whether a request need not be asked about: nobody is let in any more, or its adapter did not fit before."""
        if self._affinity.closed:
            return True
        will_fit = self._refused.get(req.lora_id)
        if will_fit is None:
            return False
        self._affinity.refused(req.blocklora_ticket, will_fit)
        return True

    def admits(self, req: Any, running_loras: set[str | None], fits: Callable[[], bool], *, by_adapter: bool) -> bool:
        """Whether a request that ``refuses`` did not refuse may join the batch as far as its adapter goes.

        ``fits`` asks upstream and the adapters. In a pass the batch grows and room shrinks: what did not fit will not.
        ``by_adapter``: the answer is the same for all requests of the adapter
        """
        pool = self._manager.pool
        joins = req.lora_id is None or req.lora_id in running_loras
        is_full = len(running_loras) - (None in running_loras) >= pool.max_adapters_per_batch
        if (joins or not is_full) and fits():
            return True
        if pool.images.is_being_read(req.lora_id):
            will_fit = False  # that takes as long as the storage does: nobody waits for it but its own requests
        else:
            adapter = pool.loaded.get(req.lora_id)
            will_fit = adapter is not None and pool.reason_not_to_add(adapter.slots, False) is None
        will_fit = will_fit and bool(running_loras)
        if by_adapter:
            self._refused[req.lora_id] = will_fit
        self._affinity.refused(req.blocklora_ticket, will_fit)
        return False

    def _match(self, waiting_queue: list[Any]) -> set[str]:
        """Look up prefixes that may have changed; returns requests that share an uncached one with one before them."""
        if getattr(self.tree_cache, "disable", True):
            return set()
        new = [req for req in waiting_queue if req.last_node is None][:MATCHES_PER_STEP]
        head = [req for req in waiting_queue[:MATCHES_PER_STEP] if req.last_node is not None]
        looked_at = head[: MATCHES_PER_STEP - len(new)] + new
        stale = [req for req in looked_at if self._is_stale(req)]
        self._compute_prefix_matches(stale, CacheAwarePolicy.LPM)
        for req in stale:
            req.blocklora_looked_up = self._changes()
            req.blocklora_cost_tokens = _cost_tokens(req)
        return _deferred(looked_at, activated_share=isinstance(self.tree_cache, AdapterPrefixCache))

    def _is_stale(self, req: Any) -> bool:
        """Whether a lookup may find another prefix than the last one, or is due again as a use of it."""
        if req.last_node is None or not isinstance(self.tree_cache, AdapterPrefixCache):
            return True
        if (self._affinity.steps + req.blocklora_ticket.arrival) % REFRESH_STEPS == 0:
            return True
        return self.tree_cache.may_match_otherwise(req.lora_id, req.num_matched_prefix_tokens, req.blocklora_looked_up)

    def _changes(self) -> int:
        return self.tree_cache.changes if isinstance(self.tree_cache, AdapterPrefixCache) else 0

    def _priority(self, req: Any) -> int:
        """Smaller goes first. Upstream keeps what a client asked for also where priorities are off."""
        return (req.priority or 0) * self.priority_sign if self.enable_priority_scheduling else 0

    def _adapter_name(self, lora_id: str | None) -> str | None:
        if lora_id is None or self._manager is None or lora_id not in self._manager.pool.loaded:
            return lora_id
        return self._manager.pool.loaded[lora_id].name

    def _load_tokens(self, lora_id: str | None, running: set[str | None]) -> float:
        pool = self._manager.pool if self._manager is not None else None
        if pool is None or lora_id not in pool.loaded or lora_id in running:
            return 0.0
        per_slot = BATCH_TOKENS_PER_SLOT
        if not pool.is_resident(lora_id):
            at_hand = pool.images.in_host_memory(lora_id)
            per_slot += HOST_LOAD_TOKENS_PER_SLOT if at_hand else DISK_LOAD_TOKENS_PER_SLOT
        return pool.loaded[lora_id].slots * per_slot

    def _record(self, kind: str, **fields: object) -> None:
        if self._manager is not None:
            self._manager.decisions.record(kind, **fields)


def _deferred(requests: Iterable[Any], *, activated_share: bool) -> set[str]:
    """Ids of requests that share so much of a prefix that is not cached with one before them, as upstream defers them.

    The one before leaves it in the cache. Prefixes that share N tokens are those that have the first N alike.

    activated_share  what is before the invocation of an activated adapter is cached as the base model's
    """
    length, seen, deferred = IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD, set(), set()
    for req in requests:
        if req.num_matched_prefix_tokens > IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD:
            continue
        tokens = req.origin_input_ids[:length]
        if len(tokens) < length:
            tokens = (req.origin_input_ids + req.output_ids)[:length]
        extra_key = req.extra_key
        if activated_share and isinstance(req.lora_id, ActivatedId) and req.lora_id.first >= length:
            extra_key = request_key(None, split_key(extra_key)[1])
        beginning = (extra_key, req.cache_salt, *tokens)
        if len(tokens) < length:
            continue
        if beginning in seen:
            deferred.add(req.rid)
        seen.add(beginning)
    return deferred


def _cost_tokens(req: Any) -> int:
    """Prompt tokens to compute and tokens to generate, at most, as SGLang reserves them."""
    generated = len(req.output_ids)
    prompt_tokens = len(req.origin_input_ids) + generated - req.num_matched_prefix_tokens
    return int(prompt_tokens + min(req.sampling_params.max_new_tokens - generated, CLIP_MAX_NEW_TOKENS))


def _init_schedule_policy(result: Any, self: Any) -> None:
    settings = Settings.required()
    if settings.adapter_affinity and self.dllm_config is None and get_disagg().disaggregation_mode == "null":
        self.policy = AdapterAffinityPolicy(self, settings)


def adapter_fits(
    scheduler: Any, req: Any, running_loras: set[str | None], has_room: Callable[[], bool], fits: Callable[[], bool]
) -> bool:
    """Whether a request may join a batch as far as adapters go: ``has_room`` for itself, and ``fits`` asks SGLang.

    SGLang passes over a request whose adapter does not fit, and might do so for ever; that ends at the age bound. And
    it asks whether adapters fit even for the base model's requests.
    """
    if not isinstance(scheduler.policy, AdapterAffinityPolicy):
        return has_room() and fits()
    if scheduler.policy.refuses(req) or not has_room():
        return False
    drains = scheduler.lora_drainer is not None  # upstream then lets short requests of an adapter pass, not long ones
    needs_nothing = req.lora_id is None and not drains
    return scheduler.policy.admits(req, running_loras, lambda: needs_nothing or fits(), by_adapter=not drains)


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_schedule_policy",
        _init_schedule_policy,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="Upstream's policies know no adapters.",
        retire_when="upstream has a registry of policies",
    ),
)
