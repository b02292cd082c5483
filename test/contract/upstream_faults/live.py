"""How the scripts beside it reach a running server of stock SGLang, when a person runs them."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

# call(path, body): GET path, or POST body as JSON; status and answer, status 0 where none came in time.
Call = Callable[..., tuple[int, Any]]


def main(fault: Callable[[Call, str], str | None]) -> None:
    """Say what ``fault`` finds on the server at the first argument; the second is a folder with a LoRA adapter."""
    url, adapter = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""

    def call(path: str, body: Any = None, seconds: float = 20) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    print(fault(call, adapter) or "mended")
