"""Random operations on the cache in which adapters are prefixes, over SGLang's real tree and allocator."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang_blocklora.memory.eviction import STRATEGIES

from blocklora_testing.real_cache import digest, key_of, new_cache
from blocklora_testing.upstream import insert_params, matched_slots

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from sglang.srt.arg_groups.choices import RADIX_EVICTION_POLICY_CHOICES
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

POOL_TOKENS = 192
MAX_RUNNING = 4
STEPS_BETWEEN_FLUSHES = 15
# Conversations that begin alike or not, so that whole pages match.
ORDINARY = st.builds(
    lambda kind, length, tail: ([kind] * 20 + [kind, 0, 1] * 14)[:length] + tail,
    st.integers(0, 2),
    st.sampled_from([33, 48]) | st.sampled_from([33, 48]) | st.integers(1, 60),
    st.just([]) | st.lists(st.integers(0, 2), max_size=4),
)
# What a client could send to be taken for someone else: the marks of an adapter, which count from 0, and any int64.
COUNTING = st.builds(lambda slots, tail: [*range(slots), *tail], st.integers(1, 50), st.lists(st.integers(0, 2)))
ANY_ID = st.sampled_from([-1, 1 << 32, 1 << 62, 1 << 62 | 1, -(1 << 63)]) | st.integers(-(1 << 63), (1 << 63) - 1)
PROMPTS = ORDINARY | COUNTING | st.builds(lambda tokens, bad: [*tokens, bad], ORDINARY, ANY_ID)
# Extra keys and salts: some of the client's own, and what the cache uses itself.
CLIENTS = st.sampled_from([None] * 8) | st.sampled_from(
    ["u", "s", digest("A"), digest("id0")[:32], "32:" + digest("id0")[:32], "32@5:" + digest("id0")[:32], ":", "|"]
)
# Activated adapters: contents -> the tokens that activate them.
INVOCATIONS = {"E": [1], "F": [2], "G": [1]}


def last_of(tokens: list[int], wanted: list[int]) -> int | None:
    """Where ``wanted`` begins for the last time in ``tokens``."""
    places = (at for at in range(len(tokens) - len(wanted), -1, -1) if tokens[at : at + len(wanted)] == wanted)
    return next(places, None)


def disguised(tokens: list[int], contents: str) -> list[int]:
    """What a client could send who knows how the tree has ``tokens`` of an activated adapter, the number included."""
    first, number = last_of(tokens, INVOCATIONS[contents]) or 0, 1 + list(INVOCATIONS).index(contents)
    return [token if at < first else 1 << 62 | number << 32 | token for at, token in enumerate(tokens)]


@dataclass
class Running:
    """A request that holds a lock: its tokens, what the tree holds of them, and the slots it allocated itself.

    user   the client's own extra key
    space  what its KV is written as beside its owner: the user's key and salt
    first  its first token that is an activated adapter's; those before it are the base model's
    """

    tokens: list[int]
    user: str | None
    salt: str | None
    contents: str
    space: str
    adapter: str | None
    matched: torch.Tensor
    own: torch.Tensor
    node: object
    receipt: object
    first: int | None = None

    @property
    def key(self) -> RadixKey:
        return key_of(self.tokens, self.adapter, self.user, self.salt, self.first)

    @property
    def path(self) -> list[str]:
        """What the KV of each token is."""
        own = f"{self.contents}|{self.space}" if self.first is None else f"{self.contents}|{self.space}|{self.first}"
        spaces = [f"base|{self.space}"] * (self.first or 0) + [own] * len(self.tokens)
        return [f"{spaces[i]} {self.tokens[: i + 1]}" for i in range(len(self.tokens))]


class CacheMachine(RuleBasedStateMachine):
    """``memory[slot]`` says what was written there: an adapter's row, or a token path in a namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Running] = []
        self.adapters: dict[str, str] = {}  # lora_id -> contents
        self.sizes: dict[str, int] = {}  # contents -> slots
        self.pinned: dict[str, str] = {}  # lora_id -> contents
        self.count = 0
        self.steps_since_flush = 0

    @initialize(
        page_size=st.sampled_from([1, 16]),
        strategy=st.sampled_from(sorted(STRATEGIES)),
        eviction_policy=st.sampled_from(RADIX_EVICTION_POLICY_CHOICES),
        core=st.sampled_from(["rust", "python"]),
    )
    def make(self, page_size: int, strategy: str = "lru", eviction_policy: str = "lru", core: str = "rust") -> None:
        self.page_size = page_size
        self.cache = new_cache(page_size, POOL_TOKENS, policy=eviction_policy, core=core)
        self.strategy, self.cache.strategy = strategy, STRATEGIES[strategy]()
        self.moves: Counter[str] = Counter()  # content hash -> times published, less times evicted
        self.cache.on_evicted = lambda content_hash: self.moves.update({content_hash: -1})
        self.memory = ["" for _ in range(POOL_TOKENS + page_size)]
        for contents, slots in (("A", 7), ("B", 20), ("C", 33), ("E", 9), ("F", 18), ("G", 4)):
            self.load(contents, slots)

    @property
    def allocator(self):
        return self.cache.token_to_kv_pool_allocator

    @rule(contents=st.sampled_from("ABCDEFG"), slots=st.integers(1, 50))
    def load(self, contents: str, slots: int) -> None:
        """A new name for new or known bytes: reloading is loading the same contents under a new id."""
        lora_id = digest(f"id{self.count}")[:32]
        self.count += 1
        self.sizes.setdefault(contents, slots)
        self.cache.know(lora_id, digest(contents), self.sizes[contents], contents in INVOCATIONS)
        self.adapters[lora_id] = contents

    def make_resident(self, lora_id: str) -> bool:
        contents = self.adapters[lora_id]
        slots = self.cache.slots_of(lora_id)
        if slots is None:
            free = self.allocator.available_size()
            slots = self.cache.reserve(lora_id)
            if slots is None:
                assert self.allocator.available_size() == free, "evicted in vain"
                return False
            for row, slot in enumerate(slots.tolist()):
                self.memory[slot] = f"weights {contents} {row}"
            self.cache.publish(lora_id, slots)
            self.moves[digest(contents)] += 1
        return True

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), what=st.sampled_from(["pin", "unpin", "unload"]))
    def manage(self, data, what: str) -> None:
        """Pin or unpin an adapter, or take its name away: the tree keeps what is cached until it is evicted.

        Requests with it may go on for a while.
        """
        lora_id = data.draw(st.sampled_from(sorted(self.adapters)))
        if what == "pin":
            if self.make_resident(lora_id):
                self.cache.pin_adapter(lora_id)
                self.pinned[lora_id] = self.adapters[lora_id]
            return
        self.cache.unpin_adapter(lora_id)
        self.pinned.pop(lora_id, None)
        if what == "unload":
            self.cache.forget(lora_id)
            del self.adapters[lora_id]

    @rule(
        data=st.data(),
        prompts=st.lists(PROMPTS, min_size=1, max_size=4),
        user=CLIENTS,
        salt=CLIENTS,
    )
    def serve(self, data, prompts: list[list[int]], user: str | None, salt: str | None) -> None:
        """Whole requests, one after the other, so that there is always something cached."""
        for tokens in prompts:
            self.whole(data.draw(st.sampled_from([*sorted(self.adapters), None])), tokens, user, salt)

    @rule(data=st.data(), tokens=PROMPTS, user=CLIENTS, more=st.lists(st.integers(0, 2), max_size=8))
    def fork(self, data, tokens: list[int], user: str | None, more: list[int]) -> None:
        """One context, asked of several, who have much of it in common; then once more with what came of it."""
        names = data.draw(st.lists(st.sampled_from([*sorted(self.adapters), None]), min_size=2, max_size=6))
        for lora_id in names:
            self.whole(lora_id, tokens, user, None)
        self.whole(names[0], tokens + more, user, None)
        if all(0 <= token < 1 << 32 for token in tokens):
            self.whole(None, disguised(tokens, data.draw(st.sampled_from(sorted(INVOCATIONS)))), user, None)

    def whole(self, lora_id: str | None, tokens: list[int], user: str | None, salt: str | None) -> None:
        """A request from its beginning to its end."""
        running = len(self.running)
        self.admit(lora_id, tokens, user, salt)
        if len(self.running) > running:
            self.end(self.running.pop(), keep=True)

    @precondition(lambda self: len(self.running) < MAX_RUNNING)
    @rule(
        data=st.data(),
        tokens=PROMPTS,
        user=CLIENTS,
        salt=CLIENTS,
    )
    def start(self, data, tokens: list[int], user: str | None, salt: str | None) -> None:
        self.admit(data.draw(st.sampled_from([*sorted(self.adapters), None])), tokens, user, salt)

    def admit(self, lora_id: str | None, tokens: list[int], user: str | None, salt: str | None) -> None:
        """Adapter, match, lock, then slots for what did not match; nothing where there is no room."""
        contents = self.adapters[lora_id] if lora_id else "base"
        first = last_of(tokens, INVOCATIONS[contents]) if contents in INVOCATIONS else None
        if contents in INVOCATIONS and first is None:
            lora_id, contents = None, "base"
        key = key_of(tokens, lora_id, user, salt, first)
        self.cache.arrived(lora_id, key)
        if lora_id and first is None and self.cache.slots_of(lora_id) is None:
            missed = self.cache.match_prefix(MatchPrefixParams(key=key))
            assert len(matched_slots(self.cache, missed)) == 0, "KV without its adapter"
            assert missed.last_device_node == self.cache.root_node_handle()
        if lora_id and not self.make_resident(lora_id):
            return
        expected = self.cache.cached_tokens(key)
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        matched = matched_slots(self.cache, found)
        assert len(matched) == expected == found.full_kv_hit_length
        space = f"{user!r}|{salt!r}"
        receipt = self.cache.inc_lock_ref(found.last_device_node).to_dec_params()
        own = self.allocate(len(tokens) - len(matched))
        if own is None:
            self.cache.dec_lock_ref(found.last_device_node, receipt)
            return
        request = Running(
            list(tokens), user, salt, contents, space, lora_id, matched, own, found.last_device_node, receipt, first
        )
        found_kv = [self.memory[slot] for slot in matched.tolist()]
        assert found_kv == request.path[: len(matched)], "a request was given KV that is not its own"
        self.write(request)
        self.running.append(request)

    def write(self, request: Running) -> None:
        """What the forward pass does: KV of the tokens that did not match goes into the request's own slots."""
        for slot, text in zip(request.own.tolist(), request.path[len(request.matched) :], strict=False):
            self.memory[slot] = text

    def allocate(self, count: int) -> torch.Tensor | None:
        """Slots for ``count`` tokens, in whole pages; None where there are not enough."""
        count = -(-count // self.page_size) * self.page_size
        if count <= 0:
            return torch.empty(0, dtype=torch.int64)
        shortfall = count - self.allocator.available_size()
        if shortfall > 0:
            self.cache.evict_for_alloc(EvictParams(num_tokens=shortfall))
        return self.allocator.alloc(count)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.lists(st.integers(0, 2) | ANY_ID, max_size=20), again=st.booleans())
    def go_on(self, data, more: list[int], again: bool) -> None:
        """A chunk of prefill or some decoding: the request grows, its KV goes into the tree and its lock moves on."""
        request = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        grown = self.allocate(len(request.tokens) + len(more) - len(request.matched) - len(request.own))
        if grown is None:
            return
        request.tokens, request.own = request.tokens + more, torch.cat([request.own, grown])
        self.write(request)
        values = torch.cat([request.matched, request.own])
        key = request.key.page_aligned(self.page_size)
        if not self.insert(key, values[: len(key)], request, again):
            return
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        matched = matched_slots(self.cache, found)
        assert len(matched) == len(key), "what was just inserted does not match"
        receipt = self.cache.inc_lock_ref(found.last_device_node).to_dec_params()
        self.cache.dec_lock_ref(request.node, request.receipt)
        request.matched, request.own = matched, values[len(key) :]
        request.node, request.receipt = found.last_device_node, receipt

    def insert(self, key: RadixKey, value: torch.Tensor, request: Running, again: bool = False) -> bool:
        """Whether the tree took the slots: it must where no one else's tokens or adapter can be meant."""
        result = self.cache.insert(insert_params(key, value, len(request.matched), again=again))
        ordinary = all(0 <= token < 1 << 32 for token in key.token_ids)
        assert result.rotation_tail_declined != (ordinary and request.adapter in {None, *self.adapters})
        if result.rotation_tail_declined:
            return False
        assert len(request.matched) <= result.prefix_len <= len(key)
        return True

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data, keep: bool) -> None:
        """A request ends: its KV goes into the tree (or is thrown away: abort, retraction), and its lock goes."""
        self.end(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))), keep)

    def end(self, request: Running, keep: bool) -> None:
        values = torch.cat([request.matched, request.own])
        key = request.key.page_aligned(self.page_size)
        if keep and self.insert(key, values[: len(key)], request):
            self.allocator.free(values[len(key) :])
        else:
            self.allocator.free(request.own)
        self.cache.dec_lock_ref(request.node, request.receipt)

    @rule(count=st.one_of(st.integers(1, 40), st.integers(1, POOL_TOKENS)), for_alloc=st.booleans())
    def evict(self, count: int, for_alloc: bool = False) -> None:
        evictable, free = self.cache.evictable_size(), self.allocator.available_size()
        before = self.resident()
        evict = self.cache.evict_for_alloc if for_alloc else self.cache.evict
        evicted = evict(EvictParams(num_tokens=count)).num_tokens_evicted
        assert evicted == self.allocator.available_size() - free
        assert evicted >= min(count, evictable), "evictable_size promised more"
        if self.strategy == "kv-first" and before != self.resident():
            idle = self.resident().keys() - {request.contents for request in self.running} - set(self.pinned.values())
            idle_slots = sum(len(self.resident()[contents]) for contents in idle)
            assert self.cache.evictable_size() == idle_slots, "an adapter went before KV"

    @precondition(lambda self: self.steps_since_flush >= STEPS_BETWEEN_FLUSHES)
    @rule()
    def flush(self) -> None:
        """Upstream flushes when idle: the tree and the allocator start anew, adapters' names stay."""
        while self.running:
            self.end(self.running.pop(), keep=False)
        self.cache.reset()
        self.allocator.clear()
        self.pinned.clear()
        self.steps_since_flush = 0
        assert not self.resident()

    def resident(self) -> dict[str, list[int]]:
        """Slots of resident contents, by the cache's own account."""
        names = {digest(contents): contents for contents in self.sizes}
        return {names[key]: entry.slots.tolist() for key, entry in self.cache._entries.resident.items()}

    @invariant()
    def sound(self) -> None:
        """Everything is compared with ``memory``: who wrote each slot last, and what."""
        if not hasattr(self, "cache"):
            return
        self.steps_since_flush += 1
        own = [slot for request in self.running for slot in request.own.tolist()]
        cached = self.cache.all_values_flatten().tolist()
        pages = self.allocator.get_all_free_pages().tolist()
        free = [page * self.page_size + i for page in pages for i in range(self.page_size)]
        every = range(self.page_size, POOL_TOKENS + self.page_size) if self.page_size > 1 else range(1, POOL_TOKENS + 1)
        assert sorted(own + cached + free) == list(every), "free + cached + in use is not the pool"
        self.cache.check_slots(in_use=len(own))
        resident = self.resident()
        assert +self.moves == Counter(self.cache._entries.resident.keys()), "an eviction was not told, or told twice"
        weights = {f"weights {contents} {row}" for contents, slots in resident.items() for row in range(len(slots))}
        kv: Counter[str] = Counter()
        for slot in cached:
            if self.memory[slot].startswith("weights"):
                weights.remove(self.memory[slot])
            else:
                kv[self.memory[slot].split("|")[0]] += 1
        assert not weights, "a resident adapter's weights are not in the tree"
        assert kv.keys() <= {"base", *resident, *INVOCATIONS}, "KV in the namespace of an adapter that is not resident"
        counts = self.cache.slot_counts()
        assert counts.kv == {None if owner == "base" else digest(owner): count for owner, count in kv.items()}
        assert counts.adapters == {digest(contents): len(slots) for contents, slots in resident.items()}
        assert (counts.total, counts.free, counts.in_use) == (POOL_TOKENS, len(free), len(own))
        self.locks_are_right(resident)

    def locks_are_right(self, resident: dict[str, list[int]]) -> None:
        """What running requests and pins need is there, intact and locked, and nothing else is locked."""
        locked: set[int] = set()
        for request in self.running:
            path = request.path
            slots = torch.cat([request.matched, request.own])[: len(path)].tolist()
            assert [self.memory[slot] for slot in slots] == path, "KV of a running request is not its own"
            locked |= set(request.matched.tolist())
            if request.adapter is not None:
                assert request.contents in resident, "a running request lost its adapter"
                locked |= set(resident[request.contents])
        for contents in self.pinned.values():
            assert contents in resident, "a pinned adapter was evicted"
            locked |= set(resident[contents])
        assert self.cache.protected_size() == len(locked), "locked is not what requests and pins need"
        for lora_id, contents in self.adapters.items():
            slots = self.cache.slots_of(lora_id)
            assert (slots is not None) == (contents in resident)
            if slots is not None:
                rows = [self.memory[slot] for slot in slots.tolist()]
                assert rows == [f"weights {contents} {row}" for row in range(len(rows))], "weights overwritten"
        if not locked:
            self.cache.sanity_check()
