"""Loading for a request, all operations at once, and what is left of them, in SGLang's real HTTP process."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blocklora_testing.adapter_world import LIMIT_S, World, until
from sglang_blocklora.naming.folders import AdapterFolders

# Loading for a request.


def test_many_requests_one_load_each_and_failures_are_not_kept(world: World, folder: Path) -> None:
    async def scenario() -> None:
        world.scheduler.refused = {"a"}
        answers = await asyncio.gather(*(world.generate("a") for _ in range(5)))
        assert {(status, body["error"]["message"]) for status, body in answers} == {(400, "adapter 'a': broken")}
        assert len(world.scheduler.asks("Load", "a")) == 1
        world.scheduler.refused = set()
        answers = await asyncio.gather(*(world.generate("a") for _ in range(5)), world.generate(["a", None, "b", "b"]))
        assert {status for status, _ in answers} == {200}
        assert [ask.lora_path for ask in world.scheduler.asks("Load", "a")] == [str(folder / "a")] * 2
        assert len(world.scheduler.asks("Load", "b")) == 1
        ids = {ask.lora_name: ask.lora_id for ask in world.scheduler.asked}
        used = [request.lora_id for request in world.scheduler.requests()]
        assert sorted(map(str, used)) == sorted(map(str, [*[ids["a"]] * 6, None, ids["b"], ids["b"]]))

    world.run(scenario)


def test_an_unknown_name_is_refused_without_a_load(world: World, folder: Path) -> None:
    async def scenario() -> None:
        status, body = await world.generate("../a")
        assert status == 400
        assert f"'../a' does not exist. Adapters: none. Others are folders below {folder}" in body["error"]["message"]
        assert world.scheduler.asked == []

    world.run(scenario)


def test_an_unload_waits_for_the_requests_themselves_not_for_a_count(world: World) -> None:
    """Upstream counts a request that is refused, and never takes it off; one with n > 1 it takes off twice."""

    async def scenario() -> None:
        await world.load("a")
        for _ in range(3):
            assert (await world.generate("a", input_ids=[1] * 100_000))[0] == 400
        params = {"max_new_tokens": 1, "n": 3}
        assert (await world.generate("a", sampling_params=params))[0] == 200
        stream = await world.stream("a")
        unload = asyncio.ensure_future(world.unload("a"))
        await until(lambda: "a" not in world.manager.lora_registry.get_all_adapters())
        assert not world.scheduler.asks("Unload", "a")
        world.scheduler.end_all()
        await stream
        assert (await unload)[1]["success"]

    world.run(scenario)


def test_adapters_of_a_batch_stay_in_use_until_all_its_answers_are_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of n answers a prompt, upstream asks for one after another; what it knows of the prompts is gone before."""
    send, asks, go_on = world.manager._send_one_request, asyncio.Event(), asyncio.Event()

    async def slow(request: Any) -> None:
        if request.sampling_params.max_new_tokens:  # for an answer, not to fill the cache first
            asks.set()
            await go_on.wait()
        await send(request)

    monkeypatch.setattr(world.manager, "_send_one_request", slow)

    async def scenario() -> None:
        await world.load("a")
        await world.load("b")
        later = world.manager.lora_registry.get_all_adapters()["b"].lora_id
        answer = asyncio.ensure_future(world.generate(["a", "b"], sampling_params={"max_new_tokens": 1, "n": 2}))
        await asks.wait()
        in_use = world.manager.blocklora_adapters.requests.adapters()
        go_on.set()
        assert later in in_use
        assert (await answer)[0] == 200
        assert later not in world.manager.blocklora_adapters.requests.adapters()

    world.run(scenario)


