"""A real server at TP 2 whose host memory holds two adapters, and folders that vanish, change, break and hang."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blocklora_testing import slow_launcher
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from blocklora_testing.server import Server, running, same_decisions

ADAPTERS = 8
NEW_TOKENS = 6
TIMEOUT_S = 10  # of reads, of which all but those of storage that hangs take a moment
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Adapters of one size, prompts, and what PEFT answers: ``expected[adapter][prompt index]``."""
    folder = tmp_path_factory.mktemp("tiers")
    model = build_model(folder / "model", "llama", kv_heads=4)
    choices = {f"a{i}": AdapterChoice([None, 2][i % 2], rank=[4, 8][i % 2]) for i in range(ADAPTERS)}
    adapters = build_adapters(model, folder / "adapters", choices)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 12)]
    return model, adapters, prompts, peft_tokens(model, adapters, prompts, NEW_TOKENS)


@pytest.fixture(scope="module")
def server(many, tmp_path_factory) -> Iterator[Server]:
    """An adapter has 112 slots of 384 bytes: host memory is for two of them, the pool for four and a little KV."""
    model, adapters, _, _ = many
    folder = tmp_path_factory.mktemp("tiers-server")
    flags = ["--tp", "2", "--adapter-memory", "unified", "--max-total-tokens", "512"]
    flags += ["--adapter-host-memory-gb", str(100_000 / 2**30), "--max-running-requests", "8"]
    flags += ["--adapter-decision-log", str(folder / "decisions")]
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
    flags += ["--adapter-read-timeout", str(TIMEOUT_S)]
    slow = slow_launcher.slow_down
    with running(model, *flags, *paths, log=folder / "log", warm=True, change=slow) as server:
        yield server
    first = same_decisions(folder / "decisions")
    for kind in ("read", "host-evict", "failed"):
        assert f'"{kind}"' in first, f"the test never saw {kind!r}"


def facts(server: Server) -> dict[str, dict]:
    status, answer = server.call("/adapters")
    assert status == 200
    return {one["name"]: one for one in answer["data"]}


def ask(server: Server, many, name: str | None, index: int = 0) -> tuple[int, object]:
    """Status and error text of a request; a 200 with other tokens than PEFT's fails the test."""
    _, _, prompts, expected = many
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompts[index], "lora_path": name, "sampling_params": sampling}
    status, answer = server.call("/generate", body)
    if status == 200:
        assert answer["output_ids"] == expected[name][index]
    return status, answer


def put_out(server: Server, many, name: str) -> None:
    """Empty the arena, and use other adapters until ``name`` is not in host memory either."""
    assert server.call("/flush_cache", {})[0] == 200
    for other in ("a4", "a5", "a6", "a7"):
        assert ask(server, many, other)[0] == 200
    assert facts(server)[name]["tier"] == "disk"


@pytest.fixture
def folder(many, tmp_path) -> Iterator[Path]:
    """The folder of a0, put back afterwards."""
    path = Path(many[1]["a0"])
    shutil.copytree(path, tmp_path / "kept")
    yield path
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", path)


def all_together(server: Server, many) -> dict[str | None, int]:
    """One request of every adapter and of the base model at once, so that they wait and run together."""
    from concurrent.futures import ThreadPoolExecutor

    names = [*many[1], None]
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda name: ask(server, many, name, 1)[0], names), strict=True))


def test_every_tier_serves_and_is_shown(server: Server, many) -> None:
    for _ in range(2):
        assert set(all_together(server, many).values()) == {200}
    found = facts(server)
    assert {one["tier"] for one in found.values()} >= {"resident", "disk"}
    assert sum(one["disk_reads"] for one in found.values()) >= ADAPTERS // 2, "all but two of the first loads"
    assert sum(one["host_evictions"] for one in found.values()) >= ADAPTERS // 2
    for one in found.values():
        assert one["bytes_copied"] == one["loads"] * one["bytes_per_tp_rank"]


def test_host_memory_serves_an_adapter_whose_folder_is_gone(server: Server, many, folder: Path) -> None:
    put_out(server, many, "a0")
    assert ask(server, many, "a0")[0] == 200
    shutil.rmtree(folder)
    assert server.call("/flush_cache", {})[0] == 200
    assert facts(server)["a0"]["tier"] == "host"
    assert ask(server, many, "a0")[0] == 200
    assert facts(server)["a0"]["tier"] == "resident"


