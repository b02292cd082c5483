"""Loading on every data parallel replica or on none, with SGLang's own registry and replicas that answer as told."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest


class Manager:
    """As much of ``TokenizerManager`` as loading touches."""

    served_model_name = "base"

    def __init__(self, answers: list[bool]) -> None:
        from blocklora_patches.http.registry import AdapterRegistry

        self.answers = answers
        self.sent: list[Any] = []
        self.lora_registry = AdapterRegistry()
        self.lora_ref_cache: dict[str, Any] = {}

    async def blocklora_updates(self, request: Any) -> list[Any]:
        self.sent.append(request)
        return [
            SimpleNamespace(
                success=success,
                error_message=None if success else f"replica {i} refused",
                loaded_adapters={request.lora_id: "hash"} if success else None,
            )
            for i, success in enumerate(self.answers)
        ]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.http import adapters

    monkeypatch.setattr(adapters, "get_lora", lambda: SimpleNamespace(max_loaded_loras=None))

    def run(manager: Manager, name: str = "a") -> Any:
        return asyncio.run(adapters.Adapters(manager).load(name, "/a"))

    return run


def test_every_replica_answers_each_request_by_its_id(load: Any) -> None:
    from blocklora_patches.http.updates import AdapterUpdates
    from sglang.srt.managers.io_struct import LoRAUpdateOutput, UnloadLoRAAdapterReqInput

    async def main() -> None:
        sent: list[Any] = []
        updates = AdapterUpdates(sent.append, 2)
        calls = [asyncio.create_task(updates(UnloadLoRAAdapterReqInput(lora_name=name))) for name in "abc"]
        await asyncio.sleep(0)
        a, b, c = (request.rid for request in sent)
        calls[2].cancel()
        await asyncio.wait({calls[2]})
        for rid, text in ((b, "b0"), (a, "a0"), (c, "c0"), ("nobody", "x"), (None, "y"), (a, "a1"), (b, "b1")):
            updates.handle_recv(LoRAUpdateOutput(success=True, error_message=text, rid=rid))
        found = [[answer.error_message for answer in await call] for call in calls[:2]]
        assert found == [["a0", "a1"], ["b0", "b1"]]
        assert updates._asked == {}

    asyncio.run(main())


def test_a_load_that_all_took_is_known(load: Any) -> None:
    manager = Manager([True, True, True])
    assert load(manager).success
    (sent,) = manager.sent
    assert manager.lora_registry.get_all_adapters()["a"].lora_id == sent.lora_id
    assert manager.lora_ref_cache.keys() == {"a"}


@pytest.mark.parametrize("answers", [[True, False, True], [False, True], [False, False]])
def test_a_load_that_one_refused_is_taken_back_everywhere(load: Any, answers: list[bool]) -> None:
    manager = Manager(answers)
    result = load(manager)
    assert (result.success, result.error_message) == (False, f"replica {answers.index(False)} refused")
    if True not in answers:
        assert len(manager.sent) == 1
        return
    asked, back = manager.sent
    assert type(back).__name__ == "UnloadLoRAAdapterReqInput"
    assert (back.lora_id, back.lora_name) == (asked.lora_id, "a")
    assert not manager.lora_registry.get_all_adapters()
    assert not manager.lora_ref_cache


def test_a_name_that_is_taken_reaches_no_replica(load: Any) -> None:
    manager = Manager([True, True])
    load(manager)
    result = load(manager)
    assert not result.success
    assert "already loaded" in result.error_message
    assert len(manager.sent) == 1
