"""Lets ``Engine.generate`` take ``adapter=`` (``entrypoints/engine.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang_blocklora.naming.choice import NOT_GIVEN, NotGiven

# A name, None for the base model, or one of these per prompt.
AdapterNames = str | list[str | None] | NotGiven | None


class AdapterEngine(Engine):
    """SGLang's, with the word of the frontend language for ``lora_path``."""

    def generate(self, *args: Any, adapter: AdapterNames = NOT_GIVEN, **kwargs: Any) -> Any:
        """SGLang's, by ``adapter``."""
        return super().generate(*args, **_named(adapter, kwargs))

    async def async_generate(self, *args: Any, adapter: AdapterNames = NOT_GIVEN, **kwargs: Any) -> Any:
        """SGLang's, by ``adapter``."""
        return await super().async_generate(*args, **_named(adapter, kwargs))


def _named(adapter: AdapterNames, arguments: dict[str, Any]) -> dict[str, Any]:
    if isinstance(adapter, NotGiven):
        return arguments
    if arguments.get("lora_path") is not None:
        raise ValueError(f"adapter={adapter!r} and lora_path={arguments['lora_path']!r}: give one of the two")
    return arguments | {"lora_path": adapter}
