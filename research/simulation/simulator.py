"""A discrete-event simulation of one scheduler: real requests, tree, allocator, admission and pools; costs as clock.

The loop is that of ``Scheduler.get_next_batch_to_run``: prefill first, else decode. What decides is upstream's and our
own code (``upstream.py``, ``systems.py``); only the model's forward pass and the copies are replaced by ``costs.py``.
Lengths inside the tree are pages of ``PAGE_TOKENS`` tokens, the clock counts tokens.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
from blocklora_testing import upstream as calls
from sglang_blocklora.requests.activation import ActivatedId

from benchmark.serving.workload import Session
from research.simulation import upstream
from research.simulation.costs import CHUNK_TOKENS, PAGE_TOKENS, Costs, Work
from research.simulation.outcome import Outcome, Record
from research.simulation.policies import Policy
from research.simulation.systems import MAX_RUNNING, Adapter, System
from research.simulation.traffic import Conversation, pages

MAX_PREFILL_TOKENS = 16384  # --max-prefill-tokens
SAMPLE_STEPS = 500  # between two looks at what the tree holds


class Simulator:
    """Plays ``sessions`` on one system under one policy. Deterministic: no clock, no random numbers of its own."""

    def __init__(
        self,
        system: System,
        policy: Policy,
        adapters: Sequence[Adapter],
        sessions: Sequence[Session],
        costs: Costs,
        max_running: int = MAX_RUNNING,
    ) -> None:
        self.max_running = max_running
        self.system, self.policy, self.adapters, self.costs = system, policy, adapters, costs
        self.cache = system.cache
        self.allocator = self.cache.token_to_kv_pool_allocator
        self.rows = self.cache.req_to_token_pool
        self.table = self.rows.req_to_token.numpy()
        self.ratio = upstream.NewTokenRatioTracker.from_config()
        self.now_s = 0.0
        self.waiting: list[upstream.Req] = []
        self.running: list[upstream.Req] = []
        self.chunked: upstream.Req | None = None
        self.full = False
        self.outcome = Outcome()
        self.steps = 0
        self.arrivals: list[tuple[float, int, Conversation]] = []
        for index, session in enumerate(sessions):
            self._expect(session.arrival_s, Conversation(index, session))

    def run(self) -> Outcome:
        """Until every session has ended. ``RuntimeError`` where requests wait and nothing can ever run."""
        while self.arrivals or self.waiting or self.running or self.chunked:
            if not (self.waiting or self.running or self.chunked):
                self.now_s = max(self.now_s, self.arrivals[0][0])
            self._receive()
            if not self._prefill():
                if not self.running:
                    if not self.arrivals:
                        raise RuntimeError(f"{len(self.waiting)} requests wait, none runs and none can be admitted")
                    self.now_s = max(self.now_s, self.arrivals[0][0])
                    continue
                self._decode()
        self.outcome.loads, self.outcome.copied_bytes = self.system.loads, self.system.copied_bytes
        self.outcome.records.sort(key=lambda record: record.arrival_s)
        return self.outcome

    def _expect(self, when_s: float, conversation: Conversation) -> None:
        heapq.heappush(self.arrivals, (when_s, conversation.index, conversation))

    def _receive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now_s:
            when_s, _, conversation = heapq.heappop(self.arrivals)
            adapter = self.adapters[conversation.session.adapter]
            prompt, turn = conversation.ask()
            tokens = len(prompt) * PAGE_TOKENS
            req = upstream.Req(
                f"{conversation.index}.{conversation.asked}",
                "",
                prompt,
                upstream.SamplingParams(max_new_tokens=pages(turn.new_tokens)),
                lora_id=adapter.lora_id,
            )
            upstream.name_adapter(req)
            req.conversation, req.adapter, req.arrival, req.generated = conversation, adapter, when_s, 0
            resident = self.system.is_resident(adapter.lora_id)
            req.record = Record(
                adapter.index, when_s, tokens, turn.new_tokens, resident, self._alone_s(tokens, adapter)
            )
            self.system.arrived(req)
            self.waiting.append(req)

    def _alone_s(self, tokens: int, adapter: Adapter) -> float:
        work = Work(adapters=1, adapter_bytes=adapter.size_bytes)
        work.extend(tokens, 0, adapter.size_bytes)
        return self.costs.forward_s(work) + self.costs.load_image_s(adapter.size_bytes)

    # --- prefill: Scheduler._get_new_batch_prefill_raw, without the modes that are off here

    def _prefill(self) -> bool:
        """Admit what can be admitted and run it; False if that is nothing."""
        if (self.full or not self.waiting) and self.chunked is None:
            return False
        if len(self.running) >= self.max_running and self.chunked is None:
            self.full = True
            return False
        self.policy.order(self.waiting, self.running, self.now_s)
        matches = self.policy.look_ups(len(self.waiting))
        adder = upstream.PrefillAdder(
            1,
            self.cache,
            self.allocator,
            SimpleNamespace(reqs=self.running),
            self.ratio.current,
            MAX_PREFILL_TOKENS // PAGE_TOKENS,
            CHUNK_TOKENS // PAGE_TOKENS,
        )
        if self.chunked is not None:
            self.chunked.init_next_round_input()
            self.chunked = adder.add_chunked_req(self.chunked)
        self._admit(adder)
        if not adder.can_run_list:
            return False
        admitted = set(adder.can_run_list)
        self.waiting = [req for req in self.waiting if req not in admitted]
        if adder.new_chunked_req is not None:
            self.chunked = adder.new_chunked_req
        self._extend(adder.can_run_list, matches + len(admitted))
        return True

    def _admit(self, adder: upstream.PrefillAdder) -> None:
        lora_ids = {req.lora_id for req in [*self.running, *adder.can_run_list]}
        for req in self.waiting:
            if not self.policy.admits(req, lora_ids, partial(self._fits, req.lora_id, lora_ids)):
                continue
            if len(adder.can_run_list) >= self.max_running - len(self.running):
                self.full = True
                break
            req.init_next_round_input(self.cache)
            result = adder.add_one_req(req, has_chunked_req=self.chunked is not None, truncation_align_size=None)
            lora_ids.add(req.lora_id)
            if result != upstream.AddReqResult.CONTINUE:
                self.full |= result == upstream.AddReqResult.NO_TOKEN
                break

    def _fits(self, lora_id: str, lora_ids: set[str]) -> bool:
        return lora_id in lora_ids or self.system.fits({lora_id, *lora_ids})

    def _extend(self, batch: list[upstream.Req], matches: int) -> None:
        """Allocate, compute and cache the batch's prompts; each finished prompt gives its first token."""
        prefixes = [calls.prefix_slots(self.cache, req) for req in batch]
        self.rows.alloc(batch)
        slots = self._allocate(sum(end - start for start, end in map(calls.extent, batch)))
        work, seen = Work(), set()
        for req, prefix in zip(batch, prefixes, strict=True):
            start, end = calls.extent(req)
            row = self.table[req.kv.req_pool_idx]
            row[:start] = prefix[:start]
            row[start:end], slots = slots[: end - start], slots[end - start :]
            self.system.owner[row[start:end]] = _owner(req)
            req.kv.kv_allocated_len = req.kv.kv_committed_len = end
            if req.record.first_token_s == 0.0 and not req.inflight_middle_chunks:
                req.record.cached_tokens = start * PAGE_TOKENS
            base = min(max(req.lora_id.first, start), end) - start if isinstance(req.lora_id, ActivatedId) else 0
            tokens, base_tokens = (end - start) * PAGE_TOKENS, base * PAGE_TOKENS
            work.extend(tokens, start * PAGE_TOKENS, req.adapter.size_bytes, base_tokens=base_tokens)
            if base_tokens < tokens:
                seen.add(req.adapter)
        work.adapters, work.adapter_bytes = len(seen), sum(adapter.size_bytes for adapter in seen)
        self._pass(self._step_s({req.lora_id for req in batch}, work, matches))
        for req in batch:
            if req is self.chunked:
                req.inflight_middle_chunks += 1
                calls.keep_computed(self.cache, req, more_prompt=True)
                continue
            req.generated += 1
            req.record.first_token_s = req.record.first_token_s or self.now_s
            if req.generated >= req.record.new_tokens:
                self._finish(req)
            else:
                calls.keep_computed(self.cache, req)
                self.running.append(req)

    # --- decode

    def _decode(self) -> None:
        """Some decode steps at once: up to a page, the first end of a request or the next arrival."""
        steps = min(PAGE_TOKENS, min(req.record.new_tokens - req.generated for req in self.running))
        work = self._decode_work(steps)
        lora_ids = {req.lora_id for req in self.running}
        step_s = self._step_s(lora_ids, work, 0 if self.full else self.policy.look_ups(len(self.waiting)))
        if self.arrivals:
            steps = min(steps, max(1, -int(-(self.arrivals[0][0] - self.now_s) // step_s)))
        self._make_room(steps)
        self._grow(steps)
        for _ in range(steps):
            self.ratio.decay_step()
        self._pass(steps * step_s, steps)
        done = [req for req in self.running if req.generated >= req.record.new_tokens]
        if done:
            self.full = False
            self.running = [req for req in self.running if req.generated < req.record.new_tokens]
            for req in done:
                self._finish(req)

    def _decode_work(self, steps: int) -> Work:
        seen = {req.adapter for req in self.running}
        work = Work(adapters=len(seen), adapter_bytes=sum(adapter.size_bytes for adapter in seen))
        for req in self.running:
            work.extend(1, req.record.prompt_tokens + req.generated + steps // 2, req.adapter.size_bytes)
        return work

    def _grow(self, steps: int) -> None:
        """Advance the batch; the last token has no KV yet, so ``generated - 1`` tokens of an answer lie in slots."""
        slots = self._allocate(self._needed(steps))
        for req in self.running:
            req.generated += steps
            missing = pages(req.generated - 1) - len(req.output_ids)
            if missing > 0:
                end = req.kv.kv_committed_len + missing
                own, slots = slots[:missing], slots[missing:]
                self.table[req.kv.req_pool_idx, end - missing : end] = own
                self.system.owner[own] = _owner(req)
                req.kv.kv_allocated_len = req.kv.kv_committed_len = end
                for _ in range(missing):
                    req.output_ids.append(req.conversation.answer_key(len(req.output_ids)))

    def _make_room(self, steps: int) -> None:
        """Evict for the next steps; requests go back to the queue where that is not enough (retraction)."""
        while not self.allocator.check_decode_capacity(num_tokens=self._needed(steps), tree_cache=self.cache):
            if len(self.running) == 1:
                raise RuntimeError("one request alone does not fit the pool")
            worst = upstream.ScheduleBatch._get_decode_retraction_order(self.running)[-1]
            req = self.running.pop(worst)
            calls.release(self.cache, req, keep=False)
            req.reset_for_retract()
            self.waiting.append(req)
            self.outcome.retractions += 1
            self.ratio.current = max(self.ratio.current, self._ratio_after_retraction())
            self.full = False

    def _needed(self, steps: int) -> int:
        return sum(max(0, pages(req.generated + steps - 1) - len(req.output_ids)) for req in self.running)

    def _ratio_after_retraction(self) -> float:
        return upstream.NewTokenRatioTracker.estimate_new_token_ratio_after_retract(self.running)

    # --- both

    def _allocate(self, count: int) -> np.ndarray:
        upstream.evict_from_tree_cache(self.cache, count)
        slots = self.allocator.alloc(count)
        if slots is None:
            raise RuntimeError("admission took more than the pool has")
        return slots.numpy()

    def _step_s(self, lora_ids: set[str], work: Work, matches: int) -> float:
        """Seconds of one step of a batch without loading: the GPU's, or the scheduler's where that takes longer."""
        self.system.prepare(lora_ids)
        return self.costs.step_seconds(work, matches * self.system.match_s)

    def _pass(self, seconds: float, steps: int = 1) -> None:
        """Let time pass; loads come first, not hidden behind anything."""
        self.now_s += seconds + self.system.take_load_s()
        if self.steps // SAMPLE_STEPS != (self.steps + steps) // SAMPLE_STEPS:
            self._sample()
        self.steps += steps

    def _sample(self) -> None:
        """Share of cached KV that no request can use before its adapter is loaded again."""
        owners = self.system.owner[self.cache.all_values_flatten().numpy()]
        owners = owners[owners >= 0]
        resident = np.array([self.system.is_resident(adapter.lora_id) for adapter in self.adapters])
        if len(owners):
            self.outcome.invalid_shares.append(float((~resident[owners]).mean()))

    def _finish(self, req: upstream.Req) -> None:
        req.record.end_s = self.now_s
        self.outcome.records.append(req.record)
        conversation = req.conversation
        calls.release(self.cache, req)
        following = conversation.answered(array("q", req.output_ids))
        if following is not None:
            self._expect(self.now_s + following.think_s, conversation)


def _owner(req: upstream.Req) -> int:
    """The adapter without which a request's KV is of no use; -1: none, or an activated one, whose KV outlives it."""
    return -1 if isinstance(req.lora_id, ActivatedId) else req.adapter.index
