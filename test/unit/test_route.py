"""A front before real HTTP servers that stand in for replicas. Nothing here imports SGLang."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import ClientSession, web
from blocklora_testing.replica import StandIn
from sglang_blocklora.fleet.everywhere import LOAD
from sglang_blocklora.fleet.front import FLEET, application
from sglang_blocklora.fleet.replicas import Fleet
from sglang_blocklora.fleet.settings import RouteSettings
from sglang_blocklora.scheduling.replicas import preference

NAMES = [f"adapter-{i}" for i in range(12)]
KEY = "secret"


class Front:
    """A front that runs before ``replicas``, and a client of it."""

    def __init__(self, client: ClientSession, url: str, fleet: Fleet, replicas: list[StandIn]) -> None:
        self.client, self.url, self.fleet, self.replicas = client, url, fleet, replicas

    async def ask(self, model: str, key: str | None = None, **body: Any) -> tuple[int, dict[str, Any]]:
        return await self.post("/v1/completions", {"model": model, "prompt": "a", **body}, key)

    async def post(self, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.client.post(self.url + path, json=body, headers=headers) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text.startswith("{") else text

    async def load(self, name: str, key: str | None = None, **more: Any) -> tuple[int, Any]:
        return await self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": f"/{name}", **more}, key)

    async def get(self, path: str) -> tuple[int, str]:
        async with self.client.get(self.url + path) as answer:
            return answer.status, await answer.text()

    def preferred(self, adapter: str) -> StandIn:
        """The replica where ``adapter`` is asked first."""
        first = preference(adapter, tuple(one.url for one in self.replicas))[0]
        return next(one for one in self.replicas if one.url == first)

    def other(self, replica: StandIn) -> StandIn:
        return next(one for one in self.replicas if one is not replica)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the front's checks to find something out."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    def ups(self) -> list[bool]:
        return [one.up for one in self.fleet.replicas]


@asynccontextmanager
async def front(*replicas: StandIn, up: int | None = None, **settings: Any) -> AsyncIterator[Front]:
    """A front that has met ``up`` (all) of these, which are started first."""
    for one in replicas:
        await one.start()
    made = RouteSettings(replica=tuple(one.url for one in replicas), check_seconds=0.03, **settings)
    app = await application(made)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with ClientSession() as client:
            address = f"http://127.0.0.1:{runner.addresses[0][1]}"
            running = Front(client, address, app[FLEET], [*replicas])
            await running.until(lambda: sum(running.ups()) == (len(replicas) if up is None else up))
            yield running
    finally:
        await runner.cleanup()
        for one in replicas:
            await one.stop()


def run(test: Coroutine[None, None, None]) -> None:
    asyncio.run(test)


def test_each_adapter_has_one_replica_and_the_base_model_the_least_loaded() -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            used: dict[str, set[str]] = {name: set() for name in NAMES}
            for name in NAMES * 2:
                for model in (name, f"base:{name}"):
                    status, answer = await fleet.ask(model)
                    assert status == 200
                    used[name].add(answer["replica"])
                status, answer = await fleet.post("/generate", {"text": "a", "lora_path": [None, name]})
                used[name].add(answer["replica"])
            assert used == {name: {fleet.preferred(name).name} for name in NAMES}
            assert set.union(*used.values()) == {"one", "two"}
            busy = fleet.preferred("base")  # by its name it would go there
            busy.gate.clear()
            waiting = asyncio.create_task(fleet.ask(next(n for n in NAMES if fleet.preferred(n) is busy)))
            await fleet.until(lambda: any(one.in_flight for one in fleet.fleet.replicas))
            assert [(await fleet.ask("base"))[1]["replica"] for _ in range(3)] == [fleet.other(busy).name] * 3
            busy.gate.set()
            await waiting
            assert [one.in_flight for one in fleet.fleet.replicas] == [0, 0]

    run(main())


def test_a_flood_for_one_adapter_spreads_within_the_bound() -> None:
    """24 requests at once: at most ceil(5/4 * 24 / 2) = 15 on a replica."""

    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            for one in fleet.replicas:
                one.gate.clear()
            asked = [asyncio.create_task(fleet.ask("sql")) for _ in range(24)]
            await fleet.until(lambda: sum(one.in_flight for one in fleet.fleet.replicas) == 24)
            loads = [one.in_flight for one in fleet.fleet.replicas]
            for one in fleet.replicas:
                one.gate.set()
            assert {(await one)[0] for one in asked} == {200}
            assert max(loads) <= 15
            assert min(loads) > 0

    run(main())


def test_what_a_client_sends_and_a_replica_answers_is_passed_on() -> None:
    async def main() -> None:
        async with front(StandIn("one")) as fleet:
            headers = {"Authorization": "Bearer mine", "X-Adapter-Version": "v", "Content-Type": "application/json"}
            body = {"model": "sql", "prompt": "ä" * 2_000_000}  # beyond the server's own limit for bodies
            data = io.BytesIO(json.dumps(body).encode())
            async with fleet.client.post(f"{fleet.url}/v1/completions?a=%2Fb", data=data, headers=headers) as answer:
                assert answer.headers["X-Adapter-Version"] == "one"
            (_, path, sent, received) = fleet.replicas[0].asked[-1]
            assert (path, received) == ("/v1/completions", body)
            assert headers.items() <= sent.items()

    run(main())


@pytest.mark.parametrize("how", ["refused", "reset", "unavailable"])
def test_while_no_byte_of_an_answer_came_another_replica_is_asked(how: str) -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            first = fleet.preferred("sql")
            first.gate.clear()
            waiting = [asyncio.create_task(fleet.ask("sql", stream=stream)) for stream in (False, True)]
            await fleet.until(lambda: len(first.tokens_asked()) == 2)
            if how == "refused":
                await first.stop()
            first.broken = 0 if how == "reset" else None
            first.status = 503 if how == "unavailable" else 200
            first.gate.set()
            answers = [await one for one in waiting]
            other = fleet.other(first).name
            assert answers[0] == (200, {"replica": other})
            assert answers[1][0] == 200
            assert f'"text": "{other}"' in answers[1][1]
            assert "[DONE]" in answers[1][1]
            assert await fleet.ask("sql") == (200, {"replica": other})
            if how == "refused":
                await first.start()

    run(main())


def test_a_stream_that_breaks_off_ends_in_an_error_and_is_not_asked_again() -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            first = fleet.preferred("sql")
            first.broken = 2
            client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0)
            stream = await client.completions.create(model="sql", prompt="a", stream=True)
            parts = [(await anext(stream)).choices[0].text for _ in range(2)]
            with pytest.raises(openai.APIError, match="went away"):
                await anext(stream)
            await client.close()
            assert parts == [first.name] * 2
            assert fleet.other(first).tokens_asked() == []
            other_kind = anthropic.AsyncAnthropic(base_url=fleet.url, api_key="none", max_retries=0)
            message = {"model": "sql", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]}
            with pytest.raises(anthropic.APIStatusError, match="went away"):
                _ = [event async for event in await other_kind.messages.create(**message, stream=True)]
            await other_kind.close()
            _, text = await fleet.ask("sql", stream=True)
            assert "[DONE]" not in text
            assert text.count("data: ") == 3
            assert json.loads(text.split("data: ")[-1])["error"]["code"] == 502

    run(main())


def test_a_client_that_goes_away_ends_its_request_on_the_replica() -> None:
    async def main() -> None:
        async with front(StandIn("one")) as fleet:
            (replica,) = fleet.replicas
            replica.gate.clear()
            asked = asyncio.create_task(fleet.ask("sql"))
            await fleet.until(lambda: len(replica.tokens_asked()) == 1)
            asked.cancel()
            await fleet.until(lambda: replica.aborted == 1)
            await fleet.until(lambda: fleet.fleet.replicas[0].in_flight == 0)

    run(main())


def test_a_replica_that_comes_back_has_its_adapters_again() -> None:
    """What was loaded, updated, pinned or unloaded meanwhile too; and only then are they asked for there."""

    async def main() -> None:
        async with front(StandIn("one", KEY), StandIn("two", KEY), api_key=KEY) as fleet:
            for name in NAMES:
                assert (await fleet.load(name, KEY))[0] == 200
            one, two = fleet.replicas
            await one.stop()
            for name in NAMES:
                assert await fleet.ask(name, KEY) == (200, {"replica": "two"})
            first, second, third, *rest = NAMES
            assert (await fleet.load("new", KEY))[0] == 200
            assert (await fleet.load(first, KEY, load_inplace=True, lora_path="/other"))[0] == 200
            assert (await fleet.post("/v1/unload_lora_adapter", {"lora_name": second}, KEY))[0] == 200
            assert (await fleet.post(f"/adapters/{third}/pin", None, KEY))[0] == 200
            await one.start()
            await fleet.until(lambda: fleet.fleet.replicas[0].up and not fleet.fleet.replicas[0].owed)
            assert one.adapters.keys() == two.adapters.keys() == {first, third, *rest, "new"}
            assert one.adapters[first]["lora_path"] == "/other"
            assert [name for name, body in one.adapters.items() if body["pinned"]] == [third]
            for name in one.adapters:
                assert await fleet.ask(name, KEY) == (200, {"replica": fleet.preferred(name).name})

    run(main())


def test_what_one_replica_refuses_is_loaded_nowhere() -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            one, two = fleet.replicas
            two.refuse.add("bad")
            assert await fleet.load("bad") == (400, {"error": {"message": "two refuses bad"}})
            assert not one.adapters
            assert not two.adapters
            assert fleet.fleet.wanted == {}
            assert (await fleet.load("good"))[0] == 200
            assert (await fleet.load("good"))[0] == 400, "as a server answers"
            assert one.adapters.keys() == two.adapters.keys() == {"good"}
            assert (await fleet.post("/v1/load_lora_adapter", {"lora_path": "/a"}))[0] == 400
            assert (await fleet.post("/v1/unload_lora_adapter", {"lora_name": "nobody"}))[0] == 404

    run(main())


def test_an_adapter_that_cannot_come_back_keeps_the_others_serving(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            for name in NAMES:
                await fleet.load(name)
            name = next(n for n in NAMES if fleet.preferred(n) is fleet.replicas[0])
            one = fleet.replicas[0]
            await one.stop()
            await fleet.until(lambda: not fleet.fleet.replicas[0].up)
            one.refuse.add(name)
            await one.start()
            await fleet.until(lambda: fleet.fleet.replicas[0].up and fleet.fleet.replicas[0].owed == {name})
            assert await fleet.ask(name) == (200, {"replica": "two"})
            assert f"one refuses {name}" in caplog.text
            one.refuse.clear()
            await fleet.until(lambda: not fleet.fleet.replicas[0].owed)
            assert await fleet.ask(name) == (200, {"replica": "one"})

    run(main())


def test_a_replica_of_another_base_model_or_with_a_key_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with front(StandIn("one"), up=1) as fleet:
            assert fleet.fleet.base == "base"
        for wrong, told in ((StandIn("two", base="other"), "it serves"), (StandIn("two", KEY), "asks for a key")):
            async with front(StandIn("one"), wrong, up=1) as fleet:
                await fleet.until(lambda told=told: told in caplog.text)
                used = next(one for one in fleet.replicas if one.url == fleet.fleet.up[0].url)
                for name in NAMES:
                    assert await fleet.ask(name) == (200, {"replica": used.name})

    run(main())


def test_without_a_replica_requests_are_told_to_come_again() -> None:
    async def main() -> None:
        async with front(StandIn("one")) as fleet:
            (replica,) = fleet.replicas
            assert (await fleet.get("/health"))[0] == 200
            await replica.stop()
            for path, body in (("/v1/completions", {"model": "a"}), ("/v1/load_lora_adapter", dict.fromkeys("a"))):
                status, answer = await fleet.post(path, body)
                assert (status, answer["error"]["code"]) == ((503, 503) if path.endswith("completions") else (400, 400))
            assert (await fleet.load("a"))[0] == 503
            assert (await fleet.get("/health"))[0] == 503
            assert (await fleet.get("/v1/models"))[0] == 503
            await replica.start()
            replica.status = 503  # it is starting, or ending
            assert (await fleet.ask("a"))[0] == 503

    run(main())


def test_the_list_of_models_is_what_any_replica_has() -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            for one, name in zip(fleet.replicas, ("sql", "legal"), strict=True):
                one.adapters = {name: {}, "both": {}}
            status, text = await fleet.get("/v1/models")
            assert status == 200
            assert sorted(card["id"] for card in json.loads(text)["data"]) == ["base", "both", "legal", "sql"]
            status, text = await fleet.get("/v1/models/both")
            assert status == 200
        async with front(StandIn("one", KEY), api_key=KEY) as fleet:
            assert (await fleet.get("/v1/models"))[0] == 401, "the front's key is not its clients'"

    run(main())


@pytest.mark.parametrize(
    ("host", "keys", "sent", "allowed"),
    [
        ("127.0.0.1", {}, None, True),
        ("0.0.0.0", {}, None, False),
        ("0.0.0.0", {}, "none", False),
        ("0.0.0.0", {"api_key": KEY}, KEY, True),
        ("127.0.0.1", {"api_key": KEY}, None, False),
        ("0.0.0.0", {"api_key": KEY, "admin_api_key": "admin"}, KEY, False),
        ("0.0.0.0", {"api_key": KEY, "admin_api_key": "admin"}, "admin", True),
    ],
)
def test_who_may_load_through_a_front(host: str, keys: dict[str, str], sent: str | None, allowed: bool) -> None:
    """The replicas would take it: a front on their machine is no reason to."""

    async def main() -> None:
        async with front(StandIn("one"), host=host, **keys) as fleet:
            expected = 200 if allowed else 403
            for forged in ("none", "Bearer None", "Bearer ", "Bearer \u00e4"):
                async with fleet.client.post(f"{fleet.url}{LOAD}", headers={"Authorization": forged}) as answer:
                    assert answer.status == (403 if keys or not allowed else 400)
            assert (await fleet.load("a", sent))[0] == expected
            assert (await fleet.post("/adapters/a/pin", None, sent))[0] == expected
            assert (await fleet.post("/v1/unload_lora_adapter", {"lora_name": "a"}, sent))[0] == expected
            assert len(fleet.replicas[0].asked) == (4 if allowed else 1)

    run(main())


def test_what_concerns_one_server_is_not_passed_on() -> None:
    async def main() -> None:
        async with front(StandIn("one")) as fleet:
            for path in ("/flush_cache", "/update_weights_from_disk", "/load_lora_adapter", "/adapters/a"):
                assert (await fleet.post(path, {}))[0] == 404
            async with fleet.client.put(f"{fleet.url}/adapters/a", data=b"") as answer:
                assert answer.status == 404
            assert len(fleet.replicas[0].asked) == 1, "the list of models, by the front itself"
            assert (await fleet.post("/abort_request", {"rid": "1"}))[0] == 200
            assert fleet.replicas[0].asked[-1][1] == "/abort_request"

    run(main())


def test_metrics_tell_what_became_of_requests() -> None:
    async def main() -> None:
        async with front(StandIn("one"), StandIn("two")) as fleet:
            first = fleet.preferred("sql")
            await fleet.ask("sql")
            first.broken = 0
            await fleet.ask("sql")
            first.broken = 1
            await fleet.ask("sql", stream=True)
            _, page = await fleet.get("/metrics")
            for url, outcome in (
                (first.url, "answered"),
                (first.url, "gone"),
                (first.url, "broken"),
                (fleet.other(first).url, "answered"),
            ):
                series = f'sglang_blocklora:route_requests_total{{outcome="{outcome}",replica="{url}"}} 1.0'
                assert series in page
            assert f'sglang_blocklora:route_up{{replica="{first.url}"}} 1.0' in page
            assert f'sglang_blocklora:route_requests_in_flight{{replica="{first.url}"}} 0.0' in page

    run(main())
