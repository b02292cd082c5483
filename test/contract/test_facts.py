"""Facts of the scheduler over SGLang's real channel: who asks gets his own answer, whoever gave up before him."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from blocklora_testing.http_process import hooked
from fastapi import FastAPI
from sglang_blocklora.reporting.facts import Facts, Requests, SlotFacts


@pytest.fixture(scope="module")
def facts() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.http import facts, routes  # noqa: F401  # which warns too, where it comes first
    with hooked(facts.HOOKS):
        yield facts


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_call_that_was_given_up_leaves_its_answers_to_nobody(facts: Any, replicas: int) -> None:
    from sglang.srt.managers.communicator import FanOutCommunicator

    async def main() -> None:
        sent: list[str] = []
        channel = FanOutCommunicator(sent.append, replicas)

        async def answer_the_oldest() -> None:
            question = sent.pop(0)
            for replica in range(replicas):
                channel.handle_recv((question, replica))
            await settle()

        given_up = asyncio.create_task(channel("one"))
        await settle()
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        asked = {question: asyncio.create_task(channel(question)) for question in ("two", "three")}
        await settle()
        while sent:
            await answer_the_oldest()
        for question, answer in asked.items():
            assert await asyncio.wait_for(answer, 60) == [(question, replica) for replica in range(replicas)]

    asyncio.run(main())


def told(running: int) -> list[dict[str, Any]]:
    slots = SlotFacts(total=0, free=0, in_use=0, adapter=0, kv=0, invalid_kv=0, owners={})
    one = Facts(adapters=[], base=Requests(running=running), max_adapters_per_batch=1, slots=slots)
    return [{"blocklora": msgspec.to_builtins(one)}]


class Busy:
    """A scheduler that answers when it is told to."""

    def __init__(self) -> None:
        self.questions: list[asyncio.Future[Any]] = []

    async def ask(self) -> list[dict[str, Any]]:
        self.questions.append(asyncio.get_running_loop().create_future())
        return await self.questions[-1]


PROMETHEUS_ACCEPTS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


class Idle:
    """A tokenizer manager whose scheduler answers at once."""

    served_model_name = "llama"

    async def get_internal_state(self) -> list[dict[str, Any]]:
        return told(3)


def test_scrapes_of_a_busy_scheduler_show_the_last_facts_and_ask_once(facts: Any) -> None:
    async def main() -> None:
        busy = Busy()
        scheduler = facts.SchedulerFacts(busy.ask)
        assert await asyncio.gather(*(scheduler.within(0) for _ in range(3))) == [None] * 3
        assert len(busy.questions) == 1
        waiting = asyncio.create_task(scheduler.within(60))
        gone = asyncio.create_task(scheduler.within(60))
        await settle()
        gone.cancel()
        busy.questions[0].set_result(told(7))
        assert (await waiting).base.running == 7
        assert 0 <= scheduler.age_seconds < 60
        age = scheduler.age_seconds
        assert (await scheduler.within(0)).base.running == 7, "the second question is on its way"
        assert scheduler.age_seconds > age, "and what is shown grows old"
        busy.questions[1].set_result(told(8))
        await settle()
        assert scheduler.last.base.running == 8
        assert len(busy.questions) == 2

    asyncio.run(main())


def test_the_list_asks_anew_and_a_client_that_goes_takes_nothing_with_it(facts: Any) -> None:
    """Facts that were asked for before a reader came may be older than what he did before he came."""

    async def main() -> None:
        busy = Busy()
        scheduler = facts.SchedulerFacts(busy.ask)
        scrape = asyncio.create_task(scheduler.within(60))
        await settle()
        reader, gone = asyncio.create_task(scheduler.now()), asyncio.create_task(scheduler.now())
        await settle()
        gone.cancel()
        busy.questions[1].set_result(told(2))
        assert (await reader).base.running == 2
        busy.questions[0].set_result(told(1))
        assert (await scrape).base.running == 1

    asyncio.run(main())


def test_metrics_are_told_where_upstream_tells_its_own(
    facts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from blocklora_patches.http import routes
    from sglang.srt.utils.common import add_prometheus_middleware

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    app = FastAPI()
    routes.add_metrics_to(app, Idle())
    add_prometheus_middleware(app)
    app.add_api_route("/later", lambda: "later")

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for path, accept in (("/metrics", ""), ("/metrics/", "*/*"), ("/metrics", PROMETHEUS_ACCEPTS)):
                page = (await client.get(path, headers={"Accept": accept})).text
                assert 'sglang_blocklora:adapter_requests_running{adapter="(base)"} 3.0' in page
                assert "sglang_blocklora:facts_age_seconds " in page
                assert 'vllm:num_gpu_loaded_lora_adapters{model_name="llama"} 0.0' in page
            assert (await client.get("/later")).json() == "later"

    facts.facts_of.cache_clear()
    asyncio.run(main())


def test_the_list_tells_an_adapter_once_though_it_is_unloaded_while_folders_are_looked_into(
    facts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as loaded and as one to be loaded, and sorting the two was an internal error."""
    from blocklora_patches.http import routes

    loaded = {"a": SimpleNamespace(lora_path="/p/a", lora_id="1", pinned=False)}

    async def folders(manager: Any) -> dict[str, Path]:
        loaded.clear()
        return {"a": Path("/p/a")}

    monkeypatch.setattr(routes, "loaded_adapters", lambda manager: loaded)
    monkeypatch.setattr(routes, "adapters_in_folders", folders)
    monkeypatch.setattr(routes, "adapters_of", lambda manager: SimpleNamespace(errors={}, draining={}))
    nothing = msgspec.convert(told(0)[0]["blocklora"], Facts)
    (one,) = asyncio.run(routes.AdapterRoutes(SimpleNamespace(tokenizer=None))._adapters(nothing))
    assert (one.name, one.lora_id, one.tier) == ("a", None, "disk")


