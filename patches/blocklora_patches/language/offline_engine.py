"""Lets ``Engine.generate`` take ``adapter=``, and adapters be updated (``entrypoints/engine.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from sglang.srt.entrypoints.engine import Engine
from sglang_blocklora.naming.choice import NOT_GIVEN, NotGiven

from blocklora_patches.http.tensors import SAFETENSORS, Brought

# A name, None for the base model, or one of these per prompt.
AdapterNames = str | list[str | None] | NotGiven | None


class AdapterEngine(Engine):
    """SGLang's, with the word of the frontend language for ``lora_path``, and vLLM's for an update of an adapter."""

    def generate(self, *args: Any, adapter: AdapterNames = NOT_GIVEN, **kwargs: Any) -> Any:
        """SGLang's, by ``adapter``."""
        return super().generate(*args, **_named(adapter, kwargs))

    async def async_generate(self, *args: Any, adapter: AdapterNames = NOT_GIVEN, **kwargs: Any) -> Any:
        """SGLang's, by ``adapter``."""
        return await super().async_generate(*args, **_named(adapter, kwargs))

    def load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False, load_inplace: bool = False
    ) -> Any:
        """SGLang's; with ``load_inplace`` an adapter that has the name is replaced, once the new one is there."""
        return self.loop.run_until_complete(self.async_load_lora_adapter(lora_name, lora_path, pinned, load_inplace))

    async def async_load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False, load_inplace: bool = False
    ) -> Any:
        """The same, for scripts with an event loop."""
        self.tokenizer_manager.auto_create_handle_loop()
        adapters = self.tokenizer_manager.blocklora_adapters
        return await adapters.load(lora_name, lora_path, pinned, update=load_inplace)

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: Mapping[str, torch.Tensor] | Sequence[Any],
        config_dict: Mapping[str, Any],
        load_format: str | None = None,
        pinned: bool = False,
        load_inplace: bool = False,
    ) -> Any:
        """SGLang's, whose tensors live on: also when the adapter was put out of memory.

        tensors       by the names that PEFT saves; or what SGLang's ``load_format`` says
        config_dict   adapter_config.json
        load_inplace  an adapter that has the name is replaced, once the new one is there
        """
        return self.loop.run_until_complete(
            self.async_load_lora_adapter_from_tensors(
                lora_name, tensors, config_dict, load_format, pinned, load_inplace
            )
        )

    async def async_load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: Mapping[str, torch.Tensor] | Sequence[Any],
        config_dict: Mapping[str, Any],
        load_format: str | None = None,
        pinned: bool = False,
        load_inplace: bool = False,
    ) -> Any:
        """The same, for scripts with an event loop."""
        if isinstance(tensors, Mapping):
            tensors = [safetensors.torch.save({name: _own(tensor) for name, tensor in tensors.items()})]
            load_format = SAFETENSORS
        brought = Brought(
            lora_name=lora_name,
            config_dict=dict(config_dict),
            serialized_named_tensors=tensors,
            load_format=load_format,
            pinned=pinned,
            load_inplace=load_inplace,
        )
        return await self.tokenizer_manager.load_lora_adapter_from_tensors(brought, None)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """As safetensors takes them: on the host, contiguous, and sharing memory with no other."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _named(adapter: AdapterNames, arguments: dict[str, Any]) -> dict[str, Any]:
    if isinstance(adapter, NotGiven):
        return arguments
    if arguments.get("lora_path") is not None:
        raise ValueError(f"adapter={adapter!r} and lora_path={arguments['lora_path']!r}: give one of the two")
    return arguments | {"lora_path": adapter}
