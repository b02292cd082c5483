"""URLs become folders: from real stores, whole and checked or not at all, within the cache's bounds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blocklora_testing.stores import Faults, Store, hub_store, s3_store, web_store
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.naming.folders import NotReadable
from sglang_blocklora.sources import fetch as fetching
from sglang_blocklora.sources.cache import PART, CacheFull, FolderCache
from sglang_blocklora.sources.downloads import Downloads
from sglang_blocklora.sources.fetch import Cancelled, Unfinished, fetch
from sglang_blocklora.sources.stores import Stores, file_system

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GIB = 2**30
CUTS = {"web": 2, "hub": 1}  # huggingface_hub waits a second after each


def adapter(folder: Path, weights: bytes = b"w" * 5000, **others: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"r": 4}))
    (folder / WEIGHTS).write_bytes(weights)
    for name, data in others.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name != ".lock"}


def whole(cache: FolderCache) -> list[str]:
    """What is in the cache."""
    return sorted(one.name for one in cache.root.iterdir()) if cache.root.exists() else []


@pytest.fixture
def cache(tmp_path: Path) -> FolderCache:
    return FolderCache(tmp_path / "cache", GIB)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.001)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def web(root: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with web_store(root, faults) as store:
        use(store, monkeypatch)
        yield store


@pytest.fixture
def hub(root: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from huggingface_hub import HfFileSystem

    with hub_store(root, faults) as store:
        use(store, monkeypatch)
        address = store.environment["HF_ENDPOINT"]  # read where it is imported
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        yield store
        HfFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Store]:
    with s3_store() as store:
        yield store


@pytest.fixture
def s3(s3_server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import s3fs

    use(s3_server, monkeypatch)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_server
    s3fs.S3FileSystem.clear_instance_cache()


def use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


def get(url: str, cache: FolderCache, stop: threading.Event | None = None) -> Path:
    held = fetch("sql", url, cache, stop or threading.Event())
    held.release()
    return held.folder


# Each kind of store.


@pytest.mark.parametrize("kind", ["web", "hub", "s3"])
def test_an_adapter_comes_as_it_is_once_for_each_revision(
    kind: str, request: pytest.FixtureRequest, cache: FolderCache, tmp_path: Path
) -> None:
    store = request.getfixturevalue(kind)
    source = adapter(tmp_path / "made", tokenizer_config__json=b"{}", optimizer__pt=b"never", train__py=b"never")
    store.put(f"{kind}-one", source)
    url = f"{store.url}/{kind}-one"
    first = get(url, cache)
    wanted = {CONFIG, WEIGHTS, "tokenizer_config.json"}
    assert files(first) == {name: data for name, data in files(source).items() if name in wanted}
    assert get(url, cache) == first
    adapter(source, b"v" * 6000)
    store.put(f"{kind}-one", source)
    second = get(url, cache)
    assert second != first
    assert files(second)[WEIGHTS] == b"v" * 6000
    assert whole(cache) == sorted([first.name, second.name])


@pytest.mark.parametrize("kind", ["web", "hub", "s3"])
def test_names_below_a_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = request.getfixturevalue(kind)
    source = adapter(tmp_path / "made")
    store.put(f"{kind}-names-a", source)
    store.put(f"{kind}-names-b", source)
    stores = Stores([store.url])
    assert stores.find(f"{kind}-names-a") == f"{store.url}/{kind}-names-a"
    for name in (
        "nobody",
        "",
        "..",
        ".",
        ".git",
        f"{kind}-names-a/../{kind}-names-b",
        f"{kind}-names-a/",
        "%2e%2e",
        "a?b",
        "a\0b",
        "a@b",
    ):
        assert stores.find(name) is None, name
    listed = {name: url for name, url in stores.all().items() if name.startswith(f"{kind}-names")}
    expected = {f"{kind}-names-{one}": f"{store.url}/{kind}-names-{one}" for one in "ab"}
    assert listed == ({} if kind == "hub" else expected), "repositories of the Hub are not listed"


def test_a_store_that_hangs_while_it_is_listed_holds_one_asker(
    web: Store, faults: Faults, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(60):
        adapter(root / f"long-name-of-an-adapter-{i}")
    reached, go = threading.Event(), threading.Event()
    faults.pause = lambda: (reached.set(), go.wait(20))
    stores = Stores([web.url])
    first = threading.Thread(target=stores.all)
    first.start()
    assert reached.wait(20)
    assert stores.all() == {}, "others are told what is known"
    go.set()
    first.join()
    assert len(stores.all()) == 60


@pytest.mark.parametrize("kind", ["web", "hub", "s3"])
def test_what_is_not_an_adapter_is_refused_as_a_folder_would_be(
    kind: str, request: pytest.FixtureRequest, cache: FolderCache, tmp_path: Path
) -> None:
    store = request.getfixturevalue(kind)
    pickled = adapter(tmp_path / "made", adapter_model__bin=b"x")
    (pickled / WEIGHTS).unlink()
    store.put(f"{kind}-pickled", pickled)
    (pickled / "adapter_model.bin").unlink()
    store.put(f"{kind}-empty", pickled)
    for name, message in ((f"{kind}-pickled", "unpickling"), (f"{kind}-empty", f"no {WEIGHTS}"), (f"{kind}-no", "no")):
        with pytest.raises(AdapterError, match=message) as refused:
            get(f"{store.url}/{name}", cache)
        assert f"{store.url}/{name}" in str(refused.value)
    assert whole(cache) == []


def test_a_store_that_does_not_answer_or_refuses_is_told(
    web: Store, faults: Faults, cache: FolderCache, root: Path
) -> None:
    adapter(root / "one")
    for status, message in ((401, "not readable"), (403, "not readable"), (500, "cannot be read.*500")):
        faults.status = {CONFIG: status}
        with pytest.raises(AdapterError, match=message):
            get(f"{web.url}/one", cache)
        with pytest.raises(NotReadable, match=str(status)):
            Stores([web.url]).find("one")
    closed = "http://127.0.0.1:9"
    with pytest.raises(AdapterError, match="cannot be read"):
        get(f"{closed}/one", cache)
    assert Stores([closed]).all() == {}
    assert whole(cache) == []


def test_s3_without_credentials_or_bucket(s3: Store, cache: FolderCache, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with pytest.raises(AdapterError, match="nothing at s3://nowhere/x"):
        get("s3://nowhere/x", cache)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AdapterError, match=r"not readable.*docs/sources\.md"):
        get("s3://models/adapters/x", cache)


# Bytes on their way.


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
        use(store, monkeypatch)
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


# The cache's bound.


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


def some_came(cache: FolderCache) -> bool:
    """Whether bytes of weights are in the cache."""
    return any(file.stat().st_size for file in cache.root.glob(f"*/{WEIGHTS}"))


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never held")
