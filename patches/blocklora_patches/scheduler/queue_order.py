"""Puts our order of the waiting queue in place of SGLang's (``managers/schedule_policy.py``).

SGLang is told "fcfs", which it accepts together with priorities, and its policy object is ours. Every call of
``calc_priority`` is a step: SGLang then admits requests from the head of the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, CacheAwarePolicy, SchedulePolicy
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_disagg
from sglang_blocklora.scheduling.order import (
    BATCH_TOKENS_PER_SLOT,
    DISK_LOAD_TOKENS_PER_SLOT,
    HOST_LOAD_TOKENS_PER_SLOT,
)
from sglang_blocklora.scheduling.policy import QUANTUM_CHUNKS, AffinityPolicy
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.hook import Hook, Process

# Requests whose cached prefix is looked up in a step: those not looked up yet, then the head of the last order.
MATCHES_PER_STEP = 64


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
            QUANTUM_CHUNKS * (scheduler.chunked_prefill_size or scheduler.max_prefill_tokens),
            settings.adapter_weights,
        )

    def calc_priority(self, waiting_queue: list[Any], running_batch: Any = None, processed_tokens: int = 0) -> None:
        for req in waiting_queue:
            if not hasattr(req, "blocklora_ticket"):
                req.blocklora_ticket = self._affinity.ticket(self._adapter_name(req.lora_id))
                self._record("arrive", arrival=req.blocklora_ticket.arrival, adapter=self._adapter_name(req.lora_id))
        deferred = self._match(waiting_queue)
        running = {req.lora_id for req in running_batch.reqs} if running_batch is not None else set()
        load_tokens = {key: self._load_tokens(key, running) for key in {req.lora_id: None for req in waiting_queue}}
        order = self._affinity.order(
            [req.blocklora_ticket for req in waiting_queue],
            [self._priority(req) for req in waiting_queue],
            [req.num_matched_prefix_tokens for req in waiting_queue],
            [load_tokens[req.lora_id] for req in waiting_queue],
            [_cost_tokens(req) for req in waiting_queue],
            [req.rid in deferred for req in waiting_queue],
        )
        waiting_queue[:] = [waiting_queue[i] for i in order.tolist()]
        arrivals = [req.blocklora_ticket.arrival for req in waiting_queue]
        self._record("order", step=self._affinity.steps, arrivals=arrivals, turns=self._affinity.turns.tolist())

    def admits(self, req: Any, running_loras: set[str | None], fits: Callable[[], bool]) -> bool:
        """Whether a request may join the batch as far as its adapter goes. ``fits`` asks upstream and the adapters."""
        if self._affinity.closed:
            return False
        if fits():
            return True
        if self._manager.pool.images.is_being_read(req.lora_id):
            return False  # that takes as long as the storage does: nobody waits for it but its own requests
        adapter = self._manager.pool.loaded.get(req.lora_id)
        fits_alone = adapter is not None and self._manager.pool.reason_not_to_add(adapter.slots, False) is None
        self._affinity.refused(req.blocklora_ticket, will_fit=fits_alone and bool(running_loras))
        return False

    def _match(self, waiting_queue: list[Any]) -> set[str]:
        """Look up cached prefixes; returns requests that share an uncached prefix with one before them."""
        if getattr(self.tree_cache, "disable", True):
            return set()
        new = [req for req in waiting_queue if req.last_node is None][:MATCHES_PER_STEP]
        head = [req for req in waiting_queue[:MATCHES_PER_STEP] if req.last_node is not None]
        return self._compute_prefix_matches((head[: MATCHES_PER_STEP - len(new)]) + new, CacheAwarePolicy.LPM)

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


def _cost_tokens(req: Any) -> int:
    """Prompt tokens to compute and tokens to generate, at most, as SGLang reserves them."""
    generated = len(req.output_ids)
    prompt_tokens = len(req.origin_input_ids) + generated - req.num_matched_prefix_tokens
    return int(prompt_tokens + min(req.sampling_params.max_new_tokens - generated, CLIP_MAX_NEW_TOKENS))


def _init_schedule_policy(result: Any, self: Any) -> None:
    settings = Settings.required()
    if settings.adapter_affinity and self.dllm_config is None and get_disagg().disaggregation_mode == "null":
        self.policy = AdapterAffinityPolicy(self, settings)


def adapter_fits(scheduler: Any, req: Any, running_loras: set[str | None], fits: Callable[[], bool]) -> bool:
    """Whether a request may join a batch as far as adapters go. ``fits`` asks SGLang.

    SGLang passes over a request whose adapter does not fit, and might do so for ever; that ends at the age bound. And
    it asks whether adapters fit even for the base model's requests.
    """
    if not isinstance(scheduler.policy, AdapterAffinityPolicy):
        return fits()
    needs_nothing = req.lora_id is None and scheduler.lora_drainer is None
    return scheduler.policy.admits(req, running_loras, lambda: needs_nothing or fits())


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
