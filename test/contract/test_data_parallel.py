"""Loading on every data parallel replica or on none, with SGLang's own registry and replicas that answer as told."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest


class Manager:
    """As much of ``TokenizerManager`` as loading touches."""

    def __init__(self, answers: list[bool]) -> None:
        from sglang.srt.lora.lora_registry import LoRARegistry

        self.answers = answers
        self.sent: list[Any] = []
        self.lora_registry = LoRARegistry()
        self.lora_ref_cache: dict[str, Any] = {}

    async def update_lora_adapter_communicator(self, request: Any) -> list[Any]:
        self.sent.append(request)
        return [
            SimpleNamespace(success=success, error_message=None if success else f"replica {i} refused")
            for i, success in enumerate(self.answers)
        ]


@pytest.fixture(scope="module")
def load() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.http.replicas import _load_on_all
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    def run(manager: Manager, name: str = "a") -> Any:
        request = LoadLoRAAdapterReqInput(lora_name=name, lora_path="/a", pinned=False)
        return asyncio.run(_load_on_all(manager, request))

    return run


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
