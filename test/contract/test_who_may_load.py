"""Who may load an adapter over HTTP, from where, and under which names."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocklora_testing.adapter_world import World
from blocklora_testing.http_process import HTTPProcess
from sglang_blocklora.settings import Settings

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


def test_names_given_at_start_up_are_held_to_the_same(hooked_process: HTTPProcess) -> None:
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.runtime_context import get_lora

    for name in BAD_NAMES:
        ref = LoRARef(lora_name=name, lora_path="/a")
        with get_lora().override(lora_paths=[ref]), pytest.raises(ValueError, match="--lora-paths: adapter"):
            hooked_process.manager.init_lora()


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
            with Settings(adapter_roots=("/somewhere",)).exported():
                assert (await world.load("below"))[0] == 200, "the schedulers keep to the root"
        for key in ("api_key", "admin_api_key"):
            with get_serving().override(host=host, **{key: "secret"}):
                assert (await world.load(key))[0] == 200
        for loopback in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
            with get_serving().override(host=loopback):
                assert (await world.load(loopback.replace("[", "(")))[0] == 200

    world.run(scenario)


def test_a_server_that_is_closed_says_so_once_when_it_starts(
    world: World, hooked_process: HTTPProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blocklora_patches.http import routes
    from sglang.srt.runtime_context import get_serving

    monkeypatch.setattr(routes, "add_to", lambda app, manager: None)  # the process has our routes
    for host, lines in (("0.0.0.0", 1), ("127.0.0.1", 0)):
        caplog.clear()
        with get_serving().override(host=host):
            routes._setup_and_run_http_server(None, hooked_process.manager, None, None, [{"max_total_num_tokens": 1}])
        told = [record.getMessage() for record in caplog.records if "over HTTP is closed" in record.getMessage()]
        assert len(told) == lines


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
