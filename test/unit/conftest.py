"""The frontend language, and a backend that keeps what it is asked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from blocklora_testing.endpoint import Endpoint


@pytest.fixture(scope="module")
def sgl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from sglang_blocklora import frontend
    return frontend


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def backend(sgl: Any, endpoint: Endpoint) -> Any:
    return sgl.RuntimeEndpoint(endpoint.url)