@pytest.mark.parametrize("harm", ["gone", "cut short", "other bytes"])
def test_an_adapter_that_cannot_be_read_fails_alone_and_comes_back(
    server: Server, many, folder: Path, harm: str, tmp_path: Path
) -> None:
    put_out(server, many, "a0")
    if harm == "gone":
        shutil.rmtree(folder)
    elif harm == "cut short":
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)
    else:
        shutil.copy(Path(many[1]["a2"]) / WEIGHTS, folder / WEIGHTS)
    statuses = all_together(server, many)
    assert statuses.pop("a0") == 400
    assert set(statuses.values()) == {200}
    status, answer = ask(server, many, "a0")
    assert status == 400
    message = str(answer)
    assert "'a0'" in message
    assert str(folder) in message
    assert {"gone": "no folder", "cut short": "cannot be read", "other bytes": "other contents"}[harm] in message
    assert facts(server)["a0"]["last_error"] in message
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder)
    assert ask(server, many, "a0")[0] == 200, "the folder is back"
    assert facts(server)["a0"]["last_error"] is None


def test_it_can_be_unloaded_while_broken_and_loaded_from_elsewhere(
    server: Server, many, folder: Path, tmp_path: Path
) -> None:
    put_out(server, many, "a0")
    shutil.rmtree(folder)
    assert ask(server, many, "a0")[0] == 400
    assert server.call("/unload_lora_adapter", {"lora_name": "a0"})[0] == 200
    status, answer = server.call("/load_lora_adapter", {"lora_name": "a0", "lora_path": str(tmp_path / "kept")})
    assert status == 200, answer
    assert ask(server, many, "a0")[0] == 200
    assert set(all_together(server, many).values()) == {200}


def test_while_an_adapter_is_read_all_others_go_on(server: Server, many) -> None:
    """a3 is loaded and in no memory; its requests wait for the storage, those of other adapters do not."""
    folder = many[1]["a3"]
    put_out(server, many, "a3")
    (folder / slow_launcher.HOLD).touch()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, server, many, "a3", index) for index in (0, 1)]
        for name in ("a4", "a7", None, "a1", "a2"):
            assert ask(server, many, name)[0] == 200
        assert not any(one.done() for one in waiting)
        (folder / slow_launcher.HOLD).unlink()
        assert [one.result()[0] for one in waiting] == [200, 200]


def test_while_an_adapter_is_loaded_all_others_go_on(server: Server, many, tmp_path: Path) -> None:
    """Also while nothing else runs, when the scheduler sleeps."""
    _, adapters, prompts, expected = many
    new = shutil.copytree(adapters["a2"], tmp_path / "new")
    (new / slow_launcher.HOLD).touch()
    body = {"lora_name": "new", "lora_path": str(new)}
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(server.call, "/load_lora_adapter", body)
        for name in ("a4", None, "a5", "a1"):
            assert ask(server, many, name)[0] == 200
        assert not loading.done()
        (new / slow_launcher.HOLD).unlink()
        assert loading.result()[0] == 200
    assert server.tokens(prompts[0], "new", NEW_TOKENS) == expected["a2"][0]
    assert server.call("/unload_lora_adapter", {"lora_name": "new"})[0] == 200


def test_storage_that_hangs_is_a_clear_error_and_the_adapter_serves_again_later(
    server: Server, many, tmp_path: Path
) -> None:
    folder = many[1]["a3"]
    new = shutil.copytree(folder, tmp_path / "new")
    put_out(server, many, "a3")
    for held in (folder, new):
        (held / slow_launcher.HOLD).touch()
    body = {"lora_name": "new", "lora_path": str(new)}
    for status, answer in (ask(server, many, "a3"), server.call("/load_lora_adapter", body)):
        assert status == 400
        assert f"could not be read within {TIMEOUT_S} s" in str(answer)
        assert "--adapter-read-timeout" in str(answer)
    for held in (folder, new):
        (held / slow_launcher.HOLD).unlink()
    assert ask(server, many, "a4")[0] == 200
    wait_for(lambda: ask(server, many, "a3")[0] == 200)
    wait_for(lambda: server.call("/load_lora_adapter", body)[0] == 200)
    assert server.tokens(many[2][1], "new", NEW_TOKENS) == many[3]["a3"][1]
    assert server.call("/unload_lora_adapter", {"lora_name": "new"})[0] == 200


def wait_for(check: Callable[[], bool]) -> None:
    """A read that was given up may take a moment to come back; until then its folder is refused."""
    end = time.monotonic() + 60
    while not check():
        assert time.monotonic() < end
        time.sleep(0.1)
