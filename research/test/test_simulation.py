"""The simulator against cases computed by hand: one request, a batch, decoding, waiting for a slot, a cached prefix."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

from benchmark.serving.workload import Session, Turn, Workload
from research.simulation.costs import Costs, Model
from research.simulation.outcome import Outcome
from research.simulation.policies import Affinity, LoRAXRotation, SLoRACluster, Upstream
from research.simulation.simulator import Simulator
from research.simulation.systems import Static, StockSlots, Unified, make_adapters
from research.simulation.traffic import INVOCATION, page_keys

# Llama-3.1-8B and an H100, from their data sheets; shares and overheads are those of costs.py.
PARAMETERS, KV_BYTES, FLOPS, BANDWIDTH, PCIE = 8.03e9, 131_072, 989e12 * 0.5, 3.35e12 * 0.7, 55e9
RANK_16_BYTES = 2 * 16 * 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 3 * (4096 + 14336))
LAUNCHES_S = 1.3e-3
SYSTEMS = [StockSlots, Static, *(partial(Unified, eviction=name) for name in ("lru", "kv-first", "cost-aware"))]


def session(arrival_s: float, adapter: int, *turns: tuple[int, int], think_s: float = 0.0) -> Session:
    """``turns`` are (prompt tokens, answer tokens); no two sessions share a token by chance."""
    rng = np.random.default_rng([adapter, round(arrival_s * 1e6)])
    made = tuple(Turn(rng.integers(32000, size=prompt), answer, think_s) for prompt, answer in turns)
    return Session(arrival_s, adapter, made)


def simulate(system, sessions, adapters: int = 1, slots: int = 65_536, policy=None, ranks=(16,)) -> Outcome:
    costs = Costs()
    made = make_adapters(ranks, adapters, costs)
    system = system(made, slots, costs)
    policy = policy(system) if policy else Upstream("fcfs", system.cache)
    outcome = Simulator(system, policy, made, sessions, costs).run()
    free = system.cache.token_to_kv_pool_allocator.available_size()
    assert free + system.cache.evictable_size() == system.cache.token_to_kv_pool_allocator.size, "a slot leaked"
    assert system.cache.protected_size() == 0, "a lock outlived its request"
    return outcome


def forward_s(prompts: list[int], prefixes: list[int], adapters: int, base: int = 0) -> float:
    """Roofline of one step by hand; every request has an adapter of rank 16, but for ``base`` tokens of a context."""
    tokens = sum(prompts)
    attended = sum(p * (c + p / 2) for p, c in zip(prompts, prefixes, strict=True))
    flops = 2 * PARAMETERS * tokens + 4 * 32 * 4096 * attended + RANK_16_BYTES * (tokens - base) / 0.1
    traffic = 2 * PARAMETERS + KV_BYTES * (tokens + sum(prefixes)) + adapters * RANK_16_BYTES
    return max(flops / FLOPS, traffic / BANDWIDTH) + LAUNCHES_S


def load_s(ours: bool) -> float:
    if ours:
        return RANK_16_BYTES / PCIE + max(2 * RANK_16_BYTES / BANDWIDTH, 64 * 10e-6)
    return max(RANK_16_BYTES / PCIE, 256 * 10e-6)


def test_slots_of_adapters() -> None:
    """Rank 64 on all linears is 320 MiB, 2,560 tokens of KV; blocks shrink B of column and A of row layers."""
    model = Model()
    assert model.slot_bytes == KV_BYTES
    assert [model.adapter_slots(rank) for rank in (16, 32, 64)] == [640, 1280, 2560]
    q, kv, hidden, ffn = 4096, 1024, 4096, 14336
    elements = 32 * (3 * hidden + (q + 2 * kv) / 8 + q / 8 + hidden + 2 * hidden + 2 * ffn / 8 + ffn / 8 + hidden)
    exact = elements * 64 * 2 / KV_BYTES
    assert exact <= model.adapter_slots(64, nblocks=8) <= 1.03 * exact


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("prompt", [16, 1600])
def test_one_request_alone_waits_for_its_load_and_its_prefill(system, prompt: int) -> None:
    (record,) = simulate(system, [session(0.0, 0, (prompt, 2))]).records
    assert record.ttft_s == pytest.approx(load_s(system is not StockSlots) + forward_s([prompt], [0], 1))
    assert not record.resident
    assert record.cached_tokens == 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_requests_at_once_are_one_batch(system) -> None:
    outcome = simulate(system, [session(0.0, 0, (320, 2)), session(0.0, 1, (640, 2))], adapters=2)
    expected = 2 * load_s(system is not StockSlots) + forward_s([320, 640], [0, 0], 2)
    assert [record.ttft_s for record in outcome.records] == pytest.approx([expected, expected])
    assert outcome.loads == 2
    assert outcome.copied_bytes == 2 * RANK_16_BYTES


def test_decoding_takes_a_step_a_token() -> None:
    (record,) = simulate(Unified, [session(0.0, 0, (320, 200))]).records
    expected = sum(forward_s([1], [320 + token], 1) for token in range(1, 200))
    assert record.end_s - record.first_token_s == pytest.approx(expected, rel=1e-4)


def test_the_ninth_adapter_waits_for_a_slot_of_stock_only() -> None:
    sessions = [session(0.0, adapter, (160, 100 + 10 * adapter)) for adapter in range(9)]
    stock = simulate(StockSlots, sessions, adapters=9).records
    unified = simulate(Unified, sessions, adapters=9).records
    assert {r.first_token_s for r in stock[:8]} == {stock[0].first_token_s}
    assert stock[8].first_token_s > min(r.end_s for r in stock[:8])
    assert {r.first_token_s for r in unified} == {unified[0].first_token_s}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_second_turn_finds_the_first_one_and_its_answer_cached(system) -> None:
    """320 tokens and the KV of 32 of 33 answer tokens are 22 pages; the second prompt adds 10."""
    first, second = simulate(system, [session(0.0, 0, (320, 33), (160, 2), think_s=1.0)]).records
    assert second.arrival_s == pytest.approx(first.end_s + 1.0)
    assert second.resident
    assert second.prompt_tokens == 352 + 160
    assert second.cached_tokens == 352
    assert second.ttft_s == pytest.approx(forward_s([160], [352], 1))


def test_a_context_is_computed_once_for_two_activated_adapters() -> None:
    """320 tokens of context, a page of invocation, questions of 32 and 48; the second comes when the first is done."""
    context, rng = np.arange(1000, 1320), np.random.default_rng(0)
    sessions = [
        Session(
            float(adapter), adapter, (Turn(np.concatenate([context, INVOCATION, rng.integers(2, 900, own)]), 2, 0.0),)
        )
        for adapter, own in enumerate((32, 48))
    ]

    def activated(adapters, slots, costs):
        invocation = tuple(page_keys(INVOCATION))
        return Unified([dataclasses.replace(one, invocation=invocation) for one in adapters], slots, costs)

    for policy in POLICIES.values():
        first, second = simulate(activated, sessions, adapters=2, policy=policy).records
        assert (first.cached_tokens, second.cached_tokens) == (0, 320)
        assert first.ttft_s == pytest.approx(load_s(True) + forward_s([368], [0], 1, base=320))
        assert second.ttft_s == pytest.approx(load_s(True) + forward_s([64], [320], 1))
    plain = simulate(Unified, sessions, adapters=2).records
    assert [record.cached_tokens for record in plain] == [0, 0]


POLICIES = {
    "fcfs": lambda system: Upstream("fcfs", system.cache),
    "lpm": lambda system: Upstream("lpm", system.cache),
    "cluster": lambda system: SLoRACluster(),
    "rotation": lambda system: LoRAXRotation(active=4, cycle_s=0.5),
    "affinity": lambda system: Affinity(system.pool, system.cache),
}


@pytest.mark.parametrize(("system", "policy"), [*((s, "fcfs") for s in SYSTEMS), *((Unified, p) for p in POLICIES)])
def test_every_request_of_a_tight_pool_ends_and_runs_are_repeatable(system, policy: str) -> None:
    """Memory for about 20 requests, 12 adapters on 8 slots, more arrivals than can be served at once."""
    workload = Workload(25, 40.0, 12, turns=(1, 4), new_tokens=(64, 513), system_tokens=128, think_s=0.5)
    sessions = workload.generate()
    slots = 8 * 1280 + 12_000
    runs = [simulate(system, sessions, 12, slots, POLICIES[policy], (16, 32)) for _ in range(2)]
    assert len(runs[0].records) == sum(len(one.turns) for one in sessions)
    assert [dataclasses.astuple(r) for r in runs[0].records] == [dataclasses.astuple(r) for r in runs[1].records]
    for record in runs[0].records:
        assert record.arrival_s < record.first_token_s < record.end_s
        assert record.cached_tokens < record.prompt_tokens
    answered = sum(record.new_tokens for record in runs[0].records)
    assert answered == sum(turn.new_tokens for one in sessions for turn in one.turns)


def test_a_batch_larger_than_the_pool_is_taken_back_and_ends() -> None:
    """Answers outgrow the pool while they are written: requests go back to the queue and still end."""
    sessions = [session(0.5 * i, 0, (256, 3000)) for i in range(16)]
    outcome = simulate(Unified, sessions, slots=640 + 16_000)
    assert outcome.retractions > 0
    assert len(outcome.records) == 16
