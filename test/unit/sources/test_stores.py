"""Adapters come from each kind of real store as they are, or are refused as folders would be."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from blocklora_testing.stores import CONFIG, WEIGHTS, Faults, Store, adapter, files, get, whole
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.naming.folders import NotReadable
from sglang_blocklora.sources.cache import FolderCache
from sglang_blocklora.sources.stores import Stores


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
