"""Fetches adapters beside an event loop, and keeps their folders for as long as somebody may read them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from sglang_blocklora.sources.cache import FolderCache, Held
from sglang_blocklora.sources.fetch import fetch
from sglang_blocklora.sources.urls import is_url

AT_ONCE = 8


class Downloads:
    """What one process fetches, for adapters by their ``lora_id``. For one event loop."""

    def __init__(self, cache: FolderCache) -> None:
        self.cache = cache
        self._held: dict[str, Held] = {}
        self._coming: dict[str, threading.Event] = {}  # name of an adapter -> what stops its download
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="adapter-downloads")

    async def folder(self, name: str, lora_id: str, path: str) -> str:
        """The folder of the adapter at ``path``, which may be a URL; it stays until ``release``.

        Raises ``AdapterError``. A caller that is cancelled stops the download.
        """
        if not is_url(path):
            return path
        stop = self._coming[name] = threading.Event()
        try:
            run = asyncio.get_running_loop().run_in_executor
            self._held[lora_id] = await run(self._threads, fetch, name, path, self.cache, stop)
        finally:
            stop.set()
            del self._coming[name]
        return str(self._held[lora_id].folder)

    def cancel(self, name: str) -> bool:
        """Stop what is on its way under ``name``; whether there was something."""
        if name not in self._coming:
            return False
        self._coming[name].set()
        return True

    def release(self, lora_id: str) -> None:
        """Nobody reads this adapter's folder any more, if it has one of the cache's."""
        held = self._held.pop(lora_id, None)
        if held is not None:
            held.release()
