"""Loads an adapter when a request first names it, with ``--adapter-dir``."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.runtime_context import get_lora
from sglang_blocklora.naming.folders import NO_FOLDERS, AdapterFolders, NotReadable
from sglang_blocklora.naming.lookups import FOLDERS, STORES, NoAnswer, look_up
from sglang_blocklora.naming.model_names import UnknownModel, known_adapters, reason_not_to_name
from sglang_blocklora.settings import Settings
from sglang_blocklora.sources.stores import Stores
from sglang_blocklora.sources.urls import is_url

from blocklora_patches.http import tenants
from blocklora_patches.http.adapters import adapters_of

logger = logging.getLogger(__name__)

_NOWHERE = "nowhere"


def adapter_folders() -> AdapterFolders:
    """Where adapters are that no request has named yet."""
    settings = Settings.active()
    return settings.adapter_folders if settings else NO_FOLDERS


def loaded_adapters(tokenizer_manager: Any) -> Mapping[str, LoRARef]:
    """Name -> ``LoRARef`` of adapters that are loaded, or were until ``--max-loaded-loras`` put them out.

    Here and below: of those that who asks may know.
    """
    return tenants.visible(ChainMap(tokenizer_manager.lora_registry._registry, tokenizer_manager.lora_ref_cache))


@lru_cache
def _stores(urls: tuple[str, ...]) -> Stores:
    return Stores(urls)


def adapter_stores() -> Stores:
    """Those of them that have to be fetched."""
    settings = Settings.active()
    return _stores(settings.adapter_urls if settings else ())


def adapter_places() -> tuple[Path | str, ...]:
    """Folders and URLs below which adapters are loaded from when they are named."""
    return (*adapter_folders().roots, *adapter_stores().roots)


async def adapters_in_folders(tokenizer_manager: Any) -> dict[str, Path | str]:
    """Name -> folder or URL of adapters that a request loads by naming them; none of those that do not answer."""
    found: dict[str, Path | str] = {}
    for places, threads in ((adapter_stores(), STORES), (adapter_folders(), FOLDERS)):
        try:
            found |= await look_up(places.all, threads=threads) if places.roots else {}
        except NoAnswer as error:
            logger.warning("%s Adapters in them are not listed.", error)
    base = tokenizer_manager.served_model_name
    named = {name: path for name, path in found.items() if reason_not_to_name(name, base, DEFAULT_MODEL_NAME) is None}
    return dict(tenants.visible(named))


async def find_folder(tokenizer_manager: Any, name: str) -> Path | str | None:
    """The folder or URL to load ``name`` from, which is not loaded; None where there is none.

    Raises ``UnknownModel`` where this process may not look into it, and ``NoAnswer``.
    """
    ref = tokenizer_manager.lora_ref_cache.get(name)
    if (ref is None and not adapter_places()) or not tenants.may_use(name):
        return None
    try:
        folder = await look_up(_find, ref and ref.lora_path, name)
        return folder or (
            await look_up(adapter_stores().find, name, threads=STORES) if adapter_stores().roots else None
        )
    except NotReadable as error:
        raise UnknownModel(f"The adapter '{name}' cannot be loaded: {error}") from error


def _find(remembered: str | None, name: str) -> Path | str | None:
    if remembered and (is_url(remembered) or Path(remembered).is_dir()):
        return remembered
    return adapter_folders().find(name)


def names_of(obj: Any) -> set[str]:
    """The adapters that a request names. Raises ``ValueError`` where they are more than can have a name."""
    names = {obj.lora_path} if isinstance(obj.lora_path, str) else {name for name in obj.lora_path if name}
    limit = get_lora().max_loaded_loras
    if limit is not None and len(names) > limit:
        raise ValueError(f"The request names {len(names)} adapters; --max-loaded-loras is {limit}.")
    return names


def refuse_others(tokenizer_manager: Any, names: Collection[str | None]) -> None:
    """Raise ``ValueError``, as for a name that nobody has, where one of ``names`` is not for who asks."""
    for name in names:
        if name and not tenants.may_use(name):
            raise ValueError(_does_not_exist(tokenizer_manager, name))


def _does_not_exist(manager: Any, name: str) -> str:
    return f"The adapter '{name}' does not exist. {known_adapters(loaded_adapters(manager), adapter_places())}"


async def load_missing(tokenizer_manager: Any, names: set[str]) -> None:
    """Load those of ``names`` that are not loaded. Raises ``ValueError``, which becomes a 400, if one cannot be."""
    while missing := names - adapters_of(tokenizer_manager).loaded.keys():
        await _load(tokenizer_manager, min(missing))


async def _load(manager: Any, name: str) -> None:
    """Load ``name``, however many requests ask for it at once."""
    adapters = adapters_of(manager)

    async def load() -> str | None:
        if name in adapters.loaded:
            return None
        try:
            folder = await find_folder(manager, name)
        except NoAnswer:
            raise
        except UnknownModel as error:
            return str(error)
        if folder is None:
            return _NOWHERE
        ref = manager.lora_ref_cache.get(name)
        result = await adapters.load(name, str(folder), bool(ref and ref.pinned), found_by_name=ref is None)
        return None if result.success else result.error_message

    error = await adapters.on_use.run(name, load)
    if error is not None and name not in adapters.loaded:
        # Each who asked is told of the adapters that it may know.
        raise ValueError(_does_not_exist(manager, name) if error is _NOWHERE else error)
