"""Decides who may load, unload and pin adapters over HTTP.

A load reads the server's disk and an unload ends a service. Where others than this machine reach the server, they need
a key, or the loads must be confined to folders that the operator gave; else all of it is refused.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from sglang.srt.runtime_context import get_serving
from sglang_blocklora.naming.folders import AdapterFolders
from sglang_blocklora.naming.lookups import look_up
from sglang_blocklora.requests.loopback import is_loopback
from sglang_blocklora.settings import Settings
from sglang_blocklora.sources.urls import BadURL, is_url, located

_NOT_BELOW = (
    "{url!r} is not below a URL that this server may fetch adapters from. Start it with --adapter-root or "
    "--adapter-dir and such a URL (with --adapter-root, folders need one of their own)."
)


class NotAllowed(HTTPException):
    """Answered with a 403 and what to set."""

    def __init__(self, reason: str) -> None:
        super().__init__(403, reason)


def reason_not_to_manage() -> str | None:
    """Why nobody may load, unload or pin adapters over HTTP, or None."""
    settings, serving = Settings.active(), get_serving()
    if settings is None or _is_protected(settings, serving):
        return None
    if settings.adapter_roots or settings.adapter_dirs:
        return None
    return (
        f"Loading, unloading and pinning adapters over HTTP is closed: the server listens on {serving.host}, where "
        "others reach it, and a load reads its disk. Start it with --admin-api-key or --api-key, with --adapter-root "
        "or --adapter-dir to confine it to a folder, or with --adapter-loading-without-key to open it all the same."
    )


def check(request: Any) -> None:
    """Raise ``NotAllowed`` where the client of ``request`` may not manage adapters; None: a call within the process."""
    reason = reason_not_to_manage() if request is not None else None
    if reason is not None:
        raise NotAllowed(reason)


def check_bringing(request: Any) -> None:
    """``check`` for one who brings an adapter along: folders that loads are confined to do not confine that."""
    check(request)
    settings, serving = Settings.active(), get_serving()
    if request is not None and settings is not None and not _is_protected(settings, serving):
        raise NotAllowed(
            f"Loading adapters from tensors is closed: the server listens on {serving.host}, where others reach it, "
            "and nobody needs a key. Start it with --admin-api-key, --api-key or --adapter-loading-without-key."
        )


async def allowed_path(request: Any, path: str) -> str:
    """Where to load ``path`` from, a folder or a URL. Raises ``NotAllowed`` where the client may not load it.

    A path that has to lie below ``--adapter-dir`` is told with its links followed: what was checked is what is loaded.
    """
    check(request)
    settings = Settings.active()
    with suppress(BadURL):  # a load refuses it
        path = located(path)
    if request is None or settings is None:
        return path
    if is_url(path):
        if not settings.may_fetch(path):
            raise NotAllowed(_NOT_BELOW.format(url=path))
        return path
    if settings.adapter_roots or _is_protected(settings, get_serving()):
        return path  # the schedulers keep to --adapter-root
    real = await look_up(_inside, settings.adapter_folders, path)
    if real is None:
        raise NotAllowed(
            f"Without a key, adapters are loaded from below {' or '.join(settings.adapter_dirs)} only. Give a folder "
            "in there, or start the server with --admin-api-key, --api-key or --adapter-loading-without-key."
        )
    return str(real)


def _is_protected(settings: Settings, serving: Any) -> bool:
    return bool(
        settings.adapter_loading_without_key or serving.api_key or serving.admin_api_key or is_loopback(serving.host)
    )


def _inside(folders: AdapterFolders, path: str) -> Path | None:
    try:
        real = Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # not encodable, a loop of links
        return None
    return real if folders.root_of(str(real)) is not None else None