def test_a_file_system_that_does_not_answer_stops_nobody_whose_adapter_is_loaded(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, go = threading.Event(), threading.Event()

    def find(self: Any, name: str) -> None:
        hangs.set()
        go.wait(LIMIT_S)

    monkeypatch.setattr(AdapterFolders, "find", find)

    async def scenario() -> None:
        await world.load("loaded")
        unknown = [asyncio.ensure_future(world.generate("unknown"))]
        unknown += [asyncio.ensure_future(world.post("/v1/completions", {"model": "unknown", "prompt": [5]}))]
        unknown += [asyncio.ensure_future(world.process.client.get("/v1/models"))]
        await until(hangs.is_set)
        assert (await world.generate("loaded"))[0] == 200
        assert (await world.post("/v1/completions", {"model": "loaded", "prompt": [5], "max_tokens": 1}))[0] == 200
        assert (await world.load("another"))[0] == 200
        assert (await world.unload("another"))[0] == 200
        assert not any(task.done() for task in unknown)
        go.set()
        assert (await unknown[0])[0] == 400
        assert (await unknown[1])[0] == 404
        assert (await unknown[2]).status_code == 200

    try:
        world.run(scenario)
    finally:
        go.set()


def test_a_file_system_that_never_answers_is_a_503(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_blocklora.naming import lookups

    go = threading.Event()
    monkeypatch.setattr(AdapterFolders, "find", lambda self, name: go.wait(LIMIT_S))
    monkeypatch.setattr(lookups, "LOOKUP_SECONDS", 0.05)

    async def scenario() -> None:
        for _ in range(20):  # more than there are threads
            status, body = await world.generate("unknown")
            assert (status, "have not answered" in str(body)) == (503, True)
        assert (await world.post("/v1/completions", {"model": "unknown", "prompt": [5]}))[0] == 503
        assert await world.models() == set(), "and those in folders are not listed"

    try:
        world.run(scenario)
    finally:
        go.set()


def test_a_folder_that_cannot_be_looked_into_is_not_called_missing(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def denied(path: Path) -> bool:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)

    async def scenario() -> None:
        for status, body in (
            await world.generate("a"),
            await world.post("/v1/completions", {"model": "a", "prompt": [5]}),
        ):
            assert status in (400, 404)
            assert f"{folder / 'a'} is not readable" in str(body)
        assert await world.models() == {"b"}

    world.run(scenario)


# All at once.


def test_requests_that_need_more_than_the_limit_leave_no_more_than_it_behind(world: World, folder: Path) -> None:
    from sglang.srt.runtime_context import get_lora

    async def scenario() -> None:
        answers = await asyncio.gather(*(world.generate(name) for name in "ab"))
        assert [status for status, _ in answers] == [200, 200]
        await until(lambda: len(world.manager.lora_registry.get_all_adapters()) == 1)
        await until(lambda: len(world.scheduler.adapters) == 1)

    with get_lora().override(max_loaded_loras=1):
        world.run(scenario)


@pytest.mark.parametrize("answers", [1, 2])
def test_a_batch_keeps_its_adapters_though_they_lose_their_names(world: World, folder: Path, answers: int) -> None:
    """Others that come with it need room: names go as soon as requests have their adapters, these when they end."""
    from sglang.srt.runtime_context import get_lora

    (folder / "c").mkdir()
    (folder / "c" / "adapter_config.json").write_text("{}")

    async def scenario() -> None:
        world.scheduler.holds = True
        batch = world.generate(["a", "b"], sampling_params={"max_new_tokens": 1, "n": answers})
        asked = asyncio.gather(batch, *(world.generate("c") for _ in range(3)))
        while not asked.done():
            await asyncio.sleep(0.1)  # longer than between two looks at what is in use
            world.scheduler.end_all()
        assert [status for status, _ in await asked] == [200] * 4
        names = world.manager.lora_registry.get_all_adapters
        await until(lambda: set(world.scheduler.adapters.values()) == set(names()))
        assert len(names()) == 2

    with get_lora().override(max_loaded_loras=2):
        world.run(scenario)


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_unloads_pins_and_requests_at_once(world: World, folder: Path, seed: int) -> None:
    """Whatever the order, no scheduler drops what a request uses or gets a request for what it has not."""
    from sglang.srt.runtime_context import get_lora

    choose = random.Random(seed)

    async def client() -> None:
        for _ in range(40):
            name = choose.choice("abcd")
            call, *arguments = choose.choice(
                (
                    (world.load, name),
                    (world.unload, name),
                    (world.generate, name),
                    (world.generate, [name, None, choose.choice("abcd")]),
                    (world.post, f"/adapters/{name}/pin"),
                    (world.post, f"/adapters/{name}/unpin"),
                )
            )
            task = asyncio.ensure_future(call(*arguments))
            if choose.random() < 0.1:
                await asyncio.sleep(0.002)
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                assert task.result()[0] in (200, 400, 404), task.result()

    async def scenario() -> None:
        world.scheduler.holds = True
        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        everything = asyncio.gather(*clients)
        while not everything.done():
            await asyncio.sleep(0.001)
            for rid in list(world.scheduler.running):
                if choose.random() < 0.5:
                    world.scheduler.end(rid)
        await everything
        world.scheduler.end_all()
        await until(lambda: not world.manager.rid_to_state)
        refs = world.manager.lora_registry.get_all_adapters
        await until(lambda: world.scheduler.adapters == {ref.lora_id: name for name, ref in refs().items()})
        assert len(refs()) <= 3

    with get_lora().override(max_loaded_loras=3):
        world.run(scenario)


# Nothing grows.


def sizes(world: World) -> dict[str, int]:
    """Entries of everything that the HTTP process keeps about adapters."""
    manager, adapters = world.manager, world.manager.blocklora_adapters
    owners = {
        "manager": SimpleNamespace(**{key: getattr(manager, key) for key in ("lora_ref_cache", "rid_to_state")}),
        "pending": SimpleNamespace(unloads=manager.pending_lora_unloads),
        "registry": manager.lora_registry,
        "updates": manager.blocklora_updates,
        "adapters": adapters,
        "turns": adapters._turns,
        "tasks": adapters._tasks,
        "requests": adapters.requests,
        "on_use": adapters.on_use,
    }
    return {
        f"{owner}.{name}": len(value)
        for owner, thing in owners.items()
        for name, value in vars(thing).items()
        if isinstance(value, dict | set | list)
    }


def test_ten_thousand_adapters_that_came_and_went_leave_nothing_behind(world: World) -> None:
    async def cycle(number: int) -> None:
        adapters, name = world.manager.blocklora_adapters, f"adapter-{number}"
        world.scheduler.refused = {name} if number % 10 == 0 else set()
        if (await adapters.load(name, f"/at/{name}")).success:
            if number % 100 == 1:
                await world.generate(name)
            await adapters.unload(name)

    async def scenario() -> None:
        await cycle(1)
        await cycle(10)
        before = sizes(world)
        assert len(before) > 8
        for number in range(10_000):
            await cycle(number)
            world.scheduler.asked.clear()
            world.scheduler.received.clear()
        assert sizes(world) == before

    world.run(scenario)


def test_names_in_folders_that_come_and_go_leave_nothing_behind(world: World, folder: Path) -> None:
    """Some are put out by the limit, some cannot be loaded; then their folders go."""
    from sglang.srt.runtime_context import get_lora

    async def scenario() -> None:
        counts = []
        for number in range(300):
            name = f"n{number}"
            (folder / name).mkdir()
            (folder / name / "adapter_config.json").write_text("{}")
            world.scheduler.refused = {name} if number % 3 == 0 else set()
            await world.generate(name)
            (folder / name / "adapter_config.json").unlink()
            (folder / name).rmdir()
            counts.append(sizes(world))
        await until(lambda: len(world.scheduler.adapters) <= 4)
        late = {key: value for key, value in sizes(world).items() if value > counts[20][key]}
        assert set(late) <= {"adapters.errors"}, "which is bounded"

    with get_lora().override(max_loaded_loras=4):
        world.run(scenario)
