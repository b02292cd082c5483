"""/metrics gives a Prometheus that asks for OpenMetrics, as it does by default, names without their colons."""

from __future__ import annotations

import asyncio
import os
import tempfile
from unittest import mock

ACCEPTS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


def fault() -> str | None:
    import httpx
    from fastapi import FastAPI
    from prometheus_client import Counter, values
    from sglang.srt.utils.common import add_prometheus_middleware

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"PROMETHEUS_MULTIPROC_DIR": folder}),
        mock.patch.object(values, "ValueClass", values.MultiProcessValue()),
    ):
        Counter("sglang:asked_total", "Of this script.").inc()
        app = FastAPI()
        add_prometheus_middleware(app)

        async def scrape() -> str:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                return (await client.get("/metrics/", headers={"Accept": ACCEPTS})).text

        page = asyncio.run(scrape())
    assert "asked_total 1.0" in page, page
    return None if "sglang:asked_total 1.0" in page else "sglang:asked_total is told as sglang_asked_total"


if __name__ == "__main__":
    print(fault() or "mended")
