"""Tenants over SGLang's real application and its own check of keys: what each sees, uses, and is refused."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from blocklora_testing.bodies import BASE_ONLY, EMBEDDING, RESOLVES, SAME_FOR_ALL
from blocklora_testing.http_process import HTTPProcess
from sglang_blocklora.settings import Settings

OPERATOR, ADMIN, ACME, OTHER = "operator-key", "admin-key", "acme-key", "other-key"
BODIES: dict[str, Mapping[str, Any]] = {**RESOLVES, **SAME_FOR_ALL, **BASE_ONLY, **EMBEDDING}
SLOTS = 1000
GENERATE = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}}


class Server:
    """The process behind SGLang's check of keys, with a tenants' file that a test may write anew."""

    def __init__(self, process: HTTPProcess, path: Path) -> None:
        from sglang.srt.utils.auth import add_api_key_middleware

        self.process, self.path, self.router = process, path, process.app.router
        add_api_key_middleware(self, api_key=OPERATOR, admin_api_key=ADMIN)

    def add_middleware(self, kind: Any, **options: Any) -> None:
        """What SGLang asks of its application, which has started here already."""
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(kind(self.process.app, **options)), base_url="http://test"
        )

    async def ask(
        self, key: str | None, path: str, body: Any = None, *, method: str | None = None, **more: Any
    ) -> httpx.Response:
        """A request with ``key`` in the header, from a client of its own."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        if body is not None and path == "/v1/audio/transcriptions":
            more = {"data": body, "files": {"file": ("a.wav", b"no sound")}}
        elif body is not None:
            more = {"json": body}
        ask = self.client.request(
            method or ("GET" if body is None else "POST"), path, headers=headers, timeout=30, **more
        )
        return await asyncio.create_task(ask)

    def call(self, key: str | None, path: str, body: Any = None, **more: Any) -> httpx.Response:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SGLang's own
            return self.process.run(self.ask(key, path, body, **more))  # type: ignore[no-any-return]

    def write(self, acme: Mapping[str, Any] = {}, adapters: list[Any] = []) -> None:  # noqa: B006  # read only
        """The file, with those limits of acme and of adapters."""
        tenants = [
            {"name": "acme", "keys": [ACME], "adapters": ["sql"], "limits": acme},
            {"name": "other", "keys": [OTHER], "adapters": ["support-*"]},
        ]
        self.path.write_text(json.dumps({"tenants": tenants, "adapters": adapters}))

    def serve(self, acme: Mapping[str, Any] = {}, adapters: list[Any] = []) -> Any:  # noqa: B006
        """Begin with those limits and nothing used; the ``Tenancy``."""
        from blocklora_patches.http import tenants

        self.write(acme, adapters)
        with Settings(tenants=str(self.path)).exported():
            tenants.serve(SLOTS)
        tenancy = tenants.serving()
        assert tenancy is not None
        tenancy.quotas._clock = lambda: 1000.0  # time stands still, whatever a test takes
        return tenancy


@pytest.fixture
def server(process: HTTPProcess, tmp_path: Path) -> Iterator[Server]:
    from blocklora_patches.http import tenants

    server = Server(process, tmp_path / "tenants.json")
    tenancy = server.serve()
    yield server
    process.run(asyncio.sleep(0.01))  # what Python closes of an answer that was cut off, it closes in a moment
    assert tenancy.quotas.running == {}
    assert tenants.serving().quotas.running == {}
    tenants.serve(SLOTS)
    assert tenants.serving() is None
    process.run(server.client.aclose())


# Who sees what.


@pytest.mark.parametrize("path", BODIES)
def test_anothers_adapter_is_as_one_that_nobody_has(server: Server, path: str) -> None:
    theirs, nobodys = (server.call(OTHER, path, BODIES[path] | {"model": name}) for name in ("sql", "xyz"))
    assert (theirs.status_code, theirs.text) == (404, nobodys.text.replace("xyz", "sql"))
    assert server.process.scheduler.requests() == []
    assert server.call(ACME, path, BODIES[path] | {"model": "sql"}).status_code != 404


@pytest.mark.parametrize("path", RESOLVES)
def test_ones_own_adapter_and_the_base_model_answer(server: Server, path: str) -> None:
    for model in ("sql", "llama:sql", "llama"):
        answer = server.call(ACME, path, BODIES[path] | {"model": model})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("shape", ["one", "list", "n", "stream"])
