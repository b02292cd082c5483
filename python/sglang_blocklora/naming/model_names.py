"""Which adapter a model name of the OpenAI API means."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sglang_blocklora.naming.folders import NO_FOLDERS, AdapterFolders


class UnknownModel(LookupError):
    """A name that is neither the base model nor an adapter; the message lists the known ones."""


def resolve_model(
    model: str,
    base: str,
    default: str,
    loaded: Collection[str],
    folders: AdapterFolders = NO_FOLDERS,
) -> str | None:
    """The adapter that ``model`` names, or None for the base model.

    model    "base", an adapter's name, or "base:adapter"
    base     the served name of the base model; ``default`` is what a request without a model carries
    folders  where other adapters are loaded from when a request names them
    Raises ``UnknownModel``. Names are tried whole first, so a name with a colon in it works too.
    """
    if model in (base, default):
        return None
    parts = (model.removeprefix(f"{prefix}:") for prefix in (base, default))
    for name in (model, *(part for part in parts if part != model)):
        if name in loaded or folders.find(name) is not None:
            return name
    raise UnknownModel(f"The model '{model}' does not exist. Base model: {base}. {known_adapters(loaded, folders)}")


def known_adapters(loaded: Iterable[str], folders: AdapterFolders = NO_FOLDERS) -> str:
    """What a message says about the names there are."""
    text = f"Adapters: {', '.join(sorted(loaded)) or 'none'}."
    places = " or ".join(map(str, folders.roots))
    return f"{text} Others are folders below {places} and loaded when they are named." if places else text
