"""An in-process ``Engine`` as a backend of the frontend language; upstream's language reaches servers only.

``RuntimeEndpoint`` does all its work by ``http_request``. An ``EngineEndpoint`` is one whose address is an engine of
this process, and the hook of ``lang_utils`` takes requests for such addresses to the engine.
"""

from __future__ import annotations

import asyncio
import json as json_module
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from blocklora_patches.http.load_on_use import adapter_folders, loaded_adapters

_SCHEME = "engine:"
_endpoints: WeakValueDictionary[str, EngineEndpoint] = WeakValueDictionary()


class Answer:
    """As much of an HTTP response as ``RuntimeEndpoint`` reads."""

    def __init__(self, status_code: int, content: Any) -> None:
        self.status_code = status_code
        self._content = content

    def json(self) -> Any:
        return self._content

    def iter_lines(self, decode_unicode: bool = False) -> Iterator[bytes]:
        for chunk in self._content:
            yield b"data: " + json_module.dumps(chunk).encode()


class EngineEndpoint(RuntimeEndpoint):
    """A backend over ``engine``. A context manager: while it is open it drives the engine's event loop, in a thread.

    The engine's own blocking calls (``engine.generate``) work before and after, not in between.
    """

    def __init__(self, engine: Any, chat_template_name: str | None = None) -> None:
        self.engine = engine
        self._thread = threading.Thread(target=engine.loop.run_forever, daemon=True)
        self._thread.start()
        address = f"{_SCHEME}{id(self)}"
        _endpoints[address] = self
        super().__init__(address, chat_template_name=chat_template_name)

    def close(self) -> None:
        """Give the event loop back to the engine, which stays open."""
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)
        self._thread.join()

    def __enter__(self) -> EngineEndpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def answer(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        """What a server would answer."""
        manager = self.engine.tokenizer_manager
        if path == "/get_model_info":
            return Answer(200, {"model_path": self.engine.server_args.model_path})
        if path == "/v1/models":
            names = {*loaded_adapters(manager), *adapter_folders().all()}
            return Answer(200, {"data": [{"id": name, "parent": manager.served_model_name} for name in names]})
        if path == "/flush_cache":
            self._wait(manager.flush_cache)
            return Answer(200, None)
        if path == "/generate" and body is not None:
            return self._generate(body)
        raise NotImplementedError(f"an engine of this process has no {path}; start a server for it")

    def _generate(self, body: Mapping[str, Any]) -> Answer:
        from sglang.srt.managers.io_struct import GenerateReqInput

        chunks = self.engine.tokenizer_manager.generate_request(GenerateReqInput(**body), None)
        if body.get("stream"):
            return Answer(200, self._iterate(chunks))
        try:
            return Answer(200, self._wait(chunks.__anext__))
        except ValueError as error:  # what a server answers with status 400
            return Answer(400, {"error": {"message": str(error)}})

    def _iterate(self, chunks: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                yield self._wait(chunks.__anext__)
            except StopAsyncIteration:
                return

    def _wait(self, call: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await call()

        return asyncio.run_coroutine_threadsafe(run(), self.engine.loop).result()


def engine_answer(url: str, body: Mapping[str, Any] | None) -> Answer | None:
    """The answer of the engine that ``url`` is, or None for the address of a server."""
    if not url.startswith(_SCHEME):
        return None
    address, _, path = url.partition("/")
    return _endpoints[address].answer(f"/{path}", body)
