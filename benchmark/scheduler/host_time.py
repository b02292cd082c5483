"""Host time of a scheduler's step: ordering the waiting queue, and asking for each request whether its adapter fits.

On SGLang's real radix cache with our pool, policy and hooks: 200 adapters of 640 slots, of which 64 run, which is the
most that a batch may have, so every waiting request of another adapter is refused for as long as it waits. Prompts have
2000 tokens, every fourth one half of them in the cache. "quiet": nothing changed in the cache since the last step;
"busy": a running request finished, and left its tokens there. Wall time on one core.

    python -m benchmark.scheduler.host_time [--waiting 64 1000] [--steps 100]
"""

from __future__ import annotations

import argparse
import time
import warnings
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from blocklora_testing import warm_imports  # noqa: F401  makes SGLang importable on a CPU, so it comes first
from blocklora_testing.real_cache import digest, new_cache, request_of, scheduler_over
from blocklora_testing.toy import host_only_images
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.unified_pool import KVArena, UnifiedPool
from sglang_blocklora.settings import Settings

from benchmark.record import Recorder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.scheduler import admission
    from blocklora_patches.scheduler.queue_order import AdapterAffinityPolicy
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

PART = "scheduler_host_time"
ADAPTERS, RUNNING, SLOTS, PROMPT_TOKENS, POOL_TOKENS = 200, 64, 640, 2000, 400_000
CAN_SCHEDULE = next(hook.handler for hook in admission.HOOKS if hook.target.endswith("can_schedule_lora_req"))


class Step:
    """A scheduler's queue, pool and cache, as much of them as ordering and admission use."""

    def __init__(self, waiting: int) -> None:
        self.cache = new_cache(1, POOL_TOKENS)
        buffers = [torch.zeros(POOL_TOKENS + 1, 1, 8)]
        pool = UnifiedPool(RUNNING, host_only_images(), DecisionLog(None, 0))
        pool.bind_arena(KVArena(buffers, buffers), POOL_TOKENS)
        pool.bind_cache(self.cache)
        self.keys = [digest(f"adapter {i}")[:32] for i in range(ADAPTERS)]
        for key in self.keys:
            pool.loaded[key] = SimpleNamespace(name=key, slots=SLOTS, pinned=False, content_hash=digest(key))
            self.cache.know(key, digest(key), SLOTS)
            self.cache.publish(key, self.cache.reserve(key))
        self.scheduler = scheduler_over(
            self.cache,
            pool,
            chunked_prefill_size=8192,
            enable_lora_overlap_loading=False,
            chunked_req=None,
            page_size=1,
            max_total_num_tokens=POOL_TOKENS,
        )
        self.scheduler.policy = AdapterAffinityPolicy(self.scheduler, Settings())
        self.running = [self.request(key, 0) for key in self.keys[:RUNNING]]
        # Those that run have no waiting requests: every one is asked about and refused.
        free = self.keys[RUNNING:]
        self.queue = [self.request(free[i % len(free)], i + 1) for i in range(waiting)]
        for req in self.queue[::4]:
            self.insert(req, PROMPT_TOKENS // 2)
        self.finished = self.prompts()

    def request(self, key: str, number: int) -> Any:
        made = request_of(range(number * PROMPT_TOKENS, (number + 1) * PROMPT_TOKENS), key)
        made.rid, made.sampling_params.max_new_tokens = str(number), 256
        return made

    def insert(self, req: Any, tokens: int) -> None:
        slots = self.cache.token_to_kv_pool_allocator.alloc(tokens)
        self.cache.insert(InsertParams(key=RadixKey(req.origin_input_ids[:tokens], req.extra_key), value=slots))

    def prompts(self) -> Iterator[Any]:
        """Requests of running adapters that finish, each with a prompt of its own."""
        for i in range(10**6):
            yield SimpleNamespace(
                origin_input_ids=array("q", range(10**9 + i * 50, 10**9 + i * 50 + 50)),
                extra_key=self.running[i % RUNNING].extra_key,
            )

    def play(self) -> tuple[float, float]:
        """Seconds of ordering and of admission."""
        running = SimpleNamespace(reqs=self.running)
        loras = {req.lora_id for req in self.running}
        started = time.perf_counter()
        self.scheduler.policy.calc_priority(self.queue, running)
        ordered = time.perf_counter()
        admitted = [CAN_SCHEDULE(Scheduler.can_schedule_lora_req, self.scheduler, req, loras) for req in self.queue]
        ended = time.perf_counter()
        if any(admitted):
            raise RuntimeError("a request was admitted beside 64 adapters")
        return ordered - started, ended - ordered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "adapters": f"{ADAPTERS} of {SLOTS} slots, {RUNNING} running",
        "prompts": f"{PROMPT_TOKENS} tokens, every fourth half cached",
        "steps": options.steps,
    }
    recorder = Recorder(PART, 0, settings)
    for waiting in options.waiting:
        step = Step(waiting)
        for _ in range(-(-waiting // 64) + 2):  # until each request was looked up once
            step.play()
        for number in range(options.steps):
            for kind in ("quiet", "busy"):
                if kind == "busy":
                    step.insert(next(step.finished), 50)
                order, admission_s = step.play()
                figures = {"order_ms": order * 1e3, "admission_ms": admission_s * 1e3}
                recorder.add(f"{waiting} waiting", kind, number, figures | {"step_ms": sum(figures.values())})
    recorder.finish()


if __name__ == "__main__":
    main()
