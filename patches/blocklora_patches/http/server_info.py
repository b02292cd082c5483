"""Lets ``/server_info`` tell the configuration without its keys.

Upstream's tells ``admin_api_key`` to every client that may generate, and such a client could then load and unload.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from sglang.srt.entrypoints import http_server
from sglang_blocklora.reporting.secrets import without_secrets


async def server_info() -> Any:
    """Upstream's answer, its secrets hidden."""
    return without_secrets(await http_server.server_info())


def add_to(app: FastAPI) -> None:
    """Put our route before upstream's of the same path."""
    for path in ("/server_info", "/get_server_info"):
        app.add_api_route(path, server_info, methods=["GET"])
        app.router.routes.insert(0, app.router.routes.pop())
