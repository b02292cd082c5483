"""URLs of adapters in SGLang's HTTP process: who may, what schedulers get, and what becomes of the folders."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocklora_testing.adapter_world import World, until
from blocklora_testing.stores import Faults, Store, web_store
from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME
from sglang_blocklora.settings import Settings
from sglang_blocklora.sources.cache import FolderCache


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def store(faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name in ("a", "b"):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / CONFIG_NAME).write_text("{}")
        (tmp_path / "store" / name / WEIGHTS_NAME).write_bytes(name.encode() * 3000)
    with web_store(tmp_path / "store", faults) as store:
        for variable, value in store.environment.items():
            monkeypatch.setenv(variable, value)
        yield store


@pytest.fixture
def cache(world: World, tmp_path: Path) -> FolderCache:
    made = FolderCache(tmp_path / "cache", 2**20)
    world.manager.blocklora_adapters.downloads.cache = made
    return made


def in_use(cache: FolderCache) -> set[str]:
    """Names of the folders that nobody could remove; the others are removed."""
    return {folder.name for folder in cache.root.iterdir() if not cache.remove(folder)}


def test_only_urls_that_the_operator_gave_are_fetched(world: World, store: Store, cache: FolderCache) -> None:
    async def scenario() -> None:
        for route in ("/load_lora_adapter", "/v1/load_lora_adapter"):
            for others in ({}, {"adapter_dirs": (f"{store.url}/b",)}, {"adapter_roots": ("s3://x",)}):
                with Settings(**others).exported():
                    status, answer = await world.post(route, {"lora_name": "x", "lora_path": f"{store.url}/a"})
                    assert (status, "--adapter-root" in str(answer)) == (403, True)
            with Settings(adapter_roots=(store.url,)).exported():
                for path in (f"{store.url}/a/../a", f"{store.url}/a?x", f"{store.url}/%61"):
                    status, answer = await world.post(route, {"lora_name": "x", "lora_path": path})
                    assert (status, "URL" in str(answer)) == (400, True), path
        assert world.scheduler.asked == []
        with Settings(adapter_roots=(store.url,)).exported():
            body = {"lora_name": "x", "lora_path": f"{store.url}/a/"}
            assert (await world.post("/v1/load_lora_adapter", body))[0] == 200

    world.run(scenario)
    (asked,) = world.scheduler.asked
    assert Path(asked.lora_path).parent == cache.root


def test_a_folder_is_kept_for_as_long_as_somebody_has_the_adapter(
    world: World, store: Store, cache: FolderCache, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with Settings(adapter_dirs=(store.url, str(tmp_path / "store" / "a"))).exported():
            assert await world.models() == {"a", "b"}
            running = await world.stream("a")
            (asked,) = world.scheduler.asks("Load", "a")
            assert in_use(cache) == {Path(asked.lora_path).name}
            leaving = asyncio.ensure_future(world.unload("a"))
            await until(lambda: "a" not in world.manager.lora_registry._registry)
            assert in_use(cache) == {Path(asked.lora_path).name}, "its request runs"
            world.scheduler.end_all()
            assert (await running)[0] == 200
            assert (await leaving)[0] == 200
            assert in_use(cache) == set()

    world.run(scenario)


def test_a_load_that_is_refused_keeps_no_folder_and_the_name_stays_unknown(
    world: World, store: Store, faults: Faults, cache: FolderCache
) -> None:
    world.scheduler.refused = {"b"}

    async def scenario() -> None:
        with Settings(adapter_dirs=(store.url,)).exported():
            status, answer = await world.generate("b")
            assert (status, "broken" in str(answer)) == (400, True)
            faults.status = {WEIGHTS_NAME: 500}
            status, answer = await world.generate("a")
            assert (status, f"{store.url}/a" in str(answer)) == (400, True)
            status, answer = await world.generate("nobody")
            assert (status, store.url in str(answer)) == (400, True)
            faults.status = {CONFIG_NAME: 503}
            status, answer = await world.generate("a")
            assert (status, "does not tell" in str(answer)) == (400, True)

    world.run(scenario)
    assert in_use(cache) == set()


def test_an_unload_stops_a_download_and_leaves_nothing(
    world: World, store: Store, faults: Faults, cache: FolderCache
) -> None:
    reached, go = threading.Event(), threading.Event()
    faults.pause = lambda: (reached.set(), go.wait(20))

    async def scenario() -> None:
        with Settings(adapter_dirs=(store.url,)).exported():
            body = {"lora_name": "x", "lora_path": f"{store.url}/a"}
            loading = asyncio.ensure_future(world.post("/v1/load_lora_adapter", body))
            await until(reached.is_set)
            other = await world.load("other")
            assert other[0] == 200, "nobody waits for a download"
            unloading = asyncio.ensure_future(world.unload("x"))
            await asyncio.sleep(0)
            go.set()
            status, answer = await loading
            assert (status, "an unload while" in str(answer)) == (400, True)
            assert (await unloading)[0] == 200
            assert (await world.unload("x"))[0] == 400
            assert list(cache.root.iterdir()) == []

    world.run(scenario)
