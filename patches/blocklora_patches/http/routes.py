"""Adds our routes to SGLang's application, and adapters' series to ``/metrics`` (``entrypoints/http_server.py``)."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai.protocol import ModelCard
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_observability, get_parallel
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang_blocklora import reporting
from sglang_blocklora.naming.model_names import known_adapters
from sglang_blocklora.reporting.errors import openai_error
from sglang_blocklora.reporting.facts import (
    MAX_PAGE,
    AdapterFacts,
    Facts,
    merge_facts,
    only_of,
    page,
    queue_told,
    slots_told,
    told,
)
from sglang_blocklora.requests.activation import text_of
from starlette.requests import ClientDisconnect
from starlette.routing import Mount

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http import answers, model_names, permission, server_info, tenants, tensors, versions
from blocklora_patches.http.adapters import NotLoaded, PinRefused, adapters_of
from blocklora_patches.http.endpoints import replace
from blocklora_patches.http.facts import facts_of
from blocklora_patches.http.load_on_use import adapters_in_folders, loaded_adapters
from blocklora_patches.http.ollama import OllamaRoutes

logger = logging.getLogger(__name__)

# A scrape waits this long for the scheduler, which may be in the middle of a long prefill, and then shows older facts.
SCRAPE_SECONDS = 5.0
PAGE = Path(reporting.__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


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
        folders = await adapters_in_folders(self._manager)
        loaded = loaded_adapters(self._manager)  # asked last: adapters come and go while folders are looked into
        known = [(name, ref.lora_path, ref.lora_id, bool(ref.pinned)) for name, ref in loaded.items()]
        known += [(name, str(path), None, False) for name, path in folders.items() if name not in loaded]
        adapters = adapters_of(self._manager)
        merged = merge_facts(facts, known, adapters.errors, adapters.draining)
        tokenizer = self._manager.tokenizer
        return [msgspec.structs.replace(one, invocation_text=text_of(one.invocation, tokenizer)) for one in merged]

    async def list_adapters(self, limit: int = Query(100, ge=1, le=MAX_PAGE), after: str | None = None) -> Response:
        """Adapters by name, and who has the slots; ``after`` is the ``last_id`` of the page before."""
        facts = await facts_of(self._manager).now()
        listed = page(await self._adapters(facts), limit, after)
        facts = only_of(facts, tenants.may_use)
        return JSONResponse(listed | {"slots": slots_told(facts.slots), "queue": queue_told(facts)})

    async def show_page(self) -> Response:
        """The list as a page for people, which asks this server only and runs no other script."""
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": _PAGE_POLICY})

    async def show_adapter(self, name: str) -> Response:
        """One of ``list_adapters``."""
        adapters = {one.name: one for one in await self._adapters(await facts_of(self._manager).now())}
        if name not in adapters:
            return _error(f"The adapter '{name}' is not loaded. {known_adapters(adapters, ())}", 404, "name")
        return JSONResponse(told(adapters[name]))

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def pin(self, name: str, client: Request) -> Response:
        """Keep an adapter in the arena once it is there."""
        return await self._set_pinned(name, True, client)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def unpin(self, name: str, client: Request) -> Response:
        """Let an adapter be evicted again."""
        return await self._set_pinned(name, False, client)

    async def _set_pinned(self, name: str, pinned: bool, client: Request) -> Response:
        adapters = adapters_of(self._manager)
        try:
            permission.check(client)
            await adapters.set_pinned(name, pinned)
        except permission.NotAllowed as error:
            return _error(error.detail, 403)
        except NotLoaded:
            known = known_adapters(adapters.loaded, ())
            return _error(f"The adapter '{name}' is not loaded. {known}", 404, "name")
        except PinRefused:
            message = (
                f"The adapter '{name}' cannot be pinned: pinned adapters may take at most half of the slots "
                "(see GET /adapters). Unpin another, or start the server with more memory for adapters."
            )
            return _error(message, 400, "name")
        return JSONResponse({"name": name, "pinned": pinned})

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def load(self, body: LoadRequest, client: Request) -> Response:
        self._manager.auto_create_handle_loop()
        try:
            path = await permission.allowed_path(client, body.lora_path)
        except permission.NotAllowed as error:
            return _error(error.detail, 403)
        adapters = adapters_of(self._manager)
        result = await adapters.load(body.lora_name, path, body.pinned, update=body.load_inplace)
        if not result.success:
            return _error(result.error_message, 400)
        versions.note(client, adapters.version_of_name(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def put(self, name: str, client: Request, pinned: bool = False) -> Response:
        """Load or update an adapter from a body of safetensors bytes, whose metadata hold its config."""
        self._manager.auto_create_handle_loop()
        adapters = adapters_of(self._manager)
        try:
            permission.check_bringing(client)
            result = await tensors.receive(adapters, name, client.stream(), None, pinned, True)
        except permission.NotAllowed as error:
            return _error(error.detail, 403)
        except ClientDisconnect:
            return _error(f"adapter {name!r}: its client went away half-way.", 400)
        if not result.success:
            return _error(result.error_message, 400)
        version = adapters.version_of_name(name)
        versions.note(client, version)
        return JSONResponse({"name": name, versions.FIELD: version})

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def load_from_tensors(self, client: Request) -> Any:
        """SGLang's endpoint, with safetensors bytes in the place of its pickle."""
        self._manager.auto_create_handle_loop()
        permission.check_bringing(client)
        try:
            body = await asyncio.to_thread(tensors.decode, await tensors.read_body(client))
            weights = await asyncio.to_thread(tensors.from_upstream, body, trusted=False)
        except tensors.NotTaken as error:
            result = LoRAUpdateOutput(success=False, error_message=str(error))
        else:
            adapters = adapters_of(self._manager)
            result = await tensors.load(adapters, weights)
            versions.note(client, adapters.version_of_name(weights.name))
        return JSONResponse(http_server.msgspec_to_builtins(result), status_code=200 if result.success else 400)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def unload(self, body: UnloadRequest, client: Request) -> Response:
        self._manager.auto_create_handle_loop()
        try:
            permission.check(client)
            result = await adapters_of(self._manager).unload(body.lora_name)
        except permission.NotAllowed as error:
            return _error(error.detail, 403)
        except NotLoaded:  # nor is it on its way: an unload waits for its turn
            return _error(f"The lora adapter '{body.lora_name}' cannot be found.", 404, "lora_name")
        if not result.success:
            return _error(result.error_message, 400)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def reload_tenants(self) -> Response:
        """Read the file of --tenants again; a bad one changes nothing."""
        tenancy = tenants.serving()
        if tenancy is None:
            return _error("The server was started without --tenants.", 404)
        try:
            tenancy.take(await asyncio.to_thread(tenants.read_for_server, tenancy.path))
        except ValueError as error:
            return _error(f"{tenancy.path} {error}. The tenants stay as they were.", 400)
        return JSONResponse({"tenants": [tenant.name for tenant in tenancy.quotas.tenants.tenants]})

    async def list_models(self) -> Any:
        """Upstream's list, and the adapters that would be loaded for a request."""
        models = await http_server.available_models()
        parent = self._manager.served_model_name
        models.data = [card for card in models.data if card.id == parent or tenants.may_use(card.id)]
        listed = {card.id for card in models.data}
        others = {name: ref.lora_path for name, ref in loaded_adapters(self._manager).items()}
        others = await adapters_in_folders(self._manager) | others
        models.data += [
            ModelCard(id=name, root=str(path), parent=parent) for name, path in others.items() if name not in listed
        ]
        return models

    async def show_model(self, model: str) -> Any:
        """One card of ``list_models``; upstream shows the base model's only."""
        cards = {card.id: card for card in (await self.list_models()).data}
        return cards.get(model) or await http_server.retrieve_model(model)

    def add_to(self, app: FastAPI) -> None:
        replace(app, http_server.available_models, self.list_models)
        replace(app, http_server.retrieve_model, self.show_model)
        replace(app, http_server.load_lora_adapter_from_tensors, self.load_from_tensors)
        app.add_api_route("/adapters", self.list_adapters, methods=["GET"])
        app.add_api_route("/adapters/ui", self.show_page, methods=["GET"])
        app.add_api_route("/adapters/{name:path}", self.show_adapter, methods=["GET"])
        app.add_api_route("/adapters/{name:path}/pin", self.pin, methods=["POST"])
        app.add_api_route("/adapters/{name:path}/unpin", self.unpin, methods=["POST"])
        app.add_api_route("/adapters/{name:path}", self.put, methods=["PUT"])
        app.add_api_route("/tenants/reload", self.reload_tenants, methods=["POST"])
        app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"])
        app.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"])


