"""The cache of fetched adapters keeps to its bound."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from blocklora_testing.stores import GIB, Store, adapter, get, whole
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sources.cache import CacheFull, FolderCache
from sglang_blocklora.sources.fetch import fetch


def test_the_least_recently_used_that_nobody_has_makes_room(web: Store, root: Path, tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 25_000)
    for name in "abcd":
        adapter(root / name, bytes(8000) + name.encode())
    held = fetch("a", f"{web.url}/a", cache, threading.Event())
    old, kept = get(f"{web.url}/b", cache), get(f"{web.url}/c", cache)
    for age, folder in ((300, held.folder), (200, old), (100, kept)):
        os.utime(folder, (time.time() - age,) * 2)
    new = get(f"{web.url}/d", cache)
    assert whole(cache) == sorted(one.name for one in (held.folder, kept, new))
    second = [fetch(name, f"{web.url}/{name}", cache, threading.Event()) for name in "cd"]
    with pytest.raises(AdapterError, match=r"loaded or on their way.*--adapter-cache-gb"):
        get(f"{web.url}/b", cache)
    assert len(whole(cache)) == 3
    for one in (held, *second):
        one.release()
    get(f"{web.url}/b", cache)


def test_what_is_larger_than_the_cache_puts_nothing_out(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, 100)
    part = cache.begin("k" * 64, 60, lambda: None)
    assert part is not None
    (part.folder / "file").write_bytes(bytes(60))
    part.finish()
    with pytest.raises(CacheFull):
        cache.begin("l" * 64, 101, lambda: None)
    assert whole(cache) == ["k" * 64]


def test_a_cache_that_cannot_be_written_is_told(web: Store, root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    adapter(root / "one")
    with pytest.raises(AdapterError, match=r"cannot keep .*--adapter-cache-dir"):
        get(f"{web.url}/one", FolderCache(tmp_path / "file", GIB))
