"""Tells with every answer which contents of an adapter gave it, and refuses requests that demand others.

An adapter's version is the beginning of its content hash. Which one answers is decided where a request gets its
adapter's id, and stays.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.adapters.content_hash import version

from blocklora_patches.hooks.hook import Hook, Process

# Of requests: the version that must answer. Of answers: those that did, in the order of the prompts.
HEADER = "X-Adapter-Version"
FIELD = "adapter_version"


class VersionConflict(HTTPException):
    """Answered with a 409 and the version that is current."""

    def __init__(self, demanded: str, current: str | None) -> None:
        told = "the base model, which has none" if current is None else f"version {current}"
        super().__init__(409, f"The request demands adapter version {demanded}; it would be answered by {told}.")
        self.headers = {HEADER: current} if current is not None else None


def decided(request: Any, hashes: Sequence[str | None]) -> None:
    """It is decided who answers an HTTP request. Raises ``VersionConflict`` where it demands others.

    hashes  content hashes of the adapters, None for the base model; a request demands a version or a full hash
    """
    demanded = request.headers.get(HEADER)
    for content_hash in hashes if demanded is not None else ():
        if content_hash is None or demanded.lower() not in (content_hash, version(content_hash)):
            conflict = VersionConflict(demanded, content_hash and version(content_hash))
            request.state.blocklora_conflict = conflict
            raise conflict
    request.state.blocklora_versions = list(dict.fromkeys(version(one) for one in hashes if one is not None))


def note(request: Any, loaded: str | None) -> None:
    """Have the answer to a load carry the version that was loaded."""
    request.state.blocklora_versions = [] if loaded is None else [loaded]


async def told(answers: AsyncIterator[Any], content_hash: str) -> AsyncIterator[Any]:
    """``answers`` of one prompt, each with the version that gave it."""
    async with aclosing(answers):  # type: ignore[type-var]
        async for answer in answers:
            answer["meta_info"][FIELD] = version(content_hash)
            yield answer


class VersionHeader:
    """An ASGI application that adds the header to the answers of another.

    The start of an answer is kept until its first piece is there: by then a stream's request has its adapter, or has
    been refused.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        start: list[Any] = []

        async def send_later(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.append(message)
                return
            if start:
                first = start.pop()
                versions = ", ".join(state.get("blocklora_versions", ()))
                header = [(HEADER.lower().encode(), versions.encode())] if versions else []
                await send(first | {"headers": [*first.get("headers", ()), *header]})
            await send(message)

        try:
            await self._app(scope, receive, send_later)
        except (HTTPException, RuntimeError):  # of a stream that had begun for all but its client
            conflict = state.get("blocklora_conflict")
            if conflict is None or not start:
                raise
            body = {"object": "error", "message": conflict.detail, "type": "409", "code": 409}
            await JSONResponse(body, 409, conflict.headers)(scope, receive, send)


def add_to(app: FastAPI) -> None:
    """Have the answers of ``app`` carry the header."""
    if not isinstance(app.router.middleware_stack, VersionHeader):
        app.router.middleware_stack = VersionHeader(app.router.middleware_stack)


async def _handle_request(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    answer = await original(self, request, raw_request)
    versions = getattr(raw_request.state, "blocklora_versions", None)
    if versions and "metadata" in getattr(type(answer), "model_fields", ()):
        answer.metadata = {**(answer.metadata or {}), FIELD: ", ".join(versions)}
    return answer


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        _handle_request,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream's answers tell the base model's version only.",
        retire_when="upstream puts more of meta_info into OpenAI's answers",
    ),
)
