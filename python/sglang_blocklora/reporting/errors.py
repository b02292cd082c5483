"""Errors as clients of OpenAI's API read them."""

from __future__ import annotations

from typing import Any

KINDS = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    502: "server_error",
    503: "server_error",
}


def openai_error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error body in OpenAI's form."""
    return {"error": {"message": message, "type": KINDS[status], "param": param, "code": status}}
