"""Adapters that change while they serve, in SGLang's real HTTP process over made-up schedulers."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from blocklora_testing.adapter_world import World, answer_until_done, until
from sglang_blocklora.settings import Settings

CONFIG = {"peft_type": "LORA", "r": 2}


def weights(value: float, config: dict[str, Any] | None = CONFIG) -> bytes:
    """Safetensors bytes that differ with ``value``."""
    metadata = None if config is None else {"adapter_config": json.dumps(config)}
    return safetensors.torch.save({"w": torch.full((4, 4), value)}, metadata)


async def put(world: World, name: str, body: Any, **more: Any) -> tuple[int, Any]:
    answer = await world.process.client.put(f"/adapters/{name}", content=body, **more)
    return answer.status_code, answer.json()


async def served_by(world: World, name: str) -> str:
    """The version that a request for ``name`` is answered by now."""
    status, answer = await world.generate(name)
    assert status == 200, answer
    version: str = answer["meta_info"]["adapter_version"]
    return version


def spooled(world: World) -> list[Path]:
    """Folders of adapters that came as tensors, and what is left of others."""
    root = world.manager.blocklora_adapters.spool._root
    return [] if root is None else sorted(root.iterdir())


def current(world: World, name: str) -> Any:
    return world.manager.lora_registry.get_all_adapters()[name]


def pins(world: World) -> list[tuple[str, int]]:
    """``lora_id`` and value of every pin that the schedulers were asked for, in order."""
    from blocklora_patches.scheduler.control import PIN

    return [(key.removeprefix(PIN), value) for key, value in world.scheduler.states]


# An update of a name.


def test_requests_before_an_update_keep_the_old_version_and_those_after_it_have_the_new_one(world: World) -> None:
    async def scenario() -> None:
        await world.load("a")
        old = current(world, "a")
        stream = await world.stream("a")
        status, _ = await world.post(
            "/v1/load_lora_adapter",
            {"lora_name": "a", "lora_path": str(world.disk / "b"), "load_inplace": True},
        )
        assert status == 200, "it does not wait for the old version's requests"
        new = current(world, "a")
        assert new.lora_id != old.lora_id
        assert set(world.scheduler.adapters) == {old.lora_id, new.lora_id}
        later = await world.stream("a")
        assert [request.lora_id for request in world.scheduler.running.values()] == [old.lora_id, new.lora_id]
        world.scheduler.end_all()
        versions = [(await task)[1]["meta_info"]["adapter_version"] for task in (stream, later)]
        assert versions == [world.scheduler.hash(ref.lora_path)[:16] for ref in (old, new)]
        await until(lambda: set(world.scheduler.adapters) == {new.lora_id})
        assert world.manager.blocklora_adapters.draining == {}

    world.run(scenario)


@pytest.mark.parametrize("harm", ["refused", "cut", "no config", "no safetensors", "too much", "gone", "bad pin"])
def test_an_update_that_fails_leaves_the_old_version(world: World, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        adapters = world.manager.blocklora_adapters
        assert (await put(world, "a", weights(1.0), params={"pinned": harm == "bad pin"}))[0] == 200
        before = await served_by(world, "a")
        bodies: dict[str, Any] = {
            "cut": weights(2.0)[:-8],
            "no config": weights(2.0, None),
            "no safetensors": b"{}",
        }
        if harm == "refused":
            world.scheduler.refused = {"a"}
        if harm == "too much":
            monkeypatch.setattr(adapters.spool, "max_bytes", 400)
        if harm == "bad pin":
            answers = iter([True, False, True])
            monkeypatch.setattr(adapters, "_set_pinned", lambda *_: _soon(next(answers)))
        if harm == "gone":
            await put_and_go(world, "a", weights(2.0)[:-8])
        else:
            status, answer = await put(world, "a", bodies.get(harm, weights(2.0)))
            assert (status, "adapter 'a'" in answer["error"]["message"] or harm == "too much") == (400, True), answer
        world.scheduler.refused = set()
        assert await served_by(world, "a") == before
        await until(lambda: len(spooled(world)) == 1)
        assert len(world.scheduler.adapters) == 1
        assert adapters.spool.used_bytes == sum(file.stat().st_size for file in spooled(world)[0].iterdir())
        assert adapters.draining == {}
        monkeypatch.undo()
        assert (await put(world, "a", weights(2.0)))[0] == 200
        assert await served_by(world, "a") != before

    world.run(scenario)


async def put_and_go(world: World, name: str, body: bytes) -> None:
    """A client that goes away when it has sent ``body`` and would send more."""
    messages = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        """To nobody."""

    path = f"/adapters/{name}"
    scope = {"type": "http", "method": "PUT", "path": path, "raw_path": path.encode(), "query_string": b""}
    await world.process.app(scope | {"headers": [], "server": ("test", 80), "scheme": "http"}, receive, send)


async def _soon(value: bool) -> bool:
    return value


def test_the_same_bytes_change_nothing(world: World) -> None:
    async def scenario() -> None:
        await put(world, "a", weights(1.0))
        tensors, asked = current(world, "a"), len(world.scheduler.asked)
        assert (await put(world, "a", weights(1.0)))[0] == 200
        assert (current(world, "a"), len(world.scheduler.asked)) == (tensors, asked), "nothing is even sent"

        await world.load("f")
        from_folder = current(world, "f")
        world.scheduler.bytes = {str(world.disk / "copy"): str(world.disk / "f")}
        body = {"lora_name": "f", "lora_path": str(world.disk / "copy"), "load_inplace": True}
        assert (await world.post("/v1/load_lora_adapter", body))[0] == 200
        assert current(world, "f") == from_folder
        assert set(world.scheduler.adapters) == {tensors.lora_id, from_folder.lora_id}

    world.run(scenario)


def test_a_pin_stays_with_the_name(world: World) -> None:
    async def scenario() -> None:
        await put(world, "a", weights(1.0), params={"pinned": True})
        for value in (2.0, 2.0):  # other bytes, and the same
            await put(world, "a", weights(value))
            assert current(world, "a").pinned

    world.run(scenario)


@pytest.mark.parametrize("value", [1.0, 2.0], ids=["the same bytes", "other bytes"])
def test_an_update_pins_where_it_is_asked_to(world: World, value: float) -> None:
    async def scenario() -> None:
        await put(world, "a", weights(1.0))
        await put(world, "b", weights(1.0))
        assert (await put(world, "a", weights(value), params={"pinned": True}))[0] == 200
        assert (current(world, "a").pinned, current(world, "b").pinned) == (True, False)
        assert pins(world) == [(current(world, "a").lora_id, 1)]

    world.run(scenario)


def test_the_same_folder_pins_where_it_is_asked_to(world: World) -> None:
    async def scenario() -> None:
        await world.load("f")
        body = {"lora_name": "f", "lora_path": str(world.disk / "f"), "load_inplace": True, "pinned": True}
        before = current(world, "f")
        assert (await world.post("/v1/load_lora_adapter", body))[0] == 200
        assert (current(world, "f").lora_id, current(world, "f").pinned) == (before.lora_id, True)
        assert pins(world) == [(before.lora_id, 1)]

    world.run(scenario)


def test_a_pin_of_the_same_bytes_that_is_refused_leaves_the_adapter_as_it_was(world: World) -> None:
    async def scenario() -> None:
        await put(world, "a", weights(1.0))
        before, version = current(world, "a"), await served_by(world, "a")
        world.scheduler.pins = False
        status, answer = await put(world, "a", weights(1.0), params={"pinned": True})
        assert (status, "than may be pinned" in answer["error"]["message"]) == (400, True), answer
        assert (current(world, "a"), await served_by(world, "a")) == (before, version)
        assert pins(world) == [(before.lora_id, 1), (before.lora_id, 0)], "no replica keeps it pinned"

    world.run(scenario)


def test_updates_unloads_and_loads_of_a_name_come_one_after_another(world: World) -> None:
    async def scenario() -> None:
        world.scheduler.slow = {"a"}
        calls = [asyncio.ensure_future(put(world, "a", weights(value))) for value in (1.0, 2.0)]
        await until(lambda: len(world.scheduler.asked) == 1)
        calls.append(asyncio.ensure_future(world.unload("a")))
        await asyncio.sleep(0.02)
        calls.append(asyncio.ensure_future(put(world, "a", weights(3.0))))
        await answer_until_done(world, calls)
        assert [call.result()[0] for call in calls] == [200, 200, 200, 200]
        world.scheduler.slow = set()
        await until(lambda: len(spooled(world)) == 1)
        assert await served_by(world, "a") == (await put(world, "a", weights(3.0)))[1]["adapter_version"]
        assert list(world.scheduler.adapters.values()) == ["a"]

    world.run(scenario)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_trainer_may_pause_update_and_continue(world: World, mode: str) -> None:
    async def scenario() -> None:
        await put(world, "a", weights(1.0))
        stream = await world.stream("a")
        await world.post("/pause_generation", {"mode": mode})
        waiting = asyncio.ensure_future(world.generate("a"))
        await asyncio.sleep(0.02)
        status, answer = await put(world, "a", weights(2.0))
        assert status == 200, "it does not wait for the old version, whose requests do not end"
        world.scheduler.holds = False
        await world.post("/continue_generation")
        world.scheduler.end_all()
        assert (await stream)[1]["meta_info"]["adapter_version"] != answer["adapter_version"]
        assert (await waiting)[1]["meta_info"]["adapter_version"] == answer["adapter_version"]
        await until(lambda: len(spooled(world)) == 1)

    world.run(scenario)


# What is told of versions, and demanded.


def test_answers_carry_their_version_and_requests_may_demand_one(world: World) -> None:
    async def scenario() -> None:
        version = (await put(world, "a", weights(1.0)))[1]["adapter_version"]
        other = (await put(world, "b", weights(2.0)))[1]["adapter_version"]
        client = world.process.client
        body = {"model": "a", "prompt": [5], "max_tokens": 1}
        answer = await client.post("/v1/completions", json=body)
        assert answer.headers["x-adapter-version"] == version
        assert answer.json()["metadata"]["adapter_version"] == version
        chat = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        for path, asked in (
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"stream": True}),
            ("/generate", {"input_ids": [5], "lora_path": "a", "stream": True}),
        ):
            assert (await client.post(path, json=asked)).headers["x-adapter-version"] == version, path
        batch = {"input_ids": [[5], [6], [7]], "lora_path": ["a", None, "b"], "sampling_params": {"n": 2}}
        answer = await client.post("/generate", json=batch)
        assert answer.headers["x-adapter-version"] == f"{version}, {other}"
        told = [one["meta_info"].get("adapter_version") for one in answer.json()]
        assert told == [version, version, None, None, other, other]
        base = await client.post("/v1/completions", json=body | {"model": "tiny"})
        assert "x-adapter-version" not in base.headers

        content_hash = Path(current(world, "a").lora_path).name
        for demanded, model, status in (
            (version, "a", 200),
            (content_hash, "a", 200),
            (other, "a", 409),
            (version[:-1], "a", 409),
            (version, "tiny", 409),
        ):
            headers = {"X-Adapter-Version": demanded}
            for path, asked in (
                ("/v1/completions", body | {"model": model}),
                ("/v1/completions", body | {"model": model, "stream": True}),
                ("/generate", {"input_ids": [5], "lora_path": None if model == "tiny" else model}),
                ("/generate", {"input_ids": [5], "lora_path": None if model == "tiny" else model, "stream": True}),
            ):
                answer = await client.post(path, json=asked, headers=headers)
                assert answer.status_code == status, (demanded, asked, answer.text)
                if status == 409:
                    assert (version if model == "a" else "base model") in answer.text
        assert (await client.post("/generate", json=batch, headers={"X-Adapter-Version": version})).status_code == 409

    world.run(scenario)


# From tensors.


def test_sglangs_endpoint_takes_safetensors_and_no_pickle(world: World, tmp_path: Path) -> None:
    from sglang.srt.utils import MultiprocessingSerializer

    body = {"lora_name": "a", "config_dict": CONFIG}
    pickled = MultiprocessingSerializer.serialize({"w": torch.ones(2, 2)}, output_str=True)

    async def scenario() -> None:
        path = "/load_lora_adapter_from_tensors"
        for load_format in (None, "flattened_bucket", "safetensors"):
            refused = body | {"serialized_named_tensors": [pickled], "load_format": load_format}
            status, answer = await world.post(path, refused)
            if load_format == "safetensors":  # kept as bytes, and refused by every rank; here ranks are made up
                assert (status, (await world.unload("a"))[0]) == (200, 200)
            else:
                assert (status, "safetensors.torch.save" in answer["error_message"]) == (400, True)
        sent = base64.b64encode(weights(1.0, None)).decode()
        sound = body | {"serialized_named_tensors": [sent], "load_format": "safetensors"}
        for wrong in (
            {"serialized_named_tensors": []},
            {"serialized_named_tensors": [sent, sent]},
            {"serialized_named_tensors": ["?"]},
            {"added_tokens_config": {"x": 1}},
            {"expected_checksums": {"w": "0" * 64}},
            {"expected_checksums": {}},
        ):
            assert (await world.post(path, sound | wrong))[0] == 400, wrong
        assert spooled(world) == []
        status, answer = await world.post(path, sound)
        assert (status, answer["success"]) == (200, True)
        assert json.loads((Path(current(world, "a").lora_path) / "adapter_config.json").read_text()) == CONFIG
        status, answer = await world.post(path, sound)
        assert (status, "already loaded" in answer["error_message"]) == (400, True)
        assert (await world.post(path, sound | {"load_inplace": True}))[0] == 200
        with Settings(adapter_trust_pickle=True).exported():
            told = body | {"serialized_named_tensors": [pickled], "load_inplace": True}
            assert (await world.post(path, told))[0] == 200
            told["serialized_named_tensors"] = [base64.b64encode(b"\x80\x04.").decode()]
            assert (await world.post(path, told))[0] == 400

    world.run(scenario)


def test_what_came_as_tensors_is_kept_while_a_name_or_a_request_needs_it(world: World) -> None:
    from sglang.srt.runtime_context import get_lora

    async def scenario() -> None:
        await put(world, "a", weights(1.0))
        stream = await world.stream("a")
        await put(world, "b", weights(1.0))
        await put(world, "a", weights(2.0))
        await world.unload("b")
        assert len(spooled(world)) == 2, "the first version is still in use"
        world.scheduler.end_all()
        await stream
        await until(lambda: len(spooled(world)) == 1)
        await put(world, "b", weights(3.0))  # and a is put out
        await until(lambda: len(world.scheduler.adapters) == 1)
        world.scheduler.holds = False
        assert len(spooled(world)) == 2
        version = await served_by(world, "a")
        await until(lambda: len(world.scheduler.adapters) == 1)
        assert version == (await put(world, "a", weights(2.0)))[1]["adapter_version"]
        assert (await world.unload("a"))[0] == (await world.unload("b"))[0] == 200
        await until(lambda: spooled(world) == [])
        assert world.manager.blocklora_adapters.spool.used_bytes == 0

    with get_lora().override(max_loaded_loras=1):
        world.run(scenario)


def test_who_needs_no_key_for_folders_needs_one_to_bring_an_adapter(world: World, folder: Path) -> None:
    from sglang.srt.runtime_context import get_serving

    body = {"lora_name": "a", "config_dict": CONFIG, "load_format": "safetensors"}
    body |= {"serialized_named_tensors": [base64.b64encode(weights(1.0, None)).decode()]}

    async def scenario() -> None:
        assert (await put(world, "a", weights(1.0)))[0] == 403
        assert (await world.post("/load_lora_adapter_from_tensors", body))[0] == 403
        assert spooled(world) == []
        with Settings(adapter_dirs=(str(folder),), adapter_loading_without_key=True).exported():
            assert (await put(world, "a", weights(1.0)))[0] == 200

    with get_serving().override(host="0.0.0.0"):
        world.run(scenario)


def test_an_abort_under_an_earlier_pause_ends(world: World) -> None:
    """The schedulers are told to go on, so that the requests that are aborted can end."""

    async def scenario() -> None:
        await world.load("a")
        await world.stream("a")
        await world.post("/pause_generation", {"mode": "in_place"})
        told = len(world.scheduler.received)
        world.scheduler.end_all()
        assert (await world.post("/pause_generation", {"mode": "abort"}))[0] == 200
        kinds = [type(message).__name__ for message in world.scheduler.received[told:]]
        assert "ContinueGenerationReqInput" in kinds
        assert world.manager.is_pause
        await world.post("/continue_generation")

    world.run(scenario)
