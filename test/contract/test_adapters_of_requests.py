"""Adapters come and go beside requests, in SGLang's real HTTP process; only the schedulers behind it are made up."""

from __future__ import annotations

import asyncio
import random
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blocklora_testing.http_process import HTTPProcess, Scheduler, hooked
from sglang_blocklora.naming.folders import AdapterFolders
from sglang_blocklora.settings import Settings

LIMIT_S = 60  # only a failing test waits so long


class Schedulers(Scheduler):
    """Keep adapters by id, answer updates at once or when told to, and hold requests until they are told to end.

    slow     names whose updates are answered by ``answer`` only
    refused  names whose loads are refused
    wrong    what a scheduler must never see
    """

    def __init__(self, manager: Any) -> None:
        super().__init__(manager)
        self.adapters: dict[str, str] = {}
        self.running: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.slow: set[str] = set()
        self.refused: set[str] = set()
        self.wrong: list[str] = []

    def dispatch(self, message: Any) -> None:
        kind = type(message).__name__
        if kind in ("LoadLoRAAdapterReqInput", "UnloadLoRAAdapterReqInput"):
            self.asked.append(message)
            if message.lora_name not in self.slow:
                self.answer(message)
            return
        if kind == "SetInternalStateReq":
            from sglang.srt.managers.io_struct import SetInternalStateReqOutput

            self._later(self._manager._result_dispatcher, SetInternalStateReqOutput(updated=True))
            return
        if kind == "AbortReq":
            gone = [rid for rid in self.running if message.abort_all or rid == message.rid]
            for rid in gone:
                del self.running[rid]
        super().dispatch(message)
        for request in getattr(message, "batch", [message] if hasattr(message, "input_ids") else []):
            if request.lora_id is not None and request.lora_id not in self.adapters:
                self.wrong.append(f"request for {request.lora_id}, which is not loaded")
            if self.holds:
                self.running[request.rid] = request

    async def dispatch_later(self, message: Any) -> None:
        self.dispatch(message)

    def answer(self, message: Any) -> None:
        """Do what ``message`` asks and say so."""
        from sglang.srt.managers.io_struct import LoRAUpdateOutput

        success, name = True, message.lora_name
        if type(message).__name__ == "UnloadLoRAAdapterReqInput":
            if message.lora_id in (request.lora_id for request in self.running.values()):
                self.wrong.append(f"unload of {name}, which a request uses")
            self.adapters.pop(message.lora_id, None)
        elif name in self.refused:
            success = False
        else:
            self.adapters[message.lora_id] = name
        error = None if success else f"adapter {name!r}: broken"
        answer = LoRAUpdateOutput(success=success, error_message=error, rid=message.rid)
        self._later(self._manager._result_dispatcher, answer)

    def end(self, rid: str) -> None:
        """The request has its answer."""
        self._answer(self.running.pop(rid))

    def end_all(self) -> None:
        for rid in list(self.running):
            self.end(rid)

    def asks(self, kind: str, name: str) -> list[Any]:
        """Updates of that kind for that adapter, in order."""
        return [ask for ask in self.asked if type(ask).__name__.startswith(kind) and ask.lora_name == name]


class World:
    """One process, its made-up schedulers, and calls to it that run at the same time."""

    def __init__(self, process: HTTPProcess, disk: Path) -> None:
        self.process, self.manager, self.disk = process, process.manager, disk
        self.scheduler: Any = None

    async def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        answer = await self.process.client.post(path, json=body or {})
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status_code, answer.json() if is_json else answer.text

    async def load(self, name: str, path: str | None = None, **more: Any) -> tuple[int, Any]:
        folder = path or self.disk / name
        Path(folder).mkdir(exist_ok=True)
        return await self.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **more})

    async def unload(self, name: str) -> tuple[int, Any]:
        return await self.post("/unload_lora_adapter", {"lora_name": name})

    async def generate(self, name: str | list[str | None] | None, **more: Any) -> tuple[int, Any]:
        prompts = [[5, 6]] * len(name) if isinstance(name, list) else [5, 6]
        body = {"input_ids": prompts, "lora_path": name, "sampling_params": {"max_new_tokens": 1}} | more
        return await self.post("/generate", body)

    async def models(self) -> set[str]:
        answer = await self.process.client.get("/v1/models")
        return {one["id"] for one in answer.json()["data"]} - {"tiny"}

    async def stream(self, name: str | list[str | None]) -> asyncio.Task[tuple[int, Any]]:
        """A request that the schedulers have and hold."""
        self.scheduler.holds = True
        before = len(self.scheduler.running)
        task = asyncio.ensure_future(self.generate(name))
        await until(lambda: len(self.scheduler.running) > before)
        return task

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            await asyncio.wait_for(scenario(), LIMIT_S)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SGLang's own
            self.process.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), LIMIT_S)


