"""Puts into HTTP answers what was noted while they were made: headers, or a refusal in their place.

Routes make of an exception what their API does of it: status and headers get lost, and a stream has begun when its
request is refused. What is noted on a request reaches its client on every route.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse


class Refusal(HTTPException):
    """Answered with its status and headers, in one form on every route."""

    def body(self) -> dict[str, Any]:
        """What the answer holds."""
        return {"object": "error", "message": self.detail, "type": str(self.status_code), "code": self.status_code}


R = TypeVar("R", bound=Refusal)


def refused(request: Any, refusal: R) -> R:
    """``refusal``, to be raised and to be what ``request`` is answered with; None: a call within the process."""
    if request is not None:
        request.state.blocklora_refusal = refusal
    return refusal


def add_header(request: Any, name: str, value: str) -> None:
    """Have the answer to ``request`` carry a header."""
    request.state.blocklora_headers = {**getattr(request.state, "blocklora_headers", {}), name: value}


class NotedAnswers:
    """An ASGI application that answers as another, with what was noted.

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
        has_begun = False

        def refusal() -> Refusal | None:
            return None if has_begun else state.get("blocklora_refusal")

        async def send_later(message: Any) -> None:
            nonlocal has_begun
            if refusal() is not None:
                return
            if message["type"] == "http.response.start":
                start.append(message)
                return
            if start:
                first, has_begun = start.pop(), True
                noted = state.get("blocklora_headers", {}).items()
                headers = [(name.lower().encode(), value.encode()) for name, value in noted]
                await send(first | {"headers": [*first.get("headers", ()), *headers]})
            await send(message)

        try:
            await self._app(scope, receive, send_later)
        except (HTTPException, RuntimeError):  # of a stream that had begun for all but its client
            if refusal() is None:
                raise
        if (refused := refusal()) is not None:
            await JSONResponse(refused.body(), refused.status_code, refused.headers)(scope, receive, send)


def add_to(app: FastAPI) -> None:
    """Have the answers of ``app`` carry what is noted."""
    if not isinstance(app.router.middleware_stack, NotedAnswers):
        app.router.middleware_stack = NotedAnswers(app.router.middleware_stack)
