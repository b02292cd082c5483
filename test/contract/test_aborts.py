"""Aborts over SGLang's real request handling: a request is all of its parts."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest
from blocklora_testing.http_process import HTTPProcess


def post(process: HTTPProcess, path: str, body: dict[str, Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(process.client.post(path, json=body))


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def generate(**fields: Any) -> dict[str, Any]:
    return {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 4}} | fields


# Kind of request -> its body, and the prompts of it that want tokens.
KINDS = {
    "one": (generate(rid="r"), 1),
    "n": (generate(rid="r", sampling_params={"max_new_tokens": 4, "n": 3}), 3),
    "batch": (generate(rid="r", input_ids=[[5], [6]]), 2),
    "batch of texts": ({"rid": "r", "text": ["a", "b"], "sampling_params": {"max_new_tokens": 4}}, 2),
    "batch, n": (generate(rid="r", input_ids=[[5], [6]], sampling_params={"max_new_tokens": 4, "n": 2}), 4),
    "n by its id in a list": (
        generate(rid=["r"], input_ids=[[5]], sampling_params={"max_new_tokens": 4, "n": 3}),
        3,
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_all_parts_end_and_nothing_else_does(process: HTTPProcess, kind: str, stream: bool) -> None:
    body, parts = KINDS[kind]
    scheduler = process.scheduler

    def wanting() -> list[Any]:
        return [request for request in scheduler.requests() if request.sampling_params.max_new_tokens]

    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.holds = True
            other = post(process, "/generate", generate(rid="rr", sampling_params={"max_new_tokens": 4, "n": 2}))
            await until(lambda: len(wanting()) == 2)
            asked = post(process, "/generate", body | {"stream": stream})
            await until(lambda: len(wanting()) == 2 + parts)
            assert (await process.client.post("/abort_request", json={"rid": "r"})).status_code == 200
            answer = await asyncio.wait_for(asked, 60)
            assert answer.status_code == 200
            assert answer.text.count('"type":"abort"') == parts
            assert not other.done()
            assert len(process.manager.rid_to_state) == 2
            await process.client.post("/abort_request", json={"rid": "rr"})
            await asyncio.wait_for(other, 60)

    process.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_is_aborted_before_it_is_sent_is_not_sent(process: HTTPProcess, kind: str) -> None:
    """While it waits for its adapter or for the end of a pause."""

    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process.manager.is_pause = True
            asked = post(process, "/generate", KINDS[kind][0])
            await until(lambda: process.manager.rid_to_state)
            assert (await process.client.post("/abort_request", json={"rid": "r"})).status_code == 200
            process.manager.is_pause = False
            async with process.manager.is_pause_cond:
                process.manager.is_pause_cond.notify_all()
            answer = await asyncio.wait_for(asked, 60)
            assert answer.status_code == 400
            assert "'r' was aborted" in answer.text

    process.run(main())
    assert process.scheduler.requests() == []


def test_an_abort_between_the_parts_leaves_the_rest_unsent(process: HTTPProcess) -> None:
    """The common prefix of n answers is computed first, as a request of its own."""

    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asked = post(process, "/generate", KINDS["n"][0])
            await until(process.scheduler.requests)
            process.manager.abort_request("r")
            answer = await asyncio.wait_for(asked, 60)
            assert answer.status_code == 400
            assert "'r' was aborted" in answer.text

    process.run(main())
    assert [request.sampling_params.max_new_tokens for request in process.scheduler.requests()] == [0]


def test_an_id_that_nobody_has_aborts_nothing(process: HTTPProcess) -> None:
    for body in ({"rid": "nobody"}, {"rid": ""}, {"rid": "r"}):
        assert process.call("/abort_request", body)[0] == 200
    assert process.scheduler.received == []