@pytest.fixture(scope="module")
def process(tiny_llama: Path) -> Iterator[HTTPProcess]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.hooks.hook import Process
        from blocklora_patches.http.routes import AdapterRoutes
        from blocklora_patches.install import HOOKS

        with hooked([hook for hook in HOOKS if hook.process is Process.HTTP and ".lang." not in hook.target]):
            flags = ["--served-model-name", "tiny", "--enable-lora", "--max-lora-rank", "64"]
            process = HTTPProcess(tiny_llama, *flags, "--lora-target-modules", "all")
            routes = list(process.app.router.routes)
            AdapterRoutes(process.manager).add_to(process.app)
            yield process
            process.app.router.routes[:] = routes
            process.close()


@pytest.fixture
def world(process: HTTPProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(process, tmp_path_factory.mktemp("disk"))
    process.manager.init_lora()
    process.manager.is_pause = False
    process.manager.rid_to_state.clear()
    world.scheduler = process.scheduler = Schedulers(process.manager)
    process.manager._dispatch_to_scheduler = world.scheduler.dispatch
    process.manager._async_dispatch_to_scheduler = world.scheduler.dispatch_later
    process.manager.blocklora_updates._send = world.scheduler.dispatch
    process.manager.set_internal_state_communicator._send = world.scheduler.dispatch
    with Settings().exported():
        yield world
    assert world.scheduler.wrong == []
    assert process.manager.rid_to_state == {}


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Iterator[Path]:
    """``--adapter-dir``, with the adapters a and b."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with Settings(adapter_dirs=(str(tmp_path),)).exported():
        yield tmp_path


# An unload waits for its own requests, and nobody else for it.


def test_an_unload_that_waits_for_a_request_holds_up_nobody_else(world: World, folder: Path) -> None:
    async def scenario() -> None:
        for name in ("busy", "idle", "pinned"):
            assert (await world.load(name))[0] == 200
        stream = await world.stream("busy")
        old = world.scheduler.asks("Load", "busy")[0].lora_id
        unload = asyncio.ensure_future(world.unload("busy"))
        await until(lambda: "busy" not in world.manager.lora_registry.get_all_adapters())
        assert await world.models() == {"idle", "pinned", "a", "b"}
        assert (await world.generate("busy"))[0] == 400
        world.scheduler.holds = False
        assert (await world.post("/v1/completions", {"model": "busy", "prompt": [5]}))[0] == 404
        assert (await world.load("another"))[0] == 200
        assert (await world.unload("idle"))[0] == 200
        assert (await world.generate("a"))[0] == 200, "loaded for the request"
        assert (await world.post("/adapters/pinned/pin"))[0] == 200
        assert (await world.load("busy"))[0] == 200, "the name is free"
        assert (await world.generate("busy"))[0] == 200
        assert world.scheduler.requests()[-1].lora_id == world.scheduler.asks("Load", "busy")[1].lora_id != old
        assert not unload.done()
        assert not world.scheduler.asks("Unload", "busy")
        world.scheduler.end_all()
        assert (await stream)[0] == 200
        status, answer = await unload
        assert (status, answer["success"]) == (200, True)
        assert [ask.lora_id for ask in world.scheduler.asks("Unload", "busy")] == [old]
        assert (await world.generate("busy"))[0] == 200, "the new one stays"

    world.run(scenario)


def test_a_slow_load_holds_up_nobody_else_and_answers_may_come_in_any_order(world: World) -> None:
    async def scenario() -> None:
        world.scheduler.slow = {"one", "two"}
        one, two = (asyncio.ensure_future(world.load(name)) for name in ("one", "two"))
        await until(lambda: len(world.scheduler.asked) == 2)
        assert (await world.load("quick"))[0] == 200
        assert (await world.unload("quick"))[0] == 200
        world.scheduler.refused = {"one"}
        by_name = {ask.lora_name: ask for ask in world.scheduler.asked}
        world.scheduler.answer(by_name["two"])
        assert (await two)[1]["success"]
        assert not one.done()
        world.scheduler.answer(by_name["one"])
        status, answer = await one
        assert (status, answer["error_message"]) == (400, "adapter 'one': broken")
        assert await world.models() == {"two"}

    world.run(scenario)


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
def test_a_paused_server_replaces_adapters(world: World, mode: str) -> None:
    """Trainers pause, unload, load and continue. Requests that were paused end with the weights they began with."""

    async def scenario() -> None:
        await world.load("policy")
        stream = await world.stream("policy")
        assert (await world.post("/pause_generation", {"mode": mode}))[0] == 200
        assert (await world.unload("policy"))[1]["success"]
        assert (await world.load("policy", str(world.disk / "new")))[1]["success"]
        asked = asyncio.ensure_future(world.generate("policy"))
        old, new = (ask.lora_id for ask in world.scheduler.asks("Load", "policy"))
        assert (await world.post("/continue_generation"))[0] == 200
        await until(lambda: new in {request.lora_id for request in world.scheduler.running.values()})
        world.scheduler.end_all()
        assert ((await stream)[0], (await asked)[0]) == (200, 200)
        await until(lambda: old not in world.scheduler.adapters)
        assert world.scheduler.adapters == {new: "policy"}

    world.run(scenario)


def test_an_unload_that_waits_is_answered_when_the_server_is_paused(world: World) -> None:
    async def scenario() -> None:
        await world.load("policy")
        stream = await world.stream("policy")
        unload = asyncio.ensure_future(world.unload("policy"))
        await until(lambda: "policy" not in world.manager.lora_registry.get_all_adapters())
        await world.post("/pause_generation", {"mode": "in_place"})
        assert (await unload)[1]["success"]
        await world.post("/continue_generation")
        world.scheduler.end_all()
        await stream
        await until(lambda: not world.scheduler.adapters)

    world.run(scenario)


def test_what_a_limit_puts_out_ends_its_requests_and_comes_back_when_it_is_named(world: World) -> None:
    from sglang.srt.runtime_context import get_lora

    async def scenario() -> None:
        await world.load("busy")
        await world.load("other")
        stream = await world.stream("busy")
        world.scheduler.holds = False
        assert (await world.generate("other"))[0] == 200, "used last"
        assert (await world.load("third"))[1]["success"]
        assert set(world.manager.lora_registry.get_all_adapters()) == {"other", "third"}
        assert (await world.generate("busy"))[0] == 200, "loaded anew, beside the old one with its request"
        assert await world.models() == {"busy", "other", "third"}
        assert len(world.scheduler.asks("Unload", "busy")) == 0
        world.scheduler.end_all()
        assert (await stream)[0] == 200
        await until(lambda: len(world.scheduler.adapters) == 2)
        # One that is out is unloaded for good all the same.
        (out,) = await world.models() - world.manager.lora_registry.get_all_adapters().keys()
        assert (await world.unload(out))[0] == 200
        assert (await world.generate(out))[0] == 400

    with get_lora().override(max_loaded_loras=2):
        world.run(scenario)


def test_requests_that_name_several_adapters_get_them_whatever_others_load(world: World, folder: Path) -> None:
    from sglang.srt.runtime_context import get_lora

    async def scenario() -> None:
        for name in "cdef":
            (folder / name).mkdir()
            (folder / name / "adapter_config.json").write_text("{}")
        pairs = [["a", "b"], ["c", "d"], ["e", "f"], ["a", "f"]]
        answers = await asyncio.gather(*(world.generate(pair) for pair in pairs * 5))
        assert {status for status, _ in answers} == {200}
        await world.generate("a")
        await until(lambda: len(world.scheduler.adapters) <= 6)
        assert (await world.generate(["a", "b", "c"]))[0] == 400

    with get_lora().override(max_loaded_loras=2):
        world.run(scenario)


def test_a_limit_whose_places_are_all_pinned_refuses_the_next(world: World) -> None:
    from sglang.srt.runtime_context import get_lora

    async def scenario() -> None:
        await world.load("one", pinned=True)
        await world.load("two", pinned=True)
        status, answer = await world.load("three")
        assert (status, "all 2 adapters of --max-loaded-loras are pinned" in answer["error_message"]) == (400, True)
        assert not world.scheduler.asks("Load", "three")
        await world.unload("one")
        assert (await world.load("three"))[1]["success"]

    with get_lora().override(max_loaded_loras=2):
        world.run(scenario)


@pytest.mark.parametrize("limit", [1, 8, 63])
def test_sglang_takes_a_limit_below_our_default_of_adapters_in_a_batch(tiny_llama: Path, limit: int) -> None:
    from sglang_blocklora import launch_server

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's own
        from sglang.srt.server_args import prepare_server_args

        flags = [
            "--model-path",
            str(tiny_llama),
            "--device",
            "cpu",
            "--max-loaded-loras",
            str(limit),
            "--adapter-memory=static",
        ]
        arguments = prepare_server_args(launch_server.parse(flags)[1])
    assert (arguments.max_loras_per_batch, arguments.max_loaded_loras) == (limit, limit)


# A name's own loads, pins and unloads come one after another, whoever goes away.


def test_operations_of_one_name_have_the_order_in_which_they_were_asked_for(world: World) -> None:
    async def scenario() -> None:
        world.scheduler.slow = {"a"}
        calls = []
        for call in (world.load, world.unload, world.load, world.load):
            calls.append(asyncio.ensure_future(call("a")))
            await asyncio.sleep(0.01)
        answered: list[Any] = []

        def step() -> bool:
            for ask in world.scheduler.asked[len(answered) :]:
                answered.append(ask)
                world.scheduler.answer(ask)
            return all(call.done() for call in calls)

        await until(step)
        assert [call.result()[0] for call in calls] == [200, 200, 200, 400]
        assert "already loaded" in calls[3].result()[1]["error_message"]
        assert list(world.scheduler.adapters.values()) == ["a"]

    world.run(scenario)


def test_a_load_ends_as_it_would_though_its_client_goes_away(world: World) -> None:
    async def scenario() -> None:
        world.scheduler.slow = {"a"}
        call = asyncio.ensure_future(world.load("a"))
        await until(lambda: len(world.scheduler.asked) == 1)
        call.cancel()
        await asyncio.wait({call})
        world.scheduler.answer(world.scheduler.asked[0])
        await until(lambda: "a" in world.manager.lora_registry.get_all_adapters())
        world.scheduler.slow = set()
        assert (await world.generate("a"))[0] == 200

    world.run(scenario)


def test_an_unload_ends_as_it_would_though_its_client_goes_away(world: World) -> None:
    async def scenario() -> None:
        await world.load("a")
        stream = await world.stream("a")
        call = asyncio.ensure_future(world.unload("a"))
        await until(lambda: "a" not in world.manager.lora_registry.get_all_adapters())
        call.cancel()
        await asyncio.wait({call})
        world.scheduler.end_all()
        await stream
        await until(lambda: not world.scheduler.adapters)
        assert (await world.load("a"))[1]["success"]

    world.run(scenario)


def test_a_pin_does_not_bring_back_what_was_unloaded_meanwhile(world: World) -> None:
    async def scenario() -> None:
        await world.load("a")
        held: list[Any] = []
        dispatch, world.manager.set_internal_state_communicator._send = world.scheduler.dispatch, held.append
        pin = asyncio.ensure_future(world.post("/adapters/a/pin"))
        await until(lambda: len(held) == 1)
        unload = asyncio.ensure_future(world.unload("a"))
        await asyncio.sleep(0.01)
        world.manager.set_internal_state_communicator._send = dispatch
        dispatch(held[0])
        assert (await pin)[0] in (200, 404)
        assert (await unload)[0] == 200
        assert await world.models() == set()
        assert world.scheduler.adapters == {}

    world.run(scenario)


def test_a_pin_that_is_refused_is_no_error_of_the_adapter(world: World) -> None:
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    async def scenario() -> None:
        await world.load("a")

        def refuse(message: Any) -> None:
            answer = SetInternalStateReqOutput(updated=False)
            asyncio.get_running_loop().call_soon(world.manager._result_dispatcher, answer)

        world.manager.set_internal_state_communicator._send = refuse
        world.scheduler.facts = [{"blocklora": {"adapters": [], "slots": {}}}]
        status, answer = await world.post("/adapters/a/pin")
        assert (status, "at most half" in answer["error"]["message"]) == (400, True)

    world.run(scenario)
    assert dict(world.manager.lora_registry.get_all_adapters())["a"].pinned is False
    assert "at most half" not in str(vars(world.manager).get("blocklora_errors"))


def test_a_first_load_that_takes_long_stops_neither_a_pause_nor_new_weights(world: World, folder: Path) -> None:
    """The request holds a lock of upstream's meanwhile; what waits for the lock goes on when the load has ended."""

    async def scenario() -> None:
        world.scheduler.slow = {"a"}
        waiting = asyncio.ensure_future(world.generate("a"))
        await until(lambda: len(world.scheduler.asked) == 1)
        pause = asyncio.ensure_future(world.post("/pause_generation", {"mode": "in_place"}))
        assert (await pause)[0] == 200
        await world.post("/continue_generation")
        world.scheduler.answer(world.scheduler.asked[0])
        assert (await waiting)[0] == 200

        async def writer() -> None:
            async with world.manager.model_update_lock.writer_lock:
                pass

        world.scheduler.slow = {"b"}
        waiting = asyncio.ensure_future(world.generate("b"))
        await until(lambda: len(world.scheduler.asked) == 2)
        update = asyncio.ensure_future(writer())
        later = asyncio.ensure_future(world.generate("a"))
        await asyncio.sleep(0.01)
        assert (await world.load("c"))[0] == 200
        world.scheduler.answer(world.scheduler.asks("Load", "b")[0])
        await update
        assert ((await waiting)[0], (await later)[0]) == (200, 200)

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


# Names.


BAD_NAMES = ["tiny", "default", "", " ", "tiny:v1", "tiny:nobody", "default:v1", "v1\n", "v\0", "v" * 2000]


def test_a_name_that_a_request_could_not_reach_loads_nowhere(world: World, folder: Path) -> None:
    """By SGLang's own route, by vLLM's, from tensors, for a request, and within the process."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    async def scenario() -> None:
        assert (await world.load("v1"))[0] == 200
        for name in BAD_NAMES:
            if "/" not in name and name.strip() and "\0" not in name and len(name) < 200:
                (folder / name).mkdir()
                (folder / name / "adapter_config.json").write_text("{}")
            body = {"lora_name": name, "lora_path": str(folder / "a")}
            tensors = {"lora_name": name, "config_dict": {}, "serialized_named_tensors": [""]}
            answers = [
                await world.post("/load_lora_adapter", body),
                await world.post("/v1/load_lora_adapter", body),
                await world.post("/load_lora_adapter_from_tensors", tensors),
                await world.generate(name or None, lora_path=[name]) if name else (400, ""),
            ]
            assert {status for status, _ in answers} == {400}, name
            assert not (await world.manager.load_lora_adapter(LoadLoRAAdapterReqInput(**body))).success
        assert [ask.lora_name for ask in world.scheduler.asked] == ["v1"]
        assert await world.models() == {"v1", "a", "b"}

        async def answerer(model: str) -> str | None:
            body = {"model": model, "prompt": [5], "max_tokens": 1}
            assert (await world.post("/v1/completions", body))[0] == 200
            return world.scheduler.requests()[-1].lora_id

        v1 = world.scheduler.asked[0].lora_id
        assert [await answerer(model) for model in ("v1", "tiny:v1", "default:v1")] == [v1] * 3
        assert [await answerer(model) for model in ("tiny", "default")] == [None] * 2

    world.run(scenario)


def test_names_given_at_start_up_are_held_to_the_same(process: HTTPProcess) -> None:
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.runtime_context import get_lora

    for name in BAD_NAMES:
        ref = LoRARef(lora_name=name, lora_path="/a")
        with get_lora().override(lora_paths=[ref]), pytest.raises(ValueError, match="--lora-paths: adapter"):
            process.manager.init_lora()


def test_a_path_that_is_none_is_refused_here(world: World) -> None:
    async def scenario() -> None:
        for path in ("", "/a\0b"):
            body = {"lora_name": "a", "lora_path": path}
            for route in ("/load_lora_adapter", "/v1/load_lora_adapter"):
                status, answer = await world.post(route, body)
                assert (status, "is no path" in str(answer)) == (400, True)
        assert world.scheduler.asked == []

    world.run(scenario)


# Who may load.


MANAGING = [
    ("/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}),
    ("/load_lora_adapter_from_tensors", {"lora_name": "x", "config_dict": {}, "serialized_named_tensors": [""]}),
    ("/unload_lora_adapter", {"lora_name": "old"}),
    ("/v1/unload_lora_adapter", {"lora_name": "old"}),
    ("/adapters/old/pin", {}),
    ("/adapters/old/unpin", {}),
]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "some-host", ""])
def test_beyond_this_machine_and_without_a_key_nobody_loads(world: World, host: str) -> None:
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput
    from sglang.srt.runtime_context import get_serving

    async def scenario() -> None:
        assert (await world.load("old"))[0] == 200
        with get_serving().override(host=host):
            for route, body in MANAGING:
                status, answer = await world.post(route, body)
                assert status == 403, route
                for flag in ("--admin-api-key", "--api-key", "--adapter-root", "--adapter-dir", "without-key"):
                    assert flag in str(answer), route
            assert len(world.scheduler.asked) == 1
            assert (await world.generate("old"))[0] == 200
            inside = LoadLoRAAdapterReqInput(lora_name="inside", lora_path="/a")
            assert (await world.manager.load_lora_adapter(inside)).success, "an Engine's own process may"
            with Settings(adapter_loading_without_key=True).exported():
                assert (await world.load("new"))[0] == 200
            with Settings(adapter_root="/somewhere").exported():
                assert (await world.load("below"))[0] == 200, "the schedulers keep to the root"
        for key in ("api_key", "admin_api_key"):
            with get_serving().override(host=host, **{key: "secret"}):
                assert (await world.load(key))[0] == 200
        for loopback in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
            with get_serving().override(host=loopback):
                assert (await world.load(loopback.replace("[", "(")))[0] == 200

    world.run(scenario)


def test_with_folders_and_without_a_key_what_is_loaded_lies_in_them(world: World, folder: Path, tmp_path: Path) -> None:
    from sglang.srt.runtime_context import get_serving

    outside = world.disk / "outside"
    outside.mkdir()
    (folder / "out").symlink_to(outside)
    (folder / "in").symlink_to("a")
    (folder / "loop").symlink_to("loop")
    (outside / "back").symlink_to(folder / "b")

    async def scenario() -> None:
        with get_serving().override(host="0.0.0.0"):
            for i, path in enumerate(
                (outside, folder / "out", folder / "a" / ".." / ".." / "x", "/", "", "a\0", folder.parent)
            ):
                status, answer = await world.post("/load_lora_adapter", {"lora_name": f"x{i}", "lora_path": str(path)})
                assert (status, f"below {folder}" in str(answer)) == (403, True), path
            for i, path in enumerate((folder / "a", folder / "in", outside / "back", folder / "x" / ".." / "a")):
                status, _ = await world.post("/load_lora_adapter", {"lora_name": f"y{i}", "lora_path": str(path)})
                assert status == 200, path
        sent = [ask.lora_path for ask in world.scheduler.asked]
        assert sent == [str(folder / name) for name in ("a", "a", "b", "a")], "what was checked is what is loaded"

    world.run(scenario)


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
        "requests": adapters._requests,
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