def add_to(app: FastAPI, tokenizer_manager: Any) -> None:
    """Give SGLang's application all endpoints of ours."""
    model_names.add_to(app, tokenizer_manager)
    OllamaRoutes(tokenizer_manager).add_to(app)
    AdapterRoutes(tokenizer_manager).add_to(app)
    server_info.add_to(app)
    answers.add_to(app)


def _setup_and_run_http_server(
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    tenants.serve(scheduler_infos[0]["max_total_num_tokens"] * get_parallel().dp_size)
    add_to(http_server.app, tokenizer_manager)
    if get_observability().enable_metrics:
        add_metrics_to(http_server.app, tokenizer_manager)
    closed = permission.reason_not_to_manage()
    if closed is not None:
        logger.warning("%s", closed)


def add_metrics_to(app: FastAPI, tokenizer_manager: Any) -> None:
    """SGLang's page of metrics, with series on it of the facts that the scheduler tells at a scrape."""
    from prometheus_client import CollectorRegistry, multiprocess
    from prometheus_client.exposition import choose_encoder
    from sglang_blocklora.reporting import exposition
    from sglang_blocklora.reporting.prometheus import AdapterCollector

    from blocklora_patches.http.metrics import label_budget

    collector = AdapterCollector(label_budget(), tokenizer_manager.served_model_name)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)

    # Prometheus asks for OpenMetrics first, whose writer turns the colons of names into underscores.
    encode, content_type = choose_encoder("")

    async def scrape(scope: Any, receive: Any, send: Any) -> None:
        facts = facts_of(tokenizer_manager)
        collector.show(await facts.within(SCRAPE_SECONDS), facts.age_seconds)
        # Many names take a while: requests go on meanwhile.
        page = await asyncio.to_thread(lambda: encode(registry) + exposition.text(collector.collect()))
        await Response(page, headers={"Content-Type": content_type})(scope, receive, send)

    mount = Mount("/metrics", scrape)
    mount.path_regex = re.compile("^/metrics(?P<path>.*)$")  # as upstream's, which comes later and is not reached
    app.router.routes.append(mount)


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        _setup_and_run_http_server,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Routes that upstream lacks, or whose endpoints know no adapters.",
        retire_when="plugins can add routes",
    ),
)
