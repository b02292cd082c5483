"""The front: one OpenAI-compatible address for a fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from aiohttp import web

from sglang_blocklora.fleet.calls import Calls, new_session
from sglang_blocklora.fleet.everywhere import LOAD, UNLOAD, Everywhere
from sglang_blocklora.fleet.metrics import Metrics
from sglang_blocklora.fleet.relay import Relay, unavailable
from sglang_blocklora.fleet.replicas import Fleet
from sglang_blocklora.fleet.settings import RouteSettings
from sglang_blocklora.fleet.watch import Watch
from sglang_blocklora.naming.turns import Turns
from sglang_blocklora.reporting.errors import openai_error

# Answered by one replica, whichever has the adapter.
ONE = (
    "/generate",
    "/v1/completions",
    "/v1/chat/completions",
    "/invocations",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/score",
    "/v1/classify",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
    "/api/chat",
    "/api/generate",
)
# The same of what a client asks about the model.
ABOUT = ("/v1/models/{name:.+}", "/model_info", "/get_model_info")
FLEET = web.AppKey("fleet", Fleet)


async def application(settings: RouteSettings) -> web.Application:
    """The front of ``settings.replica``, to be run in this event loop; its ``FLEET`` may be looked at."""
    app = web.Application(client_max_size=0)  # as large as replicas take them
    fleet = app[FLEET] = Fleet(settings.replica)
    calls, turns, metrics = Calls(fleet, new_session()), Turns(), Metrics(fleet)
    watch = Watch(calls, settings, turns)

    async def running(_: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch.forever(replica)) for replica in fleet.replicas]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await calls.session.close()

    app.cleanup_ctx.append(running)
    one, everywhere = Relay(calls, metrics), Everywhere(calls, settings, turns)
    app.add_routes(
        [
            *(web.post(path, one.answer) for path in ONE),
            *(web.get(path, one.answer) for path in ABOUT),
            web.get("/v1/models", everywhere.models),
            web.post(LOAD, everywhere.load),
            web.post(UNLOAD, everywhere.unload),
            web.post("/adapters/{name:.+}/{what:pin|unpin}", everywhere.pin),
            web.post("/abort_request", everywhere.abort),
            web.get("/health", _health),
            web.get("/metrics", partial(_scrape, metrics)),
            web.route("*", "/{path:.*}", _not_here),
        ]
    )
    return app


async def _health(request: web.Request) -> web.Response:
    """200 while any replica is up."""
    return web.Response() if request.app[FLEET].up else unavailable("No replica answers now.")


async def _scrape(metrics: Metrics, _: web.Request) -> web.Response:
    page, content_type = metrics.page()
    return web.Response(body=page, headers={"Content-Type": content_type})


async def _not_here(request: web.Request) -> web.Response:
    message = f"{request.method} {request.path} is not passed on: it concerns one server. Ask the replicas themselves."
    return web.json_response(openai_error(message, 404), status=404)
