"""A subscriber to SGLang's KV events, as a KV-aware router would be."""

from __future__ import annotations

import os
import warnings

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "KVEventBatch", "Subscriber"]


class Subscriber:
    """What a router makes of the events: block hash -> (adapter's number, salt, the token path up to it)."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.blocks: dict[int, tuple] = {}

    def replay(self, events: list) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.blocks.clear()
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    del self.blocks[block]
            else:
                self.store(event)

    def store(self, event: BlockStored) -> None:
        space = (event.lora_id, event.cache_salt)
        *parent_space, path = self.blocks[event.parent_block_hash] if event.parent_block_hash else (*space, ())
        # What is behind an invocation stands behind the base model's blocks.
        assert tuple(parent_space) in (space, (None, event.cache_salt))
        assert event.block_size == self.page_size
        assert len(event.token_ids) == len(event.block_hashes) * self.page_size
        for i, block in enumerate(event.block_hashes):
            path += tuple(event.token_ids[i * self.page_size : (i + 1) * self.page_size])
            assert block not in self.blocks, "two blocks of one hash"
            self.blocks[block] = (*space, path)
