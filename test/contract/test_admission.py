"""Admission with adapters in the KV pool, on SGLang's real tree, allocator, requests and PrefillAdder."""

from __future__ import annotations

import random
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from blocklora_testing import upstream
from blocklora_testing.real_cache import digest, new_cache
from blocklora_testing.toy import host_only_images
from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.prefix import split_key
from sglang_blocklora.memory.unified_pool import UnifiedPool
from sglang_blocklora.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model.lora_manager import BlockLoRAManager
    from blocklora_patches.scheduler import admission as scheduler
    from blocklora_patches.scheduler import prefill_adder as schedule_policy
    from blocklora_patches.scheduler import request as schedule_batch
    from blocklora_patches.scheduler.queue_order import AdapterAffinityPolicy
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams
    from sglang.srt.runtime_context import get_context
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

BOUND = 2  # steps for which a request may be overtaken
POOL_TOKENS = 240
PAGE = 4
SLOTS = {"a": 70, "b": 90, "c": 110, "d": 30}


@pytest.fixture(scope="module", autouse=True)
def context() -> Iterator[None]:
    with get_context().override_server_args(device="cpu"):
        yield


class Admission:
    """Scheduler's admission loop, its steps in upstream's order, over a pool of four adapters that do not all fit."""

    def __init__(self, *, affinity: bool = False) -> None:
        self.cache = new_cache(PAGE, POOL_TOKENS)
        self.pool = UnifiedPool(64, host_only_images(), DecisionLog(None, 0))
        self.pool.bind_arena(SimpleNamespace(write=lambda slots, image: None), 10**6)
        self.pool.bind_cache(self.cache)
        for name, slots in SLOTS.items():
            adapter = LoadedAdapter(
                name=name,
                path="",
                shard=AdapterShard(
                    name=name, rank=1, nblocks=1, slots=slots, descriptors=(), scalings=(), entry=torch.empty(0)
                ),
                slots=slots,
                pinned=False,
                content_hash=digest(name),
                image_digest="",
            )
            self.pool.add(self.id(name), adapter, torch.zeros(1, 2, slots, 8))
        manager = SimpleNamespace(unified=True, pool=self.pool, decisions=DecisionLog(None, 0))
        manager.validate_lora_batch = lambda ids: BlockLoRAManager.validate_lora_batch(manager, ids)
        self.scheduler = SimpleNamespace(
            policy=None,  # any of SGLang's: most of this is about admission, whatever the order
            tree_cache=self.cache,
            enable_hierarchical_cache=False,
            enable_priority_scheduling=False,
            schedule_low_priority_values_first=False,
            chunked_prefill_size=300,
            chunked_req=None,
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
            max_total_num_tokens=POOL_TOKENS,
            page_size=PAGE,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            lora_drainer=None,
            enable_lora_overlap_loading=False,
        )
        if affinity:
            self.scheduler.policy = AdapterAffinityPolicy(self.scheduler, Settings(adapter_max_wait_steps=BOUND))
        self.overtaken: Counter[str] = Counter()
        self.requests = 0
        self.running: list[Req] = []
        self.waiting: list[Req] = []
        self.is_full = False

    def id(self, name: str | None) -> str | None:
        return digest(name)[:32] if name else None

    def request(self, name: str | None, prompt: list[int], new_tokens: int) -> Req:
        """A request as the scheduler queues it: shortened to what fits, or refused."""
        whole_pool = POOL_TOKENS - -(-len(prompt) // PAGE) * PAGE - PAGE - 1  # upstream's own bound
        sampling = SamplingParams(max_new_tokens=min(new_tokens, whole_pool))
        sampling.normalize(None)
        self.requests += 1
        request = Req(str(self.requests), "", array("q", prompt), sampling, lora_id=self.id(name))
        schedule_batch._init(None, request)
        request.messages = []
        request.set_finish_with_abort = request.messages.append
        scheduler._init_req_max_new_tokens(self.scheduler, request)
        scheduler._add_request_to_queue(self.scheduler, request)
        return request

    def can_schedule(self, request: Req, loras: set[str | None]) -> bool:
        return scheduler._can_schedule_lora_req(Scheduler.can_schedule_lora_req, self.scheduler, request, loras)

    def adder(self) -> PrefillAdder:
        batch = SimpleNamespace(reqs=self.running)
        return PrefillAdder(PAGE, self.cache, self.cache.token_to_kv_pool_allocator, batch, 1.0, 1000, None)

    def add(self, adder: PrefillAdder, request: Req) -> AddReqResult:
        return schedule_policy._add_one_req(
            PrefillAdder.add_one_req, adder, request, has_chunked_req=False, truncation_align_size=None
        )

    def one_pass(self) -> list[Req]:
        """Admit what fits and give it its slots."""
        batch = SimpleNamespace(is_empty=lambda: not self.running, batch_is_full=self.is_full)
        scheduler._get_new_batch_prefill_raw(self.scheduler, None, batch)
        self.is_full = batch.batch_is_full
        turns = self.order() if self.scheduler.policy is not None and not self.is_full else {}
        adder, loras = self.adder(), {request.lora_id for request in self.running}
        for request in [] if self.is_full else self.waiting:
            if not self.can_schedule(request, loras):
                continue
            request.init_next_round_input(self.cache)
            result = self.add(adder, request)
            loras.add(request.lora_id)
            if result != AddReqResult.CONTINUE:
                self.is_full = result == AddReqResult.NO_TOKEN
                break
        admitted = list(adder.can_run_list)
        self.waiting = [request for request in self.waiting if request not in admitted]
        for request in admitted:
            self.allocate(request)
        self.pool.begin_step(request.lora_id for request in admitted if request.lora_id)
        self.running += admitted
        self.count_overtaken(admitted, turns)
        self.scheduler.waiting_queue = self.waiting
        scheduler._get_new_batch_prefill(None, self.scheduler, None)
        return admitted

    def order(self) -> dict[str, int]:
        """Order the queue; the turn of each request."""
        self.scheduler.policy.calc_priority(self.waiting)
        turns = self.scheduler.policy._affinity.turns.tolist()
        return {request.rid: turn for request, turn in zip(self.waiting, turns, strict=True)}

    def count_overtaken(self, admitted: list[Req], turns: dict[str, int]) -> None:
        """By the definition; request numbers are arrival numbers."""
        for request in self.waiting if turns else []:
            self.overtaken[request.rid] += any(
                int(other.rid) > int(request.rid)
                and (other.lora_id == request.lora_id or turns[other.rid] >= turns[request.rid])
                for other in admitted
            )

    def allocate(self, request: Req) -> None:
        """Slots for the rest of the prompt and for the whole answer."""
        start, end = upstream.extent(request)
        needed = end - start + request.sampling_params.max_new_tokens
        needed = -(-needed // PAGE) * PAGE
        allocator = self.cache.token_to_kv_pool_allocator
        allocator.evict_to_free_tokens(self.cache, needed)
        request.own = allocator.alloc(needed)
        assert request.own is not None, "admitted without room"

    def finish(self, request: Req) -> None:
        self.running.remove(request)
        self.cache.token_to_kv_pool_allocator.free(request.own)
        upstream.unlock_match(self.cache, request)
        self.is_full = False


@pytest.mark.parametrize("affinity", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_everything_queued_runs_with_its_adapter_and_nothing_livelocks(seed: int, affinity: bool) -> None:
    """Random requests and pins: an idle pool always admits somebody, who is not shut out by a pin."""
    admission, random_ = Admission(affinity=affinity), random.Random(seed)
    ended, pinned = 0, None
    for step in range(150):
        if random_.random() < 0.7 and len(admission.waiting) < 8:
            name = random_.choice([None, *SLOTS])
            prompt = [random_.randint(0, 5) for _ in range(random_.randint(1, 120))]
            request = admission.request(name, prompt, random_.randint(1, 150))
            if not request.messages:
                admission.waiting.append(request)
        if step % 20 == 10:
            if pinned:
                assert admission.pool.set_pinned(pinned, False) is None
            pinned = admission.id(random_.choice("ad"))
            assert admission.pool.set_pinned(pinned, True) is None
        before = list(admission.waiting)
        idle = not admission.running
        admitted = admission.one_pass()
        shut_out = [r for r in before if scheduler._room(admission.scheduler, r) < r.sampling_params.max_new_tokens]
        if idle and len(shut_out) < len(before):
            assert admitted, "nothing runs, somebody waits, and nobody was admitted"
        for request in admission.running:
            assert admission.cache.can_admit(request.lora_id), "runs without its adapter"
        if admission.running and (random_.random() < 0.5 or not admitted):
            admission.finish(random_.choice(admission.running))
            ended += 1
    if pinned:
        admission.pool.set_pinned(pinned, False)
    while admission.running or admission.waiting:
        if not admission.one_pass():
            admission.finish(admission.running[0])
            ended += 1
    assert ended > 40
    assert admission.cache.protected_size() == 0


@pytest.mark.parametrize("seed", range(6))
def test_in_our_order_nobody_is_overtaken_more_often_than_the_bound(seed: int) -> None:
    """Short requests, so that adapters run on and the room for others does not come by itself."""
    admission, random_ = Admission(affinity=True), random.Random(seed)
    for _ in range(150):
        if random_.random() < 0.95 and len(admission.waiting) < 12:
            prompt = [random_.randint(0, 5) for _ in range(random_.randint(1, 20))]
            admission.waiting.append(admission.request(random_.choice([None, *SLOTS]), prompt, random_.randint(1, 20)))
        admitted = admission.one_pass()
        if admission.running and (random_.random() < 0.5 or not admitted):
            admission.finish(random_.choice(admission.running))
    assert max(admission.overtaken.values()) == BOUND


def test_an_adapter_that_preemption_unlocked_and_evicted_is_not_run_without() -> None:
    """Upstream holds the adapter of a request for loaded that it has just preempted: the next one is let in blindly."""
    admission = Admission()
    admission.waiting = [admission.request("b", [1, 2, 3], 5)]
    (victim,) = admission.one_pass()
    admission.waiting = [admission.request("b", [4, 5, 6], 5)]
    (waiting,) = admission.waiting
    loras = {victim.lora_id}
    adder = admission.adder()
    assert admission.can_schedule(waiting, loras)
    admission.finish(victim)  # what preempt_to_schedule does: release, then evict
    admission.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    waiting.init_next_round_input(admission.cache)
    assert admission.add(adder, waiting) == AddReqResult.OTHER
    assert not adder.can_run_list
    assert admission.one_pass() == [waiting]
    assert admission.cache.can_admit(waiting.lora_id)


@pytest.mark.parametrize(("new_tokens", "preempted"), [(90, False), (10, True)])
def test_nobody_is_preempted_for_a_request_that_does_not_fit_beside_its_own_adapter(
    new_tokens: int, preempted: bool
) -> None:
    """Its adapter is loaded and not locked yet: 90 slots that look free until the request is added."""
    admission = Admission()
    admission.waiting = [admission.request(None, [1] * 60, 20), admission.request(None, [2] * 4, 10)]
    _, victim = admission.one_pass()
    newcomer = admission.request("b", [3] * 8, new_tokens)
    assert admission.can_schedule(newcomer, {None})
    for request, priority in zip((*admission.running, newcomer), (100, 0, 50), strict=True):
        request.priority = priority
    released: list[int] = []
    adder = admission.adder()
    adder.priority_scheduling_preemption_threshold = 10
    adder.running_batch.release_req = lambda index, left: released.append(index)
    adder.running_batch.filter_batch = lambda keep_indices: None
    assert schedule_policy._preempt_to_schedule(PrefillAdder.preempt_to_schedule, adder, newcomer) is preempted
    assert released == [1] * preempted
    assert adder.preempt_list == [victim] * preempted


def test_a_base_model_request_cannot_name_an_adapter_by_its_extra_key() -> None:
    admission = Admission()
    for own, lora_id in (("", None), ("tenant", None), ("", admission.id("a"))):
        extra_key = own + admission.id("a") if lora_id is None else own
        request = Req("1", "", array("q", [1]), SamplingParams(), lora_id=lora_id, extra_key=extra_key)
        schedule_batch._init(None, request)
        assert split_key(request.extra_key) == (lora_id, extra_key or None, None)


def test_two_requests_whose_adapters_do_not_fit_together_run_one_after_the_other() -> None:
    admission = Admission()
    admission.waiting = [admission.request("c", [1] * 8, 40)]
    (first,) = admission.one_pass()
    second, base = admission.request("b", [1] * 8, 40), admission.request(None, [1] * 8, 10)
    admission.waiting = [second, base]
    assert admission.one_pass() == [base], "the one that cannot be loaded lets others go on"
    for _ in range(3):
        assert admission.one_pass() == []
    admission.finish(first)
    assert admission.one_pass() == [second]


@pytest.mark.parametrize(
    ("name", "prompt", "pinned", "refused"),
    [
        ("c", 120, None, False),  # 112 slots of the adapter, 120 of the prompt, a page and one more
        ("c", 121, None, True),
        (None, 225, None, False),
        ("d", 125, "d", False),  # pinned itself: counted once
        ("d", 145, "a", True),
        (None, 125, "a", False),
    ],
)
def test_what_can_never_fit_is_refused_and_what_fits_is_shortened_until_it_runs(
    name: str | None, prompt: int, pinned: str | None, refused: bool
) -> None:
    admission = Admission()
    if pinned:
        assert admission.pool.set_pinned(admission.id(pinned), True) is None
        assert admission.pool.bring_in([admission.id(pinned)])
        admission.pool.begin_step([admission.id(pinned)])
    request = admission.request(name, [1] * prompt, 1000)
    assert bool(request.messages) == refused, request.messages
    if refused:
        assert request.lora_id is None
        assert request.extra_key is None
        assert f"{prompt} tokens" in request.messages[0]
    elif name or pinned:
        admission.waiting = [request]
        assert admission.one_pass() == [request]


@pytest.mark.parametrize("room", [0, 1])
def test_without_room_for_a_single_new_token_a_request_is_refused(room: int) -> None:
    """It would never be admitted. With pages the room is seldom exactly none."""
    admission = Admission()
    probe = admission.request("c", [1] * 8, 10)
    admission.scheduler.max_total_num_tokens -= scheduler._room(admission.scheduler, probe) - room
    request = admission.request("c", [1] * 8, 10)
    assert bool(request.messages) == (room == 0)
    if room:
        admission.waiting = [request]
        assert admission.one_pass() == [request]


def test_room_is_left_for_the_drafts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang aborts a request that is alone and has none."""
    admission = Admission()
    probe = admission.request("c", [1] * 8, 10)
    room = scheduler._room(admission.scheduler, probe)
    admission.scheduler.spec_algorithm = SpeculativeAlgorithm.NGRAM
    monkeypatch.setattr(scheduler, "get_alloc_reserve_per_decode", lambda: 24)
    assert scheduler._room(admission.scheduler, probe) == room - 24


def test_pins_that_shut_a_request_out_let_others_overtake_it() -> None:
    admission = Admission()
    long, short = admission.request("c", [1] * 90, 20), admission.request("c", [1] * 8, 4)
    pin = admission.id("d")
    assert admission.pool.set_pinned(pin, True) is None
    assert admission.pool.bring_in([pin])
    admission.pool.begin_step([pin])
    admission.waiting = [long, short]
    assert admission.one_pass() == [short]
    admission.finish(short)
    assert admission.one_pass() == []
    assert admission.pool.set_pinned(pin, False) is None
    assert admission.one_pass() == [long]
