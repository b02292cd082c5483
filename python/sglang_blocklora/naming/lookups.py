"""Asks a file system from an event loop, which goes on whether or not there is an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from sglang_blocklora.naming.model_names import UnknownModel

Answer = TypeVar("Answer")

LOOKUP_SECONDS = 10.0
# Threads of their own: while a file system hangs it holds some of these and none that others need.
FOLDERS = ThreadPoolExecutor(8, thread_name_prefix="adapter-folders")
STORES = ThreadPoolExecutor(8, thread_name_prefix="adapter-stores")  # of URLs


class NoAnswer(UnknownModel, ValueError):
    """A file system did not answer in time: who has a name is not known yet."""

    status_code = 503


async def look_up(question: Callable[..., Answer], *arguments: Any, threads: Executor = FOLDERS) -> Answer:
    """``question(*arguments)``, asked by one of ``threads``. Raises ``NoAnswer`` after ``LOOKUP_SECONDS``."""
    asked = asyncio.get_running_loop().run_in_executor(threads, question, *arguments)
    try:
        await asyncio.wait({asked}, timeout=LOOKUP_SECONDS)
        if not asked.done():
            raise NoAnswer(f"The folders of the adapters have not answered for {LOOKUP_SECONDS:g} s. Try again later.")
        return asked.result()
    finally:
        asked.cancel()  # one that no thread has begun is not asked later either
