"""What concerns every replica: loads, unloads and pins of adapters, aborts, the list of models."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection, Coroutine

import msgspec
from aiohttp import web

from sglang_blocklora.fleet.calls import Answer, Calls, Gone, bearer, passed_on
from sglang_blocklora.fleet.relay import unavailable
from sglang_blocklora.fleet.replicas import Load, Replica
from sglang_blocklora.fleet.settings import RouteSettings
from sglang_blocklora.naming.turns import Tasks, Turns
from sglang_blocklora.reporting.errors import openai_error
from sglang_blocklora.requests.loopback import is_loopback

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_CLOSED = (
    "Loading, unloading and pinning adapters is closed: this front listens where others reach it. Give the replicas "
    "--api-key or --admin-api-key, and this front the same, and send that key."
)


class _Unload(msgspec.Struct):
    lora_name: str


class Everywhere:
    """Answers requests that all replicas that are up have to hear of. A replica that is down hears of it later.

    turns  of adapters' names, shared with what looks after replicas
    """

    def __init__(self, calls: Calls, settings: RouteSettings, turns: Turns) -> None:
        self._calls, self._fleet = calls, calls.fleet
        self._settings = settings
        self._turns = turns
        self._tasks = Tasks()

    async def load(self, request: web.Request) -> web.StreamResponse:
        """Load an adapter on all of them, or on none."""
        return await self._managed(request, self._load(request, await request.read()))

    async def unload(self, request: web.Request) -> web.StreamResponse:
        """Unload it from those that have it."""
        return await self._managed(request, self._unload(request, await request.read()))

    async def pin(self, request: web.Request) -> web.StreamResponse:
        """Pin or unpin it on those that have it."""
        return await self._managed(request, self._pin(request))

    async def abort(self, request: web.Request) -> web.StreamResponse:
        """End a request by its id, wherever it is."""
        answers = await self._all(request, await request.read())
        return _best(list(answers.values()))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The base model and what any replica has, each once."""
        answers = await self._all(request, b"")
        refused = [answer for answer in answers.values() if not answer.ok]
        if refused or not answers:
            return _best(refused)
        cards: dict[str, dict[str, object]] = {}
        for answer in answers.values():
            for card in msgspec.json.decode(answer.body)["data"]:
                cards.setdefault(card["id"], card)
        return web.json_response({"object": "list", "data": list(cards.values())})

    async def _managed(
        self, request: web.Request, work: Coroutine[None, None, web.StreamResponse]
    ) -> web.StreamResponse:
        """The answer of ``work``, which runs to its end also where its client goes; 403 who may not ask for it."""
        if not self._may_manage(request):
            work.close()
            return web.json_response(openai_error(_CLOSED, 403), status=403)
        return await asyncio.shield(self._tasks.start(work))

    def _may_manage(self, request: web.Request) -> bool:
        key = self._settings.managing_key
        if key is None:
            return is_loopback(self._settings.host)
        sent = request.headers.get("Authorization", "")
        return hmac.compare_digest(sent.encode(), bearer(key)["Authorization"].encode())

    async def _load(self, request: web.Request, body: bytes) -> web.StreamResponse:
        try:
            load = msgspec.json.decode(body, type=Load)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return web.json_response(openai_error(f"The body is not understood: {error}", 400), status=400)
        name = load.lora_name
        async with self._turns.of(name):
            answers = await self._all(request, body)
            took = [replica for replica, answer in answers.items() if answer.ok]
            if len(took) < len(answers) or not took:
                if not load.load_inplace:  # an update cannot be taken back
                    await self._take_back(request, name, took)
                return _best([answer for answer in answers.values() if not answer.ok])
            self._fleet.wanted[name] = load
            self._note(name, took)
            return answers[took[0]].response()

    async def _take_back(self, request: web.Request, name: str, took: list[Replica]) -> None:
        """Unload what one replica refused from those that took it; where that fails it is owed."""
        body = msgspec.json.encode(_Unload(name))
        for replica in took:
            replica.owed.add(name)
            try:
                answer = await self._calls.whole(replica, "POST", UNLOAD, passed_on(request.headers), body)
            except Gone:
                continue
            if answer.ok or answer.status == 404:
                replica.owed.remove(name)

    async def _unload(self, request: web.Request, body: bytes) -> web.StreamResponse:
        try:
            name = msgspec.json.decode(body, type=_Unload).lora_name
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return web.json_response(openai_error(f"The body is not understood: {error}", 400), status=400)
        async with self._turns.of(name):
            answers = await self._all(request, body)
            if not answers or any(not answer.ok and answer.status != 404 for answer in answers.values()):
                return _best([answer for answer in answers.values() if answer.status != 404])
            self._fleet.wanted.pop(name, None)
            self._note(name, answers)
            return _best(list(answers.values()))

    async def _pin(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        async with self._turns.of(name):
            answers = await self._all(request, b"")
            if name in self._fleet.wanted and any(answer.ok for answer in answers.values()):
                pinned = request.match_info["what"] == "pin"
                self._fleet.wanted[name] = msgspec.structs.replace(self._fleet.wanted[name], pinned=pinned)
                self._note(name, answers)
            wrong = [answer for answer in answers.values() if not answer.ok and answer.status != 404]
            return _best(wrong or list(answers.values()))

    def _note(self, name: str, heard: Collection[Replica]) -> None:
        """All but those that ``heard`` of it, and are there still, owe what is wanted of ``name`` now."""
        for replica in self._fleet.replicas:
            if replica in heard and replica.up:
                replica.owed.discard(name)
            else:
                replica.owed.add(name)

    async def _all(self, request: web.Request, body: bytes) -> dict[Replica, Answer]:
        """What each replica that is up answers to ``request``; one that goes away meanwhile answers nothing."""

        async def ask(replica: Replica) -> Answer | None:
            try:
                return await self._calls.whole(
                    replica, request.method, request.raw_path, passed_on(request.headers), body
                )
            except Gone:
                return None

        up = self._fleet.up
        answers = await asyncio.gather(*map(ask, up))
        return {replica: answer for replica, answer in zip(up, answers, strict=True) if answer is not None}


def _best(answers: list[Answer]) -> web.Response:
    """The answer that says the most: one that did something, else the first."""
    if not answers:
        return unavailable("No replica answers now.")
    return min(answers, key=lambda answer: not answer.ok).response()
