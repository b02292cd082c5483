"""Requests to a server under test, each with a deadline."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

VERSION = "X-Adapter-Version"
ADMIN_KEY = "the-key-of-the-operator"


class NoAnswer(Exception):
    """The server did not answer: not before the deadline, or it closed the connection."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """status, decoded body, and when the request was sent and answered (``time.monotonic``); the header of versions."""

    status: int
    body: Any
    begin: float
    end: float
    version: str | None = None


class Client:
    """One HTTP session."""

    def __init__(self, url: str, deadline_s: float) -> None:
        self._url, self._deadline = url, deadline_s
        self._session = aiohttp.ClientSession(
            # Uvicorn closes what was idle for 5 s: a request must not meet that.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(deadline_s),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self, path: str, body: Any = None, *, admin: bool = False, method: str = "POST", version: str | None = None
    ) -> Answer:
        """Send ``body`` as JSON, or as it is where it is bytes. ``NoAnswer`` where none comes in time, or at all.

        version  of the adapter that is demanded
        """
        begin = time.monotonic()
        headers = _headers(admin) | ({VERSION: version} if version is not None else {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        try:
            async with self._session.request(method, self._url + path, data=data, headers=headers) as answer:
                text = await answer.read()
                told = answer.headers.get(VERSION)
                end = time.monotonic()
                return Answer(status=answer.status, body=_decoded(text), begin=begin, end=end, version=told)
        except TimeoutError as error:
            raise NoAnswer(f"{method} {path} {data!r:.300}: hung for {self._deadline:g} s") from error
        except aiohttp.ClientError as error:
            raise NoAnswer(f"{method} {path} {data!r:.300}: {type(error).__name__} {error}") from error

    async def stream(self, path: str, body: Any, leave_after: int | None = None) -> Answer:
        """The last event of a streamed answer, or of the first ``leave_after``: then the connection is closed.

        Where events are errors, status is the error's code.
        """
        begin, last, seen = time.monotonic(), None, 0
        data = json.dumps({**body, "stream": True}).encode()
        try:
            async with self._session.post(self._url + path, data=data, headers=_headers(False)) as answer:
                if answer.status != 200:
                    text = await answer.read()
                    return Answer(status=answer.status, body=_decoded(text), begin=begin, end=time.monotonic())
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    last, seen = json.loads(line[6:]), seen + 1
                    if seen == leave_after:
                        break
        except TimeoutError as error:
            raise NoAnswer(f"stream of {path} {data!r:.300}: hung for {self._deadline:g} s, {seen} events") from error
        except aiohttp.ClientError as error:
            raise NoAnswer(f"stream of {path} {data!r:.300}: {type(error).__name__} {error}") from error
        status = last["error"]["code"] if last and "error" in last else 200
        return Answer(status=status, body=last, begin=begin, end=time.monotonic())


def _headers(admin: bool) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {ADMIN_KEY}"} if admin else {})


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a line of text, a page of metrics, or several objects of a stream
        return text.decode(errors="replace")
