"""Tells what a model name of the OpenAI API means, and which names an adapter can have."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from pathlib import Path

# Room for any path that serves as a name, and little enough for logs, labels and addresses.
MAX_NAME_BYTES = 1024
# So many names are told by a message that lists those there are.
TOLD_NAMES = 20


class UnknownModel(LookupError):
    """A name that is neither the base model nor an adapter; the message lists the known ones.

    ``status_code`` is HTTP's, which OpenAI's routes answer with.
    """

    status_code = 404


def adapter_name(model: str, base: str, default: str) -> str | None:
    """The adapter that ``model`` asks for, whether or not there is one of that name; None for the base model.

    model    "base", "base:adapter" or "adapter"
    base     the served name of the base model; ``default`` is what a request without a model carries
    What a model name means follows from the three alone, never from which adapters there are.
    """
    if model in (base, default):
        return None
    for prefix in (base, default):
        if model.startswith(f"{prefix}:"):
            return model.removeprefix(f"{prefix}:")
    return model


def reason_not_to_name(name: str, base: str, default: str) -> str | None:
    """Why no adapter can be called ``name``, or None.

    Every load asks this. A name that passes is found by ``adapter_name``, and takes no name from any other: neither the
    base model's names nor "base:adapter" of another adapter.
    """
    problem = _problem(name, base, default)
    if problem is None:
        return None
    shown = f"{name[:40]}..." if len(name) > 40 else name
    return f"adapter {shown!a}: a name {problem}. Pick another."


def _problem(name: str, base: str, default: str) -> str | None:
    if not name.strip():
        return "that is empty"
    if name != name.strip():
        return "that begins or ends with a space"
    if not name.isprintable():
        return "with a character that is not printable"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"of {len(name.encode())} bytes, more than {MAX_NAME_BYTES}"
    if name in (base, default):
        return "of the base model"
    for prefix in (base, default):
        if name.startswith(f"{prefix}:"):
            return f"that begins with {prefix + ':'!r}, which means the base model's adapter of the rest of the name"
    return None


def resolve_model(
    model: str, base: str, default: str, known: Collection[str], roots: Collection[Path | str] = ()
) -> str | None:
    """The adapter that ``model`` names, or None for the base model. ``UnknownModel`` where it names nobody.

    known  names of the adapters there are
    roots  for the error: folders and URLs below which there are others
    """
    name = adapter_name(model, base, default)
    if name is None or name in known:
        return name
    raise UnknownModel(f"The model '{model}' does not exist. Base model: {base}. {known_adapters(known, roots)}")


def known_adapters(loaded: Collection[str], roots: Collection[Path | str]) -> str:
    """What a message says about the names there are.

    roots  folders and URLs below which other adapters are loaded from when they are named
    """
    told = ", ".join(heapq.nsmallest(TOLD_NAMES, loaded)) or "none"
    more = f" and {len(loaded) - TOLD_NAMES} more (GET /adapters)" if len(loaded) > TOLD_NAMES else ""
    places = " or ".join(map(str, roots))
    others = f" Others are folders below {places} and loaded when they are named." if places else ""
    return f"Adapters: {told}{more}.{others}"
