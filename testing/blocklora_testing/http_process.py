"""SGLang's HTTP process, real but for its scheduler: routes, request handling and tokenizer in the test's own process.

A scheduler that answers every request with the token it was asked last stands in for the real one, so that a test of
what the HTTP process lets through takes milliseconds and sees what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pkgutil
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import httpx


@contextlib.contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Put ``hooks`` in place, and take them out again afterwards."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    targets = sorted({hook.target for hook in hooks})
    originals = {target: pkgutil.resolve_name(target) for target in targets}
    for hook in hooks:
        HookRegistry.register(hook.target, hook.handler, hook.kind)
    HookRegistry.apply_hooks()
    missing = set(targets) - HookRegistry._patched
    if missing:
        raise RuntimeError(f"hooks that did not take: {sorted(missing)}")
    try:
        yield
    finally:
        for target, original in originals.items():
            owner, _, name = target.rpartition(".")
            setattr(pkgutil.resolve_name(owner), name, original)
            HookRegistry._patched.discard(target)
            HookRegistry._hooks.pop(target, None)


class Scheduler:
    """Answers at once; while ``holds``, a request that wants tokens is answered only when it is aborted.

    ``received`` is all that was sent to it.
    """

    def __init__(self, manager: Any) -> None:
        self.received: list[Any] = []
        self.holds = False
        self.facts: list[dict[str, Any]] = [{}]
        self._manager = manager
        self._answers: set[asyncio.Task[None]] = set()

    def dispatch(self, message: Any) -> None:
        from sglang.srt.managers import io_struct

        self.received.append(message)
        if isinstance(message, io_struct.AbortReq):
            for request in self.requests():
                if message.abort_all or request.rid == message.rid:
                    self._later(self._manager._result_dispatcher, io_struct.AbortReq(rid=request.rid))
        elif isinstance(message, io_struct.GetInternalStateReq):
            for facts in self.facts:
                answer = io_struct.GetInternalStateReqOutput(internal_state=facts)
                self._later(self._manager._result_dispatcher, answer)
        else:
            for request in _requests_of(message):
                if not self.holds or request.sampling_params.max_new_tokens == 0:
                    self._later(self._answer, request)

    def requests(self) -> list[Any]:
        """Every prompt that was sent, in order."""
        return [request for message in self.received for request in _requests_of(message)]

    @staticmethod
    def _later(function: Any, *args: Any) -> None:
        asyncio.get_running_loop().call_soon(function, *args)

    def _answer(self, request: Any) -> None:
        answer = asyncio.ensure_future(self._manager._handle_batch_output(_output(request)))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)


def _requests_of(message: Any) -> list[Any]:
    if hasattr(message, "batch"):
        return list(message.batch)
    return [message] if hasattr(message, "input_ids") else []


def _output(request: Any) -> Any:
    """One token, the last one, for ``request``."""
    from sglang.srt.managers.io_struct import BatchStrOutput

    given = {
        "rids": [request.rid],
        "finished_reasons": [{"type": "length", "length": 1}],
        "output_strs": ["x"],
        "output_ids": [array("q", [7])],
        "prompt_tokens": [len(request.input_ids or ())],
        "completion_tokens": [1],
        "reasoning_tokens": [0],
        "cached_tokens": [0],
        "retraction_counts": [0],
    }
    fields = BatchStrOutput.__struct_fields__
    return BatchStrOutput(**{name: given.get(name) for name in fields if name != "time_stats"})


class HTTPProcess:
    """The application and its tokenizer manager, of a class of ours or SGLang's, on an event loop of their own."""

    def __init__(self, model: Path, *flags: str, manager_class: type | None = None) -> None:
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._runner.run(self._start(model, flags, manager_class))

    async def _start(self, model: Path, flags: Sequence[str], manager_class: type | None) -> None:
        from sglang.srt.entrypoints import http_server
        from sglang.srt.entrypoints.engine import init_tokenizer_manager
        from sglang.srt.runtime_context import publish, snapshot_context
        from sglang.srt.server_args import PortArgs, prepare_server_args

        argv = ["--model-path", str(model), "--device", "cpu", "--dtype", "float32", *flags]
        arguments = prepare_server_args(argv)
        self._context = snapshot_context()
        publish(arguments, role="tokenizer")
        self.manager, templates = init_tokenizer_manager(arguments, PortArgs.init_new(arguments), manager_class)
        self.manager.event_loop = self._loop  # nothing comes from a detokenizer, and signals are the test's
        self.scheduler = Scheduler(self.manager)
        self.manager._dispatch_to_scheduler = self.scheduler.dispatch
        self.manager.max_req_input_len = self.manager.context_len
        http_server.set_global_state(http_server._GlobalState(self.manager, templates, {}))
        # Since 0.5.22 /generate checks bodies, in words that name no field. Our own checks, which hold on every way in,
        # are what is tested here.
        self._contract = mock.patch.object(http_server, "generate_contract_error", create=True, return_value=None)
        self._contract.start()
        self.app = http_server.app
        self.app.is_single_tokenizer_mode = True
        self.app.server_args = arguments
        self.app.warmup_thread_kwargs = {"server_args": arguments, "launch_callback": lambda: None}
        self._lifespan = self.app.router.lifespan_context(self.app)
        with mock.patch.object(http_server, "_wait_and_warmup"):
            await self._lifespan.__aenter__()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def run(self, awaitable: Any) -> Any:
        """The result of ``awaitable`` on the process's event loop."""
        return self._runner.run(awaitable)

    def call(self, path: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> tuple[int, Any]:
        """POST ``body`` as JSON (GET without one); status and decoded answer."""
        method = method or ("GET" if body is None else "POST")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SGLang's own
            answer = self.run(self.client.request(method, path, json=body))
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status_code, answer.json() if is_json else answer.text

    def refused(self, path: str, body: Mapping[str, Any]) -> str:
        """The message of a refusal with 400, for a stream of ``/generate`` its only event; nothing was sent."""
        status, answer = self.call(path, body)
        if body.get("stream"):
            assert answer.count("data:") == 2, answer
            answer = json.loads(answer.splitlines()[0].removeprefix("data: "))
            status = answer["error"]["code"]
        assert status == 400, answer
        assert self.scheduler.requests() == []
        message: str = answer.get("message") or answer["error"]["message"]
        return message

    def close(self) -> None:
        """Give back what the process took, and the configuration that SGLang keeps for the whole process."""
        from sglang.srt.runtime_context import restore_context

        async def stop() -> None:
            await self.client.aclose()
            await self._lifespan.__aexit__(None, None, None)
            self.manager.recv_from_detokenizer.context.destroy(linger=0)  # and with it all its sockets

        self._runner.run(stop())
        self._contract.stop()
        self._runner.close()
        restore_context(self._context)
