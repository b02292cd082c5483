"""Stores of each kind with their clients, and a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blocklora_testing.stores import GIB, Faults, Store, hub_store, s3_store, web_store
from sglang_blocklora.sources import fetch as fetching
from sglang_blocklora.sources.cache import FolderCache


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
        store.use(monkeypatch)
        yield store


@pytest.fixture
def hub(root: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from huggingface_hub import HfFileSystem

    with hub_store(root, faults) as store:
        store.use(monkeypatch)
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

    s3_server.use(monkeypatch)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_server
    s3fs.S3FileSystem.clear_instance_cache()
