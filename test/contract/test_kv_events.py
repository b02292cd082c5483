"""KV events of the real tree: whoever replays them knows what is cached, and nothing of adapters' weights."""

from __future__ import annotations

import random
import warnings
from collections import Counter

import pytest
import torch
from blocklora_testing.real_cache import AdapterPrefixCache, UnifiedRadixCache, digest, key_of, new_cache
from blocklora_testing.subscriber import Subscriber
from blocklora_testing.upstream import insert_params, matched_slots

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

POOL_TOKENS = 240
# lora_id (short) -> contents: x and z are the same bytes, e and f are activated by the last 1 of a prompt
CONTENTS = {None: None, "x": "A", "y": "B", "z": "A", "e": "E", "f": "F"}
ACTIVATED = ("E", "F")
SPACES = [(name, user, salt) for name in CONTENTS for user in (None, "u") for salt in (None, "s", "t")]
NO_IDS = (-1, 1 << 32, 1 << 62, -(1 << 63))  # what a client can write that is no token of any vocabulary


class Operations:
    """Random requests without locks on one cache; remembers every key that was ever inserted."""

    def __init__(self, cache: AdapterPrefixCache, page_size: int, seed: int, spaces: list[tuple] = SPACES) -> None:
        self.cache, self.page_size, self.random = cache, page_size, random.Random(seed)
        self.inserted: dict[tuple, set[tuple[tuple[int, ...], int | None]]] = {space: set() for space in spaces}

    def key(self, space: tuple, tokens: list[int], first: int | None) -> RadixKey:
        name, user, salt = space
        return key_of(tokens, digest(name)[:32] if name else None, user, salt, first)

    def reserve(self, count: int):
        allocator = self.cache.token_to_kv_pool_allocator
        if count > allocator.available_size():
            self.cache.evict(EvictParams(num_tokens=count - allocator.available_size()))
        return allocator.alloc(count)

    def step(self, *, hostile: bool = False) -> None:
        """Insert a key (in two chunks, as chunked prefill does), evict, or rarely flush.

        hostile  some keys hold what is no id
        """
        choice = self.random.random()
        if choice < 0.15:
            self.cache.evict(EvictParams(num_tokens=self.random.randint(1, 60)))
        elif choice < 0.17:
            self.cache.reset()
            self.cache.token_to_kv_pool_allocator.clear()
        else:
            space = self.random.choice(list(self.inserted))
            tokens = [self.random.randint(0, 1) for _ in range(self.random.randint(1, 5) * self.page_size)]
            if hostile and self.random.random() < 0.2:
                tokens[self.random.randrange(len(tokens))] = self.random.choice(NO_IDS)
            self.insert(space, tokens, self.random.randint(0, len(tokens) // self.page_size) * self.page_size)

    def insert(self, space: tuple, tokens: list[int], middle: int) -> None:
        first = None
        if CONTENTS[space[0]] in ACTIVATED:
            first = max((at for at, token in enumerate(tokens) if token == 1), default=None)
            space = space if first is not None else (None, *space[1:])
        name = space[0]
        lora_id = digest(name)[:32] if name else None
        if lora_id and self.cache.slots_of(lora_id) is None:
            self.cache.publish(lora_id, self.cache.reserve(lora_id))
        match = self.cache.match_prefix(MatchPrefixParams(key=self.key(space, tokens, first)))
        receipt = self.cache.inc_lock_ref(match.last_device_node).to_dec_params()
        matched = matched_slots(self.cache, match)
        own = self.reserve(len(tokens) - len(matched)) if len(tokens) > len(matched) else matched[:0]
        values = torch.cat([matched, own])
        for end in sorted({max(middle, len(matched)), len(tokens)}):
            params = insert_params(self.key(space, tokens[:end], first), values[:end], len(matched))
            if self.cache.insert(params).rotation_tail_declined:
                assert set(tokens[:end]) & set(NO_IDS)
                self.cache.token_to_kv_pool_allocator.free(values[len(matched) :])
                break
            found = self.cache.match_prefix(MatchPrefixParams(key=self.key(space, tokens[:end], first)))
            matched = values[:end] = matched_slots(self.cache, found)
        self.cache.dec_lock_ref(match.last_device_node, receipt)
        self.inserted[space].add((tuple(tokens[: len(matched)]), first))

    def truth(self) -> Counter:
        """(adapter's number, salt, token path) of all cached blocks, asked of the tree; users' keys are not told."""
        found: set[tuple] = set()
        for space, keys in self.inserted.items():
            name, user, salt = space
            contents = CONTENTS[name]
            number = int(digest(contents)[:15], 16) if contents else None
            for tokens, first in keys:
                match = self.cache.match_prefix(MatchPrefixParams(key=self.key(space, list(tokens), first)))
                for end in range(self.page_size, len(matched_slots(self.cache, match)) + 1, self.page_size):
                    own = end > (first or 0)  # a page that holds tokens of both is the adapter's
                    found.add((number if own else None, salt, tokens[:end], user, first if own else None))
        return Counter(entry[:3] for entry in found)


@pytest.mark.parametrize(("page_size", "seed"), [(1, 0), (1, 1), (4, 2), (4, 3)])
def test_a_subscriber_knows_what_is_cached(page_size: int, seed: int) -> None:
    cache = new_cache(page_size, POOL_TOKENS, events=True)
    for name, contents in CONTENTS.items():
        if contents:
            cache.know(digest(name)[:32], digest(contents), 12, activated=contents in ACTIVATED)
    operations, subscriber = Operations(cache, page_size, seed), Subscriber(page_size)
    most = 0
    for step in range(300):
        operations.step(hostile=True)
        if step % 7 == 0:
            subscriber.replay(cache.take_events())
            assert Counter(subscriber.blocks.values()) == operations.truth()
            most = max(most, len(subscriber.blocks))
    assert most > 10, "nothing was cached: the test shows nothing"
    cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    subscriber.replay(cache.take_events())
    assert subscriber.blocks == {}


@pytest.mark.parametrize("page_size", [1, 4])
def test_events_of_the_base_model_are_upstreams_own(page_size: int) -> None:
    """The same operations without adapters and users' keys on upstream's cache: the same events, hashes too."""
    found = []
    for kind in (AdapterPrefixCache, UnifiedRadixCache):
        cache = new_cache(page_size, POOL_TOKENS, events=True, kind=kind)
        operations, events = Operations(cache, page_size, 4, [(None, None, None), (None, None, "s")]), []
        for _ in range(100):
            operations.step()
            events.append(cache.take_events())
        found.append(events)
    assert found[0] == found[1]
    assert sum(map(len, found[0])) > 50


def test_no_events_are_kept_where_nobody_asked_for_them() -> None:
    cache = new_cache(1, POOL_TOKENS)
    Operations(cache, 1, 5).insert((None, None, None), [1, 2, 3], 0)
    assert cache.take_events() == []