def test_lora_path_is_held_to_the_same(server: Server, shape: str) -> None:
    def body(name: str) -> dict[str, Any]:
        return {
            "one": GENERATE | {"lora_path": name},
            "list": GENERATE | {"input_ids": [[5], [6]], "lora_path": [None, name]},
            "n": GENERATE | {"lora_path": name, "sampling_params": {"max_new_tokens": 1, "n": 3}},
            "stream": GENERATE | {"lora_path": name, "stream": True},
        }[shape]

    theirs, nobodys = (server.call(OTHER, "/generate", body(name)) for name in ("sql", "xyz"))
    assert "does not exist" in theirs.text
    assert (theirs.status_code, theirs.text) == (nobodys.status_code, nobodys.text.replace("xyz", "sql"))
    assert server.process.scheduler.requests() == []
    assert server.call(ACME, "/generate", body("sql")).status_code == 200


def test_many_who_ask_at_once_for_what_nobody_has_are_told_of_their_own(server: Server) -> None:
    """They wait for one load."""

    async def scenario() -> list[str]:
        asks = [server.ask(key, "/generate", GENERATE | {"lora_path": "support-x"}) for key in (OPERATOR, OTHER)]
        return [answer.text for answer in await asyncio.gather(*asks)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_operator, of_other = server.process.run(scenario())
    assert "Adapters: sql." in of_operator
    assert "Adapters: none." in of_other


def test_lists_hold_ones_own_adapters(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from blocklora_patches.http import facts
    from sglang_blocklora.reporting.facts import Facts, OwnedSlots, Requests, SlotFacts, Waiting

    owners = {"(base)": OwnedSlots(kv=1), "sql": OwnedSlots(adapter=2, kv=3), "x": OwnedSlots(adapter=4)}
    slots = SlotFacts(total=20, free=10, in_use=0, adapter=6, kv=4, invalid_kv=0, owners=owners)
    waiting = [Waiting(adapter=name, prompt_tokens=5) for name in (None, "sql", "x")]
    told = Facts(adapters=[], base=Requests(), max_adapters_per_batch=4, slots=slots, queue=waiting)

    class Told:
        async def now(self) -> Facts:
            return told

    from blocklora_patches.http import routes

    monkeypatch.setattr(routes, "facts_of", lambda manager: Told())
    assert facts.facts_of is not routes.facts_of
    for key, own in ((OPERATOR, {"sql"}), (ACME, {"sql"}), (OTHER, set())):
        models = {card["id"] for card in server.call(key, "/v1/models").json()["data"]}
        tags = {model["name"] for model in server.call(key, "/api/tags").json()["models"]}
        assert models == tags == {"llama", *own}
        assert server.call(key, "/v1/models/llama").status_code == 200
        assert server.call(key, "/v1/models/sql").status_code == (200 if own else 404)
        assert server.call(key, "/adapters/sql").status_code == (200 if own else 404)
        listed = server.call(key, "/adapters").json()
        assert {one["name"] for one in listed["data"]} == own
        assert listed["total"] == len(own)
        shown = {None: "x", "x": "x"}
        names = {OPERATOR: ["sql", "x"], ACME: ["sql", "(others)"], OTHER: ["(others)"]}[key]
        assert list(listed["slots"]["owners"]) == ["(base)", *names], shown
        assert sum(one["adapter"] for one in listed["slots"]["owners"].values()) == 6
        assert {one["adapter"] for one in listed["queue"]["head"]} == {None, *names}


def test_a_tenant_reaches_no_route_that_is_not_for_tenants(server: Server) -> None:
    """Every route of the application, those that a release adds too."""
    from blocklora_patches.http.tenants import BELOW, ROUTES

    open_to_all = ("/health", "/ready", "/metrics")
    tried = 0
    routers = [getattr(route, "original_router", None) for route in server.process.app.routes]  # that were included
    for route in (*server.process.app.routes, *(route for one in routers if one for route in one.routes)):
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            if not hasattr(route, "endpoint"):
                continue
            path = route.path.replace("{model:path}", "x").replace("{name:path}", "x").replace("{response_id}", "x")
            known = method in ROUTES.get(path, ()) or (method == "GET" and path.startswith(BELOW))
            if known or path.startswith(open_to_all) or method == "OPTIONS":
                continue
            assert server.call(ACME, path, method=method).status_code == 403, (method, path)
            assert server.call("nobodys", path, method=method).status_code in (401, 403), (method, path)
            tried += 1
    assert tried > 60
    assert server.process.scheduler.received == []


def test_without_a_key_of_its_own_nobody_asks(server: Server) -> None:
    for key in (None, "", "nobodys", ACME + "x", ADMIN):
        assert server.call(key, "/generate", GENERATE).status_code == 401
    assert server.call(OPERATOR, "/generate", GENERATE).status_code == 200
    assert server.call(ACME, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}).status_code == 403
    assert server.call(None, "/health").status_code == 503  # it is told to all, here that no scheduler is there


def test_every_path_of_the_list_is_a_route(server: Server) -> None:
    from blocklora_patches.http.tenants import ROUTES

    there = {
        (route.path, method) for route in server.process.app.routes for method in getattr(route, "methods", None) or ()
    }
    assert {(path, method) for path, methods in ROUTES.items() for method in methods} - there == set()


# Quotas.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [*RESOLVES, "/generate"])
def test_too_many_are_a_429_that_says_when_to_come_again(server: Server, path: str, stream: bool) -> None:
    body = {**(BODIES[path] | {"model": "sql"} if path != "/generate" else GENERATE | {"lora_path": "sql"})}
    tenancy = server.serve({"requests_per_minute": 2})
    body["stream"] = False
    assert [server.call(ACME, path, body).status_code for _ in range(2)] == [200, 200]
    server.process.scheduler.received.clear()
    answer = server.call(ACME, path, body | {"stream": stream})
    assert "tenant 'acme' is at its limit of 2 requests per minute" in answer.text
    if path == "/v1/responses" and stream:  # it begins before SGLang makes the request
        assert (answer.status_code, "event: response.failed" in answer.text) == (200, True)
    else:
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert server.process.scheduler.requests() == []
    assert server.call(OPERATOR, path, body).status_code == 200
    assert tenancy.quotas.running == {}


def test_limits_of_an_adapter_hold_for_all_who_ask_for_it(server: Server) -> None:
    server.serve(adapters=[{"name": "sql", "limits": {"requests_per_minute": 1}}])
    body = GENERATE | {"lora_path": "sql"}
    assert server.call(OPERATOR, "/generate", body).status_code == 200
    for key in (OPERATOR, ACME):
        answer = server.call(key, "/generate", body)
        assert (answer.status_code, "adapter 'sql' is at its limit of 1" in answer.text) == (429, True)
    assert server.call(ACME, "/generate", GENERATE).status_code == 200
    assert "does not exist" in server.call(OTHER, "/generate", body).text, "nor does a limit tell of the adapter"


def test_prompts_and_answers_are_counted_and_given_back(server: Server) -> None:
    """Held, aborted, refused, left by their clients: in the end nothing runs (the fixture looks)."""
    tenancy = server.serve({"concurrent_requests": 4}, [{"name": "sql", "limits": {"concurrent_requests": 3}}])
    scheduler = server.process.scheduler

    def running() -> dict[str, int]:
        return {owner: count for owner, (count, _) in tenancy.quotas.running.items()}

    async def scenario() -> None:
        scheduler.holds = True
        three = GENERATE | {"input_ids": [[5], [6], [7]], "lora_path": ["sql", None, "sql"]}
        first = asyncio.ensure_future(server.ask(ACME, "/generate", three))
        while len(scheduler.requests()) < 3:
            await asyncio.sleep(0.001)
        assert running() == {"tenant 'acme'": 3, "adapter 'sql'": 2}
        two = GENERATE | {"sampling_params": {"max_new_tokens": 1, "n": 2}}
        refused = await server.ask(ACME, "/generate", two)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await server.ask(ACME, "/generate", GENERATE | {"input_ids": [5, 10**6]})).status_code == 400
        assert (await server.ask(ACME, "/generate", GENERATE | {"input_ids": [5] * 10**4})).status_code == 400
        five = await server.ask(ACME, "/generate", GENERATE | {"input_ids": [[5]] * 5})
        assert (five.status_code, "asks for 5 answers at once" in five.text) == (400, True)
        assert running() == {"tenant 'acme'": 3, "adapter 'sql'": 2}

        second = asyncio.ensure_future(server.ask(ACME, "/generate", GENERATE | {"stream": True}))
        while len(scheduler.requests()) < 4:
            await asyncio.sleep(0.001)
        assert running()["tenant 'acme'"] == 4
        second.cancel()  # its client goes away
        while running()["tenant 'acme'"] == 4:
            await asyncio.sleep(0.001)
        server.process.manager.abort_request(abort_all=True)
        assert (await first).status_code == 200

        scheduler.holds = False
        for body in (GENERATE, two, three):
            assert (await server.ask(ACME, "/generate", body)).status_code == 200

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server.process.run(asyncio.wait_for(scenario(), 60))