def test_the_head_of_the_queue_is_told_in_its_order(facts: Any) -> None:
    from blocklora_patches.scheduler import control
    from sglang_blocklora.memory.accounting import SlotCounts
    from sglang_blocklora.memory.counts import AdapterCounts
    from sglang_blocklora.memory.durations import Durations
    from sglang_blocklora.reporting.facts import QUEUE_HEAD, queue_told

    images = SimpleNamespace(read_durations=Durations(), last_errors={}, in_host_memory=lambda key: True)
    adapter = SimpleNamespace(
        name="sql",
        path="/p",
        pinned=False,
        content_hash="c",
        slots=1,
        shard=SimpleNamespace(rank=4, nblocks=1, invocation=()),
    )
    pool = SimpleNamespace(
        loaded={"id": adapter},
        images=images,
        load_counts=AdapterCounts(),
        max_adapters_per_batch=4,
        is_resident=lambda key: False,
        slot_counts=lambda: SlotCounts(total=1, free=1, in_use=0, adapters={}, kv={}),
    )
    waiting = [SimpleNamespace(lora_id=key, origin_input_ids=[1] * n) for n, key in enumerate(["id", None, "gone"] * 5)]
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=SimpleNamespace(pool=pool, slot_bytes=1))),
        running_batch=None,
        last_batch=None,
        waiting_queue=waiting,
    )
    answer = SimpleNamespace(internal_state={})
    control._get_internal_state(answer, scheduler, None)
    told = queue_told(msgspec.convert(answer.internal_state[control.FACTS], Facts))
    assert told["head"][:3] == [
        {"adapter": "sql", "prompt_tokens": 0},
        {"adapter": None, "prompt_tokens": 1},
        {"adapter": "(unloaded)", "prompt_tokens": 2},
    ]
    assert len(told["head"]) == QUEUE_HEAD
    assert told["waiting"] == 10, "those of an adapter that is gone are nobody's"
