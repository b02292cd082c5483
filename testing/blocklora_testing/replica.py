"""A stand-in for a server behind a front: a real HTTP server on loopback, which goes and comes when it is told to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web


class StandIn:
    """A server called ``name`` at ``url``, which answers with its name and what it was asked for.

    adapters  by name: the body that loaded each; gone when it is started again
    asked     (method, path, headers, body) of every request but checks of its health
    refuse    names that it loads with a 400
    status    what every request but loads is answered with
    broken    None, or after how many parts a stream breaks off, or 0: before an answer
    aborted   requests whose client went away
    """

    def __init__(self, name: str, key: str | None = None, base: str = "base") -> None:
        self.name, self.key, self.base = name, key, base
        self.adapters: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.refuse: set[str] = set()
        self.status = 200
        self.broken: int | None = None
        self.aborted = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, with nothing loaded; where it listened before, if it did."""
        self.adapters.clear()
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Go away: connections are refused, and open ones break off."""
        for connection in self._runner.server.connections if self._runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response(status=self.status)
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path, dict(request.headers), body))
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return self._load_or_unload(request.path, body)
        if request.path.startswith("/adapters/"):
            name = request.path.split("/")[2]
            return web.json_response({"name": name}, status=200 if name in self.adapters else 404)
        if request.path == "/v1/models" and self.status == 200:
            cards = [{"id": self.base, "parent": None}, *({"id": one, "parent": self.base} for one in self.adapters)]
            return web.json_response({"object": "list", "data": cards})
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        if self.status != 200:
            return web.json_response({"error": self.name}, status=self.status)
        if self.broken == 0:
            request.transport.abort()
        if not (body or {}).get("stream"):
            return web.json_response({"replica": self.name}, headers={"X-Adapter-Version": self.name})
        return await self._stream(request, json.dumps(_chunk(self.name)))

    def _load_or_unload(self, path: str, body: dict[str, Any]) -> web.Response:
        name = body["lora_name"]
        if path.startswith("/v1/unload"):
            return web.Response(
                status=200 if self.adapters.pop(name, None) else 404, text=f"{self.name} unloads {name}"
            )
        if name in self.refuse or (name in self.adapters and not body.get("load_inplace")):
            return web.json_response({"error": {"message": f"{self.name} refuses {name}"}}, status=400)
        self.adapters[name] = body
        return web.Response(text=f"{self.name} loads {name}")

    async def _stream(self, request: web.Request, told: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(4):
            if number == self.broken:
                await response.write(f"data: {told[:9]}".encode())  # half a part
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            await response.write(f"data: {told}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def tokens_asked(self) -> list[Any]:
        """Bodies of the requests for answers, in their order."""
        return [body for method, path, _, body in self.asked if method == "POST" and path.endswith("completions")]


def _chunk(text: str) -> dict[str, Any]:
    """A part of a streamed completion."""
    choice = {"index": 0, "text": text, "finish_reason": None}
    return {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
