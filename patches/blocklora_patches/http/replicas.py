"""Loads adapters on all data parallel replicas, and sends requests where theirs is (``managers/tokenizer_manager.py``).

The HTTP process knows every request in flight, and the data parallel controller obeys ``routed_dp_rank``, so the choice
is made here and the controller stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import LoRAUpdateOutput, UnloadLoRAAdapterReqInput
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_disagg, get_lora, get_parallel
from sglang_blocklora.scheduling.replicas import choose_replica
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.hook import Hook, Process


def _is_replicated() -> bool:
    return get_parallel().dp_size > 1


async def load(original: Any, manager: Any, obj: Any) -> Any:
    """``TokenizerManager.load_lora_adapter``, which upstream refuses where there are replicas."""
    if not _is_replicated():
        return await original(manager, obj)
    manager.auto_create_handle_loop()
    async with manager.lora_update_lock:
        result = await _load_on_all(manager, obj)
        limit = get_lora().max_loaded_loras
        while result.success and limit is not None and manager.lora_registry.num_registered_loras > limit:
            oldest = await manager.lora_registry.lru_lora_name(exclude_pinned=True)
            if oldest is None:
                break
            await manager._unload_lora_adapter_locked(UnloadLoRAAdapterReqInput(lora_name=oldest))
    return result


async def _load_on_all(manager: Any, obj: Any) -> LoRAUpdateOutput:
    """Load on every replica or on none."""
    name = obj.lora_name
    if name in manager.lora_registry.get_all_adapters():
        return LoRAUpdateOutput(success=False, error_message=f"adapter {name!r}: a name that is already loaded")
    ref = LoRARef(lora_name=name, lora_path=obj.lora_path, pinned=obj.pinned)
    obj.lora_id = ref.lora_id
    results = await manager.update_lora_adapter_communicator(obj)
    refused = next((result for result in results if not result.success), None)
    if refused is not None:
        back = UnloadLoRAAdapterReqInput(lora_name=name, lora_id=ref.lora_id)
        await manager.update_lora_adapter_communicator(back)  # nothing where it was not loaded
        return refused
    await manager.lora_registry.register(ref)
    manager.lora_ref_cache[name] = ref
    return results[0]


async def unload(original: Any, manager: Any, obj: Any) -> Any:
    """``TokenizerManager.unload_lora_adapter``, which upstream refuses where there are replicas."""
    if not _is_replicated():
        return await original(manager, obj)
    manager.auto_create_handle_loop()
    async with manager.lora_update_lock:
        try:
            return await manager._unload_lora_adapter_locked(obj)
        except ValueError as error:  # no adapter of that name
            return LoRAUpdateOutput(success=False, error_message=str(error))


def _send_one_request(self: Any, tokenized_obj: Any) -> None:
    _route(self, [tokenized_obj])


def _send_batch_request(self: Any, tokenized_objs: Sequence[Any]) -> None:
    _route(self, tokenized_objs)


def _route(manager: Any, requests: Sequence[Any]) -> None:
    settings = Settings.active()
    if not _is_replicated() or settings is None or not settings.route_by_adapter:
        return
    if get_disagg().disaggregation_mode != "null":  # there the prefill server's replica decides
        return
    loads = [0] * get_parallel().dp_size
    for state in manager.rid_to_state.values():
        replica = getattr(state, "blocklora_replica", None)
        if replica is not None:
            loads[replica] += 1
    for request in requests:
        state = manager.rid_to_state[request.rid]
        if request.routed_dp_rank is None:  # a client may have chosen
            request.routed_dp_rank = choose_replica(state.obj.lora_path or None, loads)
        state.blocklora_replica = request.routed_dp_rank
        loads[request.routed_dp_rank] += 1


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = (
    Hook(
        f"{_MANAGER}._send_one_request",
        _send_one_request,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Upstream's methods ignore adapters.",
        retire_when="upstream routes by adapter",
    ),
    Hook(
        f"{_MANAGER}._send_batch_request",
        _send_batch_request,
        HookType.BEFORE,
        process=Process.HTTP,
        why="As for _send_one_request.",
        retire_when="upstream routes by adapter",
    ),
)
