"""``/server_info`` of SGLang's own app, with our endpoint in the place of upstream's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from sglang_blocklora.reporting.secrets import HIDDEN

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.http import server_info
    from fastapi import FastAPI
    from sglang.srt.entrypoints import http_server
    from starlette.testclient import TestClient


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_no_key_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def told() -> Any:
        return {"admin_api_key": "k1", "launch_command": "launch --admin-api-key k1", "port": 1}

    app = FastAPI()
    app.router.routes.extend(http_server.app.router.routes)
    server_info.add_to(app)
    monkeypatch.setattr(http_server, "server_info", told)
    answer = TestClient(app).get(path).json()
    assert answer == {"admin_api_key": HIDDEN, "launch_command": f"launch --admin-api-key {HIDDEN}", "port": 1}
