"""Orders of the waiting queue: SGLang's own, and the published ones of other servers for comparison."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Protocol

from benchmark.simulation import upstream


class Policy(Protocol):
    """``order`` sorts the queue in place; ``admits`` says whether a request may join.

    lora_ids  adapters of the batch so far
    fits      whether the request's adapter can be added, asked only where it matters
    """

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None: ...
    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool: ...


class Upstream:
    """A policy of SGLang by its name on the command line: ``fcfs``, ``lpm``."""

    def __init__(self, name: str, cache: upstream.UnifiedRadixCache) -> None:
        self.policy = upstream.SchedulePolicy(name, cache, False, False, False)

    def order(self, waiting: list[upstream.Req], running: list[upstream.Req], now_s: float) -> None:
        self.policy.calc_priority(waiting, SimpleNamespace(reqs=running))

    def admits(self, request: upstream.Req, lora_ids: set[str], fits: Callable[[], bool]) -> bool:
        return fits()


class SLoRACluster:
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


class LoRAXRotation:
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