def test_tokens_are_charged_at_the_door_and_as_they_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts once however many answers, generated ones of all; the stand-in generates one for each."""
    from blocklora_patches.http import quotas

    told: Counter[tuple[str, ...]] = Counter()

    class Usage:
        def prompt(self, tenant: str, adapter: str | None, answers: int, tokens: int) -> None:
            told["requests", tenant, str(adapter)] += answers
            told["prompt", tenant, str(adapter)] += tokens

        def generated(self, tenant: str, adapter: str | None, tokens: int) -> None:
            told["generated", tenant, str(adapter)] += tokens

        def refused(self, tenant: str, limit: str) -> None:
            told["refused", tenant, limit] += 1

    monkeypatch.setattr(quotas, "_usage", Usage)
    server.serve({"tokens_per_minute": 10})
    batch = {"input_ids": [[5] * 6, [6]], "lora_path": ["sql", None], "sampling_params": {"max_new_tokens": 1}}
    assert server.call(ACME, "/generate", batch).status_code == 200
    assert server.call(ACME, "/v1/completions", {"model": "sql", "prompt": [5], "max_tokens": 1}).status_code == 200
    refused = server.call(ACME, "/generate", GENERATE)  # 8 of prompts and 3 generated
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "12")
    n = {"input_ids": [5] * 4, "sampling_params": {"max_new_tokens": 1, "n": 2}}
    assert server.call(OPERATOR, "/generate", n).status_code == 200
    assert told == {
        ("requests", "acme", "sql"): 2,
        ("prompt", "acme", "sql"): 7,
        ("generated", "acme", "sql"): 2,
        ("requests", "acme", "None"): 1,
        ("prompt", "acme", "None"): 1,
        ("generated", "acme", "None"): 1,
        ("refused", "acme", "tokens_per_minute"): 1,
        ("requests", "(operator)", "None"): 2,
        ("prompt", "(operator)", "None"): 4,
        ("generated", "(operator)", "None"): 3,  # SGLang runs the prompt once before, to cache it
    }


def test_slots_are_prompts_and_the_longest_answers(server: Server) -> None:
    tenancy = server.serve({"share_of_slots": 0.1})

    async def scenario() -> None:
        server.process.scheduler.holds = True
        body = {"input_ids": [[5] * 20, [6] * 10], "sampling_params": {"max_new_tokens": 35}}
        first = asyncio.ensure_future(server.ask(ACME, "/generate", body))
        while len(server.process.scheduler.requests()) < 2:
            await asyncio.sleep(0.001)
        assert tenancy.quotas.running == {"tenant 'acme'": (2, 100)}
        refused = await server.ask(ACME, "/generate", GENERATE)
        assert (refused.status_code, "0.1 share of slots" in refused.text) == (429, True)
        server.process.manager.abort_request(abort_all=True)
        assert (await first).status_code == 200
        server.process.scheduler.holds = False
        assert (await server.ask(ACME, "/generate", GENERATE)).status_code == 200

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server.process.run(asyncio.wait_for(scenario(), 60))


def test_a_reload_changes_limits_and_keys_or_nothing(server: Server) -> None:
    assert server.call(ADMIN, "/tenants/reload", {}).json() == {"tenants": ["acme", "other"]}
    server.path.write_text(server.path.read_text().replace(OTHER, "new-key"))
    assert server.call(OTHER, "/v1/models").status_code == 200
    assert server.call(ADMIN, "/tenants/reload", {}).status_code == 200
    assert [server.call(key, "/v1/models").status_code for key in (OTHER, "new-key")] == [401, 200]
    server.path.write_text("{")
    refused = server.call(ADMIN, "/tenants/reload", {})
    assert (refused.status_code, "The tenants stay as they were" in refused.text) == (400, True)
    assert server.call("new-key", "/v1/models").status_code == 200
    assert [server.call(key, "/tenants/reload", {}).status_code for key in (ACME, OPERATOR)] == [403, 401]


def test_a_start_that_would_leave_the_server_open_is_refused(server: Server) -> None:
    from types import SimpleNamespace

    from blocklora_patches.http import front_ends

    def refusal(api_key: str | None, admin: str | None = None) -> str:
        with Settings(tenants=str(server.path)).exported(), pytest.raises(SystemExit) as error:
            front_ends.refuse_open_tenants(SimpleNamespace(api_key=api_key, admin_api_key=admin))
        return str(error.value)

    assert "--tenants needs --api-key" in refusal(None)
    assert f"{server.path} gives tenant 'acme' the key of --api-key" in refusal(ACME)
    assert "gives tenant 'other' the key of --admin-api-key" in refusal(OPERATOR, OTHER)
    with Settings(tenants=str(server.path)).exported():
        front_ends.refuse_open_tenants(SimpleNamespace(api_key=OPERATOR, admin_api_key=ADMIN))
        with pytest.raises(SystemExit, match="an engine sees none"):
            front_ends.refuse_tenants_of_engine()
    with Settings().exported():
        front_ends.refuse_open_tenants(SimpleNamespace(api_key=None, admin_api_key=None))
        front_ends.refuse_tenants_of_engine()
