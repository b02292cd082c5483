"""Checks the adapters that a request names in ``lora_path``."""

from __future__ import annotations

from typing import Any

from sglang_blocklora.requests.values import BadRequest, shown


def check_adapter_names(field: str, names: Any) -> None:
    """Refuse ``names`` unless it is None (the base model), a name, or a list of those. Raises ``BadRequest``."""
    if isinstance(names, list):
        for position, name in enumerate(names):
            _check_name(f"{field}[{position}]", name)
    else:
        _check_name(field, names)


def _check_name(field: str, name: Any) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise BadRequest(f"{field} is {shown(name)}; it is an adapter's name, or null for the base model.")
