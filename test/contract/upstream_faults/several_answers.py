"""RuntimeEndpoint cannot read the server's answer to n > 1, a list."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock


def fault() -> str | None:
    from sglang.lang.backend import runtime_endpoint
    from sglang.lang.ir import SglSamplingParams

    answers = [{"text": text, "meta_info": {}} for text in ("one", "two")]
    answer = SimpleNamespace(status_code=200, json=lambda: answers)
    endpoint = object.__new__(runtime_endpoint.RuntimeEndpoint)
    vars(endpoint).update(base_url="", api_key=None, verify=None)
    program = SimpleNamespace(text_="x", images_=[])
    with mock.patch.object(runtime_endpoint, "http_request", return_value=answer):
        try:
            endpoint.generate(program, SglSamplingParams(n=2))
        except TypeError as error:
            return f"TypeError: {error}"
    return None


if __name__ == "__main__":
    print(fault() or "mended")
