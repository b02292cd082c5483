"""Orders of the waiting queue: SGLang's own, and the published ones of other servers for comparison."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Protocol
from unittest.mock import patch

from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.memory.unified_pool import UnifiedPool
from sglang_blocklora.scheduling import order
from sglang_blocklora.settings import DEFAULTS, Settings

from research.simulation import upstream
from research.simulation.costs import CHUNK_TOKENS, PAGE_TOKENS

LPM_LONGEST_QUEUE = 128  # upstream's SchedulePolicy._determine_active_policy


class Policy(Protocol):
    """``order`` sorts the queue in place; ``admits`` says whether a request may join; ``look_ups(n)`` says how many of
    ``n`` waiting requests' prefixes are looked up in a step.

    lora_ids  adapters of the batch so far
    fits      whether the request's adapter can be added, asked only where it matters
    running   what holds its adapter: the running requests, those just admitted, and one whose prompt is half done
    """

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None: ...
    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool: ...
    def look_ups(self, waiting: int) -> int: ...


class Blind:
    """Looks nothing up to order the queue."""

    def look_ups(self, waiting: int) -> int:
        return 0


class Upstream(Blind):
    """A policy of SGLang by its name on the command line: ``fcfs``, ``lpm``."""

    def __init__(self, name: str, cache: upstream.UnifiedRadixCache) -> None:
        self.policy = upstream.SchedulePolicy(name, cache, False, False, False)

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None:
        self.policy.calc_priority(waiting, SimpleNamespace(reqs=running))

    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool:
        return fits()

    def look_ups(self, waiting: int) -> int:
        """``lpm`` looks up all of a short queue, and none of a long one."""
        return waiting if self.policy.policy.value == "lpm" and waiting <= LPM_LONGEST_QUEUE else 0


class SLoRACluster(Blind):
    """S-LoRA's adapter clustering (arXiv 2311.03285): adapters of the running batch first, then whole groups.

    No ageing, as published.
    """

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None:
        active = {req.lora_id for req in running}
        first: dict[str, int] = {}
        for place, req in enumerate(waiting):
            first.setdefault(req.lora_id, place)
        waiting.sort(key=lambda req: (req.lora_id not in active, first[req.lora_id]))

    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool:
        return fits()


class LoRAXRotation(Blind):
    """LoRAX: a queue per adapter, the oldest request of the active adapters first, adapters rotating every 2 s.

    active   adapters that 10 % of an H100 holds (its ``adapter_memory_fraction``) at rank 64: 24
    cycle_s  its ``adapter_cycle_time_s``
    """

    def __init__(self, active: int = 24, cycle_s: float = 2.0) -> None:
        self.limit, self.cycle_s = active, cycle_s
        self.active: dict[str, float] = {}  # adapter: active since; oldest first

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None:
        waiting.sort(key=lambda req: req.arrival)
        wanted = list(dict.fromkeys(req.lora_id for req in waiting))
        used = {*wanted, *(req.lora_id for req in running)}
        self.active = {key: since for key, since in self.active.items() if key in used}
        outside = [key for key in wanted if key not in self.active]
        for key in outside:
            if len(self.active) >= self.limit:
                oldest, since = next(iter(self.active.items()))
                if now_s - since < self.cycle_s:
                    break
                del self.active[oldest]
            self.active[key] = now_s

    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool:
        return request.lora_id in self.active and fits()


class Affinity:
    """Ours: the class that ``--schedule-policy adapter-affinity`` installs, on a stand-in for its scheduler.

    A step here is an attempt to admit, of which there is one for every batch, or one a page of decoding while nothing
    can be admitted. Constants in tokens become pages, as all lengths in the tree are.

    max_wait_steps  ``--adapter-max-wait-steps``
    round_chunks    ``--adapter-round-chunks``
    batch_tokens    the constant of that name, for ablations
    """

    def __init__(
        self,
        pool: AdapterPool,
        cache: upstream.UnifiedRadixCache,
        max_wait_steps: int = DEFAULTS.adapter_max_wait_steps,
        round_chunks: int = DEFAULTS.adapter_round_chunks,
        batch_tokens: float = order.BATCH_TOKENS_PER_SLOT,
    ) -> None:
        manager = SimpleNamespace(pool=pool, unified=isinstance(pool, UnifiedPool), decisions=DecisionLog(None, 0))
        self.scheduler = SimpleNamespace(
            tree_cache=cache,
            enable_hierarchical_cache=False,
            enable_priority_scheduling=False,
            schedule_low_priority_values_first=False,
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
            chunked_prefill_size=CHUNK_TOKENS // PAGE_TOKENS,
            lora_drainer=None,
        )
        settings = Settings(adapter_max_wait_steps=max_wait_steps, adapter_round_chunks=round_chunks)
        self.policy = self.scheduler.policy = upstream.AdapterAffinityPolicy(self.scheduler, settings)
        self.batch_tokens = batch_tokens

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None:
        with (
            patch.object(order, "AGE_TOKENS_PER_STEP", order.AGE_TOKENS_PER_STEP / PAGE_TOKENS),
            patch.object(upstream.affinity_policy, "BATCH_TOKENS_PER_SLOT", self.batch_tokens),
        ):
            self.policy.calc_priority(waiting, SimpleNamespace(reqs=running))

    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool:
        return upstream.affinity_policy.adapter_fits(self.scheduler, request, lora_ids, lambda: True, fits)

    def look_ups(self, waiting: int) -> int:
        return min(waiting, upstream.affinity_policy.MATCHES_PER_STEP)
