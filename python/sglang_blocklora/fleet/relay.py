"""Passes a request on to the replica where its adapter is, and the answer back."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from sglang_blocklora.fleet.asked import adapter_of
from sglang_blocklora.fleet.calls import Answer, Calls, Gone, passed_on, read
from sglang_blocklora.fleet.metrics import Metrics
from sglang_blocklora.fleet.replicas import NoReplica, Replica
from sglang_blocklora.reporting.errors import openai_error

logger = logging.getLogger(__name__)

# A replica that ends or has not begun says these: another one may answer.
ELSEWHERE = (502, 503)
# Type of a streamed answer -> what ends each of its parts.
STREAMS = {"text/event-stream": b"\n\n", "application/x-ndjson": b"\n"}
_LOST = "The replica that answered went away; what came before is its answer so far. Ask again."


@dataclass(frozen=True)
class Relay:
    """Answers requests that one replica answers."""

    calls: Calls
    metrics: Metrics

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The answer of the first replica, in the adapter's order, that gives one.

        While no byte of an answer has reached the client another replica is asked, each of them once. An answer that
        breaks off later ends with an error in its stream.
        """
        body = await request.read()
        fleet = self.calls.fleet
        adapter = adapter_of(request.path, body, fleet.base)
        tried: list[Replica] = []
        last: Answer | None = None
        while True:
            try:
                replica = fleet.choose(adapter, tried)
            except NoReplica as error:
                return last.response() if last is not None else unavailable(str(error))
            tried.append(replica)
            with fleet.counted(replica):
                try:
                    answer = await self._ask(request, body, replica)
                except Gone as error:
                    logger.info("Replica %s gave no answer: %s", replica.url, error)
                    self.metrics.count(replica, "gone")
                    continue
            if isinstance(answer, web.StreamResponse):
                return answer
            if answer.status not in ELSEWHERE:
                self.metrics.count(replica, "answered")
                return answer.response()
            self.metrics.count(replica, "unavailable")
            last = answer

    async def _ask(self, request: web.Request, body: bytes, replica: Replica) -> Answer | web.StreamResponse:
        """A replica's whole answer, or the client's stream once all of it was passed on."""
        headers = passed_on(request.headers)
        async with await self.calls.open(replica, request.method, request.raw_path, headers, body) as answer:
            end_of_part = STREAMS.get(answer.content_type)
            if end_of_part is None:
                return await read(answer)
            part = await _next(answer)
            response = web.StreamResponse(status=answer.status, headers=passed_on(answer.headers))
            await response.prepare(request)
            rest = b""
            try:
                while part:
                    whole, rest = _whole_parts(rest + part, end_of_part)
                    await response.write(whole)
                    part = await _next(answer)
                await response.write(rest)
                self.metrics.count(replica, "answered")
            except Gone as error:
                logger.warning("Replica %s broke off a stream: %s", replica.url, error)
                self.metrics.count(replica, "broken")
                await response.write(_broken(end_of_part))
            await response.write_eof()
            return response


async def _next(answer: aiohttp.ClientResponse) -> bytes:
    try:
        return await answer.content.readany()
    except aiohttp.ClientError as error:
        raise Gone(str(error)) from error


def _whole_parts(data: bytes, end: bytes) -> tuple[bytes, bytes]:
    """``data`` up to its last whole part, and the rest: an error must not begin inside a part."""
    cut = data.rfind(end) + len(end) if end in data else 0
    return data[:cut], data[cut:]


def _broken(end_of_part: bytes) -> bytes:
    """What ends a stream that broke off: an error that OpenAI's, Anthropic's and Ollama's clients understand."""
    if end_of_part == b"\n":
        return json.dumps({"error": _LOST}).encode() + end_of_part
    told = json.dumps({"type": "error"} | openai_error(_LOST, 502))
    return f"event: error\ndata: {told}\n\n".encode()


def unavailable(message: str) -> web.Response:
    """A 503 that may be tried again."""
    return web.json_response(openai_error(message, 503), status=503, headers={"Retry-After": "1"})
