"""Adds the routes about adapters, and their series on ``/metrics`` (``entrypoints/http_server.py``)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai.protocol import ModelCard
from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, SetInternalStateReq, UnloadLoRAAdapterReqInput
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang_blocklora.reporting.facts import (
    MAX_PAGE,
    AdapterFacts,
    Facts,
    merge_facts,
    openai_error,
    page,
    slots_told,
)

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http import server_info
from blocklora_patches.http.adapters import adapter_errors
from blocklora_patches.http.facts import facts_of
from blocklora_patches.http.load_on_use import adapter_folders, loaded_adapters
from blocklora_patches.scheduler.control import PIN

# A scrape waits this long for the scheduler, which may be in the middle of a long prefill, and then shows older facts.
SCRAPE_SECONDS = 5.0


class LoadRequest(BaseModel):
    """vLLM's body of ``/v1/load_lora_adapter``; ``pinned`` is SGLang's."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pinned: bool = False


class UnloadRequest(BaseModel):
    """vLLM's body of ``/v1/unload_lora_adapter``; ``lora_int_id`` is taken and not needed, as there."""

    lora_name: str
    lora_int_id: int | None = None


def _error(message: str, status: int, param: str | None = None) -> Response:
    return JSONResponse(openai_error(message, status, param), status_code=status)


class AdapterRoutes:
    """The endpoints, over SGLang's tokenizer manager."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager

    async def _adapters(self, facts: Facts) -> list[AdapterFacts]:
        loaded = loaded_adapters(self._manager)
        known = [(name, ref.lora_path, ref.lora_id, bool(ref.pinned)) for name, ref in loaded.items()]
        folders = await asyncio.to_thread(adapter_folders().all)
        known += [(name, str(path), None, False) for name, path in folders.items() if name not in loaded]
        return merge_facts(facts, known, adapter_errors(self._manager))

    async def list_adapters(self, limit: int = Query(100, ge=1, le=MAX_PAGE), after: str | None = None) -> Response:
        """Adapters by name, and who has the slots; ``after`` is the ``last_id`` of the page before."""
        facts = await facts_of(self._manager).now()
        return JSONResponse(page(await self._adapters(facts), limit, after) | {"slots": slots_told(facts.slots)})

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def pin(self, name: str) -> Response:
        """Keep an adapter in the arena once it is there."""
        return await self._set_pinned(name, True)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def unpin(self, name: str) -> Response:
        """Let an adapter be evicted again."""
        return await self._set_pinned(name, False)

    async def _set_pinned(self, name: str, pinned: bool) -> Response:
        manager = self._manager
        async with manager.lora_update_lock:
            loaded = manager.lora_registry.get_all_adapters()
            if name not in loaded:
                return _error(f"The adapter '{name}' is not loaded. Loaded: {', '.join(sorted(loaded))}.", 404, "name")
            pin = {f"{PIN}{loaded[name].lora_id}": int(pinned)}
            if not all(await manager.set_internal_state(SetInternalStateReq(server_args=pin))):
                # Then on no replica.
                await manager.set_internal_state(SetInternalStateReq(server_args=dict.fromkeys(pin, 0)))
                message = (
                    f"The adapter '{name}' cannot be pinned: pinned adapters may take at most half of the slots "
                    "(see GET /adapters). Unpin another, or start the server with more memory for adapters."
                )
                adapter_errors(manager)[name] = message
                return _error(message, 400, "name")
            ref = msgspec.structs.replace(loaded[name], pinned=pinned)
            manager.lora_registry._registry[name] = ref
            manager.lora_ref_cache[name] = ref
        return JSONResponse({"name": name, "pinned": pinned})

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def load(self, body: LoadRequest) -> Response:
        if body.load_inplace:
            return _error(
                "load_inplace is not served: a load that fails would leave no adapter. Unload it first.",
                400,
                "load_inplace",
            )
        if not body.lora_name or not body.lora_path:
            return _error("Both 'lora_name' and 'lora_path' must be provided.", 400)
        if body.lora_name in self._manager.lora_registry.get_all_adapters():
            return _error(f"The lora adapter '{body.lora_name}' has already been loaded.", 400, "lora_name")
        request = LoadLoRAAdapterReqInput(lora_name=body.lora_name, lora_path=body.lora_path, pinned=body.pinned)
        result = await self._manager.load_lora_adapter(request)
        if not result.success:
            return _error(result.error_message, 400)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def unload(self, body: UnloadRequest) -> Response:
        if body.lora_name not in loaded_adapters(self._manager):
            return _error(f"The lora adapter '{body.lora_name}' cannot be found.", 404, "lora_name")
        result = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=body.lora_name))
        if not result.success:
            return _error(result.error_message, 400)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def list_models(self) -> Any:
        """Upstream's list, and the adapters that would be loaded for a request."""
        models = await http_server.available_models()
        listed = {card.id for card in models.data}
        parent = self._manager.served_model_name
        others = {name: ref.lora_path for name, ref in self._manager.lora_ref_cache.items()}
        others = await asyncio.to_thread(adapter_folders().all) | others
        models.data += [
            ModelCard(id=name, root=str(path), parent=parent) for name, path in others.items() if name not in listed
        ]
        return models

    async def show_model(self, model: str) -> Any:
        """One card of ``list_models``; upstream shows the base model's only."""
        cards = {card.id: card for card in (await self.list_models()).data}
        return cards.get(model) or await http_server.retrieve_model(model)

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/v1/models", self.list_models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.show_model, methods=["GET"])
        for _ in range(2):  # before upstream's of the same paths
            app.router.routes.insert(0, app.router.routes.pop())
        app.add_api_route("/adapters", self.list_adapters, methods=["GET"])
        app.add_api_route("/adapters/{name:path}/pin", self.pin, methods=["POST"])
        app.add_api_route("/adapters/{name:path}/unpin", self.unpin, methods=["POST"])
        app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"])
        app.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"])


def _setup_and_run_http_server(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    AdapterRoutes(tokenizer_manager).add_to(http_server.app)
    server_info.add_to(http_server.app)


def _add_prometheus_middleware(_: Any, app: FastAPI) -> None:
    """The same page of metrics, with the series made from the scheduler's facts on it."""
    from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess
    from sglang_blocklora.reporting.prometheus import AdapterCollector

    from blocklora_patches.http.metrics import label_budget

    collector = AdapterCollector(label_budget())
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    registry.register(collector)
    metrics = make_asgi_app(registry=registry)

    async def scrape(scope: Any, receive: Any, send: Any) -> None:
        facts = facts_of(http_server.get_global_state().tokenizer_manager)
        collector.show(await facts.within(SCRAPE_SECONDS), facts.age_seconds)
        await metrics(scope, receive, send)

    (mount,) = (route for route in app.routes if getattr(route, "path", None) == "/metrics")
    mount.app = scrape


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        _setup_and_run_http_server,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Routes that upstream lacks.",
        retire_when="plugins can add routes",
    ),
    Hook(
        "sglang.srt.utils.common.add_prometheus_middleware",
        _add_prometheus_middleware,
        HookType.AFTER,
        process=Process.HTTP,
        why="Facts are fetched when they are scraped.",
        retire_when="upstream lets a plugin register a collector",
    ),
)
