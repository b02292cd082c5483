"""Puts endpoints of ours in the place of SGLang's (``entrypoints/http_server.py``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI


def replace(app: FastAPI, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Let ``ours`` answer every route of ``app`` that ``theirs`` answers. ``LookupError`` where there is none.

    The route keeps its path, its methods and what is asked before the endpoint. What wraps ``theirs`` replaces it too.
    """
    routes = app.router.routes
    places = [i for i, route in enumerate(routes) if _is_answered_by(route, theirs)]
    if not places:
        raise LookupError(f"SGLang's application has no route that {theirs.__qualname__} answers.")
    for i in places:
        old: Any = routes[i]
        app.add_api_route(
            old.path,
            ours,
            methods=old.methods,
            dependencies=old.dependencies,
            response_class=old.response_class,
            include_in_schema=old.include_in_schema,
        )
        routes[i] = routes.pop()


def _is_answered_by(route: Any, endpoint: Callable[..., Any]) -> bool:
    found = getattr(route, "endpoint", None)
    return found is not None and inspect.unwrap(found) is inspect.unwrap(endpoint)
