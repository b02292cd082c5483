"""Calls of the front to its replicas."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from sglang_blocklora.fleet.replicas import Fleet, Replica

CONNECT_SECONDS = 5.0
# Shorter than a replica keeps an idle connection (SGLang: 5 s), so that none is used that was just closed.
IDLE_SECONDS = 2.0
# Of one connection, or made anew by whoever sends: none of them is passed on.
_OWN = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


class Gone(Exception):
    """A replica went away before a byte of its answer came."""


@dataclass(frozen=True)
class Answer:
    """A replica's whole answer."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status < 300

    def response(self) -> web.Response:
        """The same for a client."""
        return web.Response(status=self.status, headers=self.headers, body=self.body)


def passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Headers of a request or an answer that are for its receiver, the client's key among them."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _OWN)


def bearer(key: str | None) -> dict[str, str]:
    """The header that tells ``key``."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def new_session() -> aiohttp.ClientSession:
    """What all calls are made with: as many at once as there are requests, each as long as its answer takes."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        auto_decompress=False,
    )


class Calls:
    """Calls to the replicas of ``fleet``, which learns from them who is gone."""

    def __init__(self, fleet: Fleet, session: aiohttp.ClientSession) -> None:
        self.fleet = fleet
        self.session = session

    async def open(
        self, replica: Replica, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """The beginning of an answer; who asks closes it. ``Gone`` where the replica is."""
        try:
            return await self.session.request(
                method,
                URL(replica.url + target, encoded=True),
                headers=headers,
                data=io.BytesIO(body) if body else None,  # sent piece by piece, however large
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self.fleet.lost(replica, str(error))
            raise Gone(str(error)) from error
        except aiohttp.ClientError as error:  # it may be there for the next one
            raise Gone(str(error)) from error

    async def whole(
        self, replica: Replica, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Answer:
        """A whole answer. ``Gone`` where the replica is, also where it went half-way."""
        async with await self.open(replica, method, target, headers, body) as answer:
            return await read(answer)


async def read(answer: aiohttp.ClientResponse) -> Answer:
    """All of an answer that was opened. ``Gone`` where it breaks off."""
    try:
        return Answer(answer.status, passed_on(answer.headers), await answer.read())
    except aiohttp.ClientError as error:
        raise Gone(str(error)) from error
