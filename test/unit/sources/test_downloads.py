"""Bytes on their way: whole and checked, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blocklora_testing.stores import CONFIG, GIB, WEIGHTS, Faults, Store, adapter, files, get, web_store, whole
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sources.cache import PART, FolderCache
from sglang_blocklora.sources.downloads import Downloads
from sglang_blocklora.sources.fetch import Cancelled, Unfinished
from sglang_blocklora.sources.stores import file_system

CUTS = {"web": 2, "hub": 1}  # huggingface_hub waits a second after each


@pytest.mark.parametrize("kind", ["web", "hub"])
def test_a_connection_that_breaks_goes_on_where_it_broke(
    kind: str, request: pytest.FixtureRequest, faults: Faults, cache: FolderCache, root: Path
) -> None:
    store = request.getfixturevalue(kind)
    data = os.urandom(3 * 2**20)
    adapter(root / "one", data)
    faults.cuts = {WEIGHTS: CUTS[kind]}
    faults.pause = lambda: until(lambda: kind == "hub" or some_came(cache))
    assert files(get(f"{store.url}/one", cache))[WEIGHTS] == data
    ranges = [asked for path, asked in faults.asked if path.endswith(WEIGHTS)]
    assert len(ranges) == 1 + CUTS[kind]
    if kind == "web":
        assert ranges[0] is None
        assert "bytes=0-" not in str(ranges[1:])


def test_a_server_without_ranges_or_revisions_is_read_from_the_start(
    root: Path, cache: FolderCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(2**21)
    adapter(root / "one", data)
    faults = Faults(cuts={WEIGHTS: 1}, ranges=False)
    with web_store(root, faults, etags=False) as store:
        store.use(monkeypatch)
        first = get(f"{store.url}/one", cache)
        assert files(first)[WEIGHTS] == data
        assert get(f"{store.url}/one", cache) != first, "whether it is the same nobody knows"


def test_what_a_broken_store_gave_is_kept_for_the_next_try(
    web: Store, faults: Faults, cache: FolderCache, root: Path
) -> None:
    data = os.urandom(2**21)
    adapter(root / "one", data)
    faults.cuts = {WEIGHTS: 1}

    def broken() -> None:
        until(lambda: some_came(cache))
        faults.status = {WEIGHTS: 503}

    faults.pause = broken
    with pytest.raises(Unfinished, match="half-way"):
        get(f"{web.url}/one", cache)
    assert [name.endswith(PART) for name in whole(cache)] == [True]
    faults.status, faults.pause, faults.asked = {}, lambda: None, []
    assert files(get(f"{web.url}/one", cache))[WEIGHTS] == data
    assert ("/one/adapter_model.safetensors", None) not in faults.asked, "it went on"
    assert not any(name.endswith(PART) for name in whole(cache))


def test_damaged_bytes_are_refused_and_leave_nothing(
    hub: Store, faults: Faults, cache: FolderCache, root: Path
) -> None:
    adapter(root / "one")
    for name, kind in ((WEIGHTS, "sha256"), (CONFIG, "git")):
        faults.damaged = {name}
        with pytest.raises(AdapterError, match=f"{name} whose {kind} is .* as its store says"):
            get(f"{hub.url}/one", cache)
        assert whole(cache) == []
    faults.damaged = set()
    get(f"{hub.url}/one", cache)


def test_s3_bytes_are_held_to_its_checksums(s3: Store, cache: FolderCache, tmp_path: Path, monkeypatch) -> None:
    s3.put("sums", adapter(tmp_path / "made"))
    true = file_system(s3.url).open

    class Damaged:
        def __init__(self, file) -> None:
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            self._file.close()

        def read(self, count: int) -> bytes:
            return self._file.read(count).replace(b"w", b"v")

    monkeypatch.setattr(type(file_system(s3.url)), "open", lambda self, *args, **kwargs: Damaged(true(*args, **kwargs)))
    with pytest.raises(AdapterError, match=f"{WEIGHTS} whose md5 is"):
        get(f"{s3.url}/sums", cache)
    assert whole(cache) == []


def test_files_that_change_meanwhile_are_refused(web: Store, faults: Faults, cache: FolderCache, root: Path) -> None:
    adapter(root / "one")
    faults.pause = lambda: (root / "one" / CONFIG).write_text("{}")
    with pytest.raises(AdapterError, match="changed while they were fetched"):
        get(f"{web.url}/one", cache)
    assert whole(cache) == []


def test_a_cancelled_download_leaves_nothing(web: Store, faults: Faults, cache: FolderCache, root: Path) -> None:
    adapter(root / "one", bytes(3 * 2**20))
    stop = threading.Event()
    faults.pause = stop.set
    with pytest.raises(Cancelled):
        get(f"{web.url}/one", cache, stop)
    assert whole(cache) == []


def test_an_unload_stops_the_download_of_its_name_only(
    web: Store, faults: Faults, cache: FolderCache, root: Path
) -> None:
    adapter(root / "one", bytes(3 * 2**20))
    reached, go = threading.Event(), threading.Event()
    faults.pause = lambda: (reached.set(), go.wait(20))
    downloads = Downloads(cache)

    async def scenario() -> None:
        coming = asyncio.ensure_future(downloads.folder("sql", "1", f"{web.url}/one"))
        assert await asyncio.to_thread(reached.wait, 20)
        assert not downloads.cancel("other")
        assert downloads.cancel("sql")
        go.set()
        with pytest.raises(Cancelled):
            await coming
        assert not downloads.cancel("sql")
        assert await downloads.folder("plain", "2", "/a/folder") == "/a/folder"

    asyncio.run(scenario())
    assert whole(cache) == []


FETCHING = """
import sys, threading
from pathlib import Path
from sglang_blocklora.sources.cache import FolderCache
from sglang_blocklora.sources.fetch import fetch
fetch("sql", sys.argv[1], FolderCache(Path(sys.argv[2]), 2**30), threading.Event())
"""


def test_a_killed_process_leaves_what_another_goes_on_with(
    web: Store, faults: Faults, cache: FolderCache, root: Path
) -> None:
    data = os.urandom(4 * 2**20)
    adapter(root / "one", data)
    reached, go = threading.Event(), threading.Event()
    faults.pause = lambda: (reached.set(), go.wait(20))
    process = subprocess.Popen([sys.executable, "-c", FETCHING, f"{web.url}/one", str(cache.root)])
    assert reached.wait(60)
    (part,) = cache.root.glob(f"*{PART}")
    until(lambda: (part / WEIGHTS).exists() and (part / WEIGHTS).stat().st_size > 0)
    assert not cache.remove(part), "somebody writes it"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    go.set()
    faults.pause = lambda: None
    assert files(get(f"{web.url}/one", cache))[WEIGHTS] == data
    assert not list(cache.root.glob(f"*{PART}"))


def test_several_that_want_the_same_fetch_it_once(web: Store, faults: Faults, cache: FolderCache, root: Path) -> None:
    adapter(root / "one", bytes(2**20))
    faults.pause = lambda: time.sleep(0.2)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(get(f"{web.url}/one", FolderCache(cache.root, GIB))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len([path for path, _ in faults.asked if path.endswith(WEIGHTS)]) == 1


def some_came(cache: FolderCache) -> bool:
    """Whether bytes of weights are in the cache."""
    return any(file.stat().st_size for file in cache.root.glob(f"*/{WEIGHTS}"))


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never held")
