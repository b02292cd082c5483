"""Takes keys and passwords out of what a client is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Fields of SGLang's configuration.
SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
HIDDEN = "(hidden)"


def without_secrets(value: Any) -> Any:
    """A copy of nested mappings and lists whose fields of ``SECRETS`` are hidden, also within a launch command."""
    return _hide(value, set(_secrets(value)))


def _secrets(value: Any) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        if key in SECRETS and inner:
            yield str(inner)
        elif isinstance(inner, Mapping | list):
            yield from _secrets(inner)


def _hide(value: Any, secrets: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: HIDDEN if key in SECRETS and inner else _hide(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hide(inner, secrets) for inner in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
    return value
