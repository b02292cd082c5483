"""Which adapter a model name of the OpenAI API means."""

from __future__ import annotations

from collections.abc import Iterable


class UnknownModel(LookupError):
    """A name that is neither the base model nor an adapter; the message lists the known ones."""


def resolve_model(model: str, base: str, default: str, adapters: Iterable[str]) -> str | None:
    """The adapter that ``model`` names, or None for the base model.

    model    "base", an adapter's name, or "base:adapter"
    base     the served name of the base model; ``default`` is what a request without a model carries
    Raises ``UnknownModel``. Names are tried whole first, so a name with a colon in it works too.
    """
    known = set(adapters)
    if model in (base, default):
        return None
    if model in known:
        return model
    for prefix in (base, default):
        name = model.removeprefix(f"{prefix}:")
        if name != model and name in known:
            return name
    names = ", ".join(sorted(known)) or "none"
    raise UnknownModel(f"The model '{model}' does not exist. Base model: {base}. Adapters: {names}.")
