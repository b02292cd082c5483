"""Loading for a request, and knowing when nothing uses an adapter any more, with SGLang's own registry."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_blocklora.settings import Settings


@pytest.fixture(scope="module")
def patches() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.http import adapters, load_on_use, registry
        from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry
    return SimpleNamespace(
        load=load_on_use, registry=registry, manager=adapters, LoRARef=LoRARef, LoRARegistry=LoRARegistry
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with Settings(adapter_dirs=(str(tmp_path),)).exported():
        yield tmp_path


class Manager:
    """A tokenizer manager whose loads take a moment, and fail while ``broken``."""

    def __init__(self, patches: Any) -> None:
        self.patches = patches
        self.lora_registry = patches.LoRARegistry()
        self.lora_ref_cache: dict[str, Any] = {}
        self.loads: list[str] = []
        self.broken = False

    async def load_lora_adapter(self, request: Any) -> Any:
        self.loads.append(request.lora_path)
        await asyncio.sleep(0)
        if self.broken:
            return SimpleNamespace(success=False, error_message="broken adapter")
        ref = self.patches.LoRARef(lora_name=request.lora_name, lora_path=request.lora_path)
        await self.lora_registry.register(ref)
        return SimpleNamespace(success=True, error_message=None)

    async def ask(self, lora_path: Any) -> Any:
        request = SimpleNamespace(lora_path=lora_path)

        async def original(manager: Any, request: Any) -> None:
            request.lora_id = await manager.lora_registry.acquire(request.lora_path)

        await self.patches.load._resolve_lora_path(original, self, request)
        return request.lora_id


def test_many_requests_one_load_each_and_failures_are_not_kept(patches: Any, folder: Path) -> None:
    async def main() -> None:
        manager = Manager(patches)
        manager.broken = True
        for outcome in await asyncio.gather(*(manager.ask("a") for _ in range(5)), return_exceptions=True):
            assert isinstance(outcome, ValueError)
            assert str(outcome) == "broken adapter"
        assert manager.loads == [str(folder / "a")]
        manager.broken = False
        ids = await asyncio.gather(*(manager.ask("a") for _ in range(5)), manager.ask(["a", None, "b", "b"]))
        assert manager.loads == [str(folder / "a"), str(folder / "a"), str(folder / "b")]
        assert ids[5] == [ids[0], None, ids[5][2], ids[5][2]]
        await manager.ask("b")
        assert len(manager.loads) == 3

    asyncio.run(main())


def test_an_unknown_name_is_refused_without_a_load(patches: Any, folder: Path) -> None:
    manager = Manager(patches)
    with pytest.raises(ValueError, match=r"'../a' does not exist\. Adapters: none\. Others are folders below"):
        asyncio.run(manager.ask("../a"))
    assert manager.loads == []


def test_an_unload_waits_for_the_requests_themselves_not_for_a_count(patches: Any) -> None:
    """Ten requests that upstream would still count, and one more that it would count off twice."""

    async def main() -> None:
        registry = patches.LoRARegistry()
        ref = patches.LoRARef(lora_name="a", lora_path="/a")
        await registry.register(ref)
        states = {rid: SimpleNamespace(obj=SimpleNamespace(lora_id=None)) for rid in ("used", "base", "other")}
        manager = SimpleNamespace(lora_registry=registry, rid_to_state=states)
        patches.registry._init_lora(None, manager)
        states["other"].obj.lora_id = "another"
        for _ in range(10):
            states["used"].obj.lora_id = await patches.registry._acquire(type(registry).acquire, registry, "a")
        await registry.unregister("a")
        waiting = asyncio.create_task(patches.registry._wait_for_unload(None, registry, ref.lora_id))
        await asyncio.sleep(5 * patches.registry.POLL_SECONDS)
        assert not waiting.done()
        del states["used"]
        await asyncio.wait_for(waiting, 60)
        await registry.release(ref.lora_id)  # upstream does, after the state is gone
        with pytest.raises(ValueError, match="not loaded"):
            await patches.registry._acquire(type(registry).acquire, registry, "a")
        await patches.registry._wait_for_unload(None, registry, ref.lora_id)

    asyncio.run(main())


@pytest.mark.parametrize("outcome", [True, False])
def test_what_is_unloaded_cannot_be_loaded_again_while_its_last_requests_run(patches: Any, outcome: bool) -> None:
    async def run() -> None:
        manager = Manager(patches)
        manager.pending_lora_unloads = {}
        ref = patches.LoRARef(lora_name="elsewhere", lora_path="/elsewhere")
        await manager.lora_registry.register(ref)
        manager.lora_ref_cache["elsewhere"] = ref

        async def drain(*_: Any) -> Any:
            await manager.lora_registry.unregister("elsewhere")
            with pytest.raises(ValueError, match="does not exist"):
                await manager.ask("elsewhere")
            return SimpleNamespace(success=outcome, error_message=None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patches.manager, "unload", drain)
            await patches.manager._unload_lora_adapter(None, manager, SimpleNamespace(lora_name="elsewhere"))
        assert ("elsewhere" in manager.lora_ref_cache) is not outcome

    asyncio.run(run())


def test_an_adapter_that_a_limit_put_out_can_be_unloaded_for_good(patches: Any) -> None:
    async def run() -> None:
        manager = Manager(patches)
        manager.pending_lora_unloads = {}
        manager.lora_ref_cache["a"] = patches.LoRARef(lora_name="a", lora_path="/a")
        result = await patches.manager._unload_lora_adapter(None, manager, SimpleNamespace(lora_name="a"))
        assert result.success
        assert not manager.lora_ref_cache

    asyncio.run(run())
