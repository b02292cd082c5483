"""An unload waits for its own requests and nobody for it, in SGLang's real HTTP process."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
from blocklora_testing.adapter_world import World, answer_until_done, until

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


@pytest.mark.parametrize("route", ["/unload_lora_adapter", "/v1/unload_lora_adapter"])
def test_an_unload_of_what_a_request_is_loading_comes_behind_it(world: World, folder: Path, route: str) -> None:
    """Or the old files, which are read already, would serve after the unload was answered."""

    async def scenario() -> None:
        world.scheduler.slow = {"a"}
        request = asyncio.ensure_future(world.generate("a"))
        await until(lambda: bool(world.scheduler.asks("Load", "a")))
        unload = asyncio.ensure_future(world.post(route, {"lora_name": "a"}))
        await asyncio.sleep(0.1)
        assert not unload.done(), "it was answered before the load that it concerns"
        first, world.scheduler.slow = world.scheduler.asks("Load", "a")[0], set()
        world.scheduler.answer(first)
        assert (await unload)[0] == 200
        assert (await request)[0] in (200, 400)
        assert [ask.lora_id for ask in world.scheduler.asks("Unload", "a")] == [first.lora_id]

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
        await answer_until_done(world, calls)
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
    assert world.manager.blocklora_adapters.errors == {}


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
