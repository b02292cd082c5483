"""Lets ``/server_info`` tell the configuration without its keys.

Upstream's tells ``admin_api_key`` to every client that may generate, and such a client could then load and unload.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from sglang.srt.entrypoints import http_server
from sglang_blocklora.reporting.secrets import without_secrets

from blocklora_patches.http.endpoints import replace


async def server_info() -> Any:
    """Upstream's answer, its secrets hidden."""
    return without_secrets(await http_server.server_info())


def add_to(app: FastAPI) -> None:
    """Answer in the place of upstream's endpoints."""
    for endpoint in (http_server.server_info, http_server.get_server_info):
        replace(app, endpoint, server_info)
