"""Finds the adapter that a request's body names."""

from __future__ import annotations

import msgspec

from sglang_blocklora.naming.model_names import adapter_name

# What a request without a model carries, and the tag that Ollama's clients add to a name.
DEFAULT_MODEL = "default"
LATEST = ":latest"


class _Body(msgspec.Struct):
    model: str | None = None
    lora_path: str | list[str | None] | None = None


def adapter_of(path: str, body: bytes, base: str) -> str | None:
    """The adapter that a request for ``path`` asks for; None for the base model.

    base  the served name of the base model
    A body that names adapters in no way that is understood is the base model's here: its replica refuses it. Of several
    adapters in one body the first counts.
    """
    try:
        found = msgspec.json.decode(body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if path == "/generate":
        names = found.lora_path if isinstance(found.lora_path, list) else [found.lora_path]
        return next(filter(None, names), None)
    if not found.model:
        return None
    model = found.model.removesuffix(LATEST) if path.startswith("/api/") else found.model
    return adapter_name(model, base, DEFAULT_MODEL)
