"""Adapters that a request loads by naming them, on the server at TP 2 that tests of the API share."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from blocklora_testing.case import ADMIN_KEY, NAMES, NEW_TOKENS, Case
from blocklora_testing.server import Server


@pytest.fixture
def put(api_server: Server, api_case: Case, api_folder: Path) -> Iterator[Callable[[str, str], Path]]:
    """``put(name, source)`` copies an adapter into the server's folder; at the end all is as before."""
    made = set()

    def copy(name: str, source: str) -> Path:
        made.add(name)
        return shutil.copytree(api_case.adapters[source], api_folder / name, dirs_exist_ok=True)

    yield copy
    for name in made:
        shutil.rmtree(api_folder / name)
        api_server.call("/v1/unload_lora_adapter", {"lora_name": name}, key=ADMIN_KEY)
    assert set(listed(api_server)) == set(NAMES)


@pytest.fixture
def client(api_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def listed(server: Server) -> dict[str, Any]:
    return {one["name"]: one for one in server.call("/adapters")[1]["data"]}


def loads(server: Server, name: str) -> int:
    """Times the HTTP process asked the schedulers to load ``name``."""
    return server.log_text().count(f"adapter {name!r}: loading it from ")


def test_many_requests_for_a_new_name_wait_for_one_load(
    api_server: Server, api_case: Case, client: openai.OpenAI, put: Callable[[str, str], Path]
) -> None:
    folder = put("fresh", "n8")
    assert listed(api_server)["fresh"]["tier"] == "disk"
    assert client.models.retrieve("fresh").model_dump()["parent"] == "llama"
    assert {model.id for model in client.models.list()} == {"llama", "fresh", *NAMES}
    asked = [(prompt, name) for prompt in api_case.prompts for name in ("fresh", "sql", None, "fresh")]
    sources = {"fresh": "n8", None: None, **NAMES}
    expected = [api_case.expected[sources[name]][api_case.prompts.index(prompt)] for prompt, name in asked]
    assert api_server.many(asked, NEW_TOKENS) == expected
    assert loads(api_server, "fresh") == 1
    found = listed(api_server)["fresh"]
    assert (found["tier"], found["path"]) == ("resident", str(folder))


def test_openai_and_the_frontend_language_load_too(
    api_server: Server, client: openai.OpenAI, put: Callable[[str, str], Path]
) -> None:
    put("one", "n8")
    put("two", "n2")
    put("three", "n2")
    assert client.responses.create(model="three", input="hello", max_output_tokens=8).output_text
    texts = [
        client.completions.create(model=model, prompt="hello", max_tokens=8, temperature=0).choices[0].text
        for model in ("llama:one", "one", "llama")
    ]
    assert texts[0] == texts[1] != texts[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from sglang_blocklora import frontend as sgl

    @sgl.function
    def program(s):
        s += "hello" + sgl.gen("two", adapter="two")

    found = program.run(backend=sgl.RuntimeEndpoint(api_server.url), temperature=0, max_new_tokens=8)["two"]
    body = {"text": "hello", "lora_path": "sql", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    assert found == api_server.call("/generate", body)[1]["text"], "the same weights as sql"
    assert [loads(api_server, name) for name in ("one", "two", "three")] == [1, 1, 1]


def test_a_broken_adapter_is_a_400_until_it_is_repaired(
    api_server: Server, api_case: Case, client: openai.OpenAI, put: Callable[[str, str], Path]
) -> None:
    config = put("broken", "n4") / "adapter_config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | {"use_dora": True}))

    def ask(_: int) -> str:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="broken", prompt="hello", max_tokens=2)
        return refused.value.message

    with ThreadPoolExecutor(6) as pool:
        messages = set(pool.map(ask, range(6)))
    assert all("DoRA" in message and "broken" in message for message in messages)
    assert "DoRA" in listed(api_server)["broken"]["last_error"]
    status, answer = api_server.call("/generate", {"text": "x", "lora_path": "broken"})
    assert (status, "DoRA" in str(answer)) == (400, True)
    assert api_server.tokens(api_case.prompts[0], "sql", NEW_TOKENS) == api_case.expected[NAMES["sql"]][0]
    config.write_text(good)
    assert api_server.tokens(api_case.prompts[0], "broken", NEW_TOKENS) == api_case.expected["n4"][0]
    assert listed(api_server)["broken"]["last_error"] is None


def test_names_that_are_nowhere_are_refused_with_the_known_ones(
    api_server: Server, api_case: Case, client: openai.OpenAI, api_folder: Path
) -> None:
    outside = api_case.adapters["n8"]
    for name in ("nobody", f"../{outside.parent.name}/{outside.name}", str(outside), "n8\0"):
        with pytest.raises(openai.NotFoundError, match="legal, sql, support") as refused:
            client.completions.create(model=name, prompt="hello", max_tokens=2)
        assert f"folders below {api_folder}" in refused.value.message
        status, answer = api_server.call("/generate", {"text": "x", "lora_path": name})
        assert status == 400
        assert "legal, sql, support" in str(answer)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_adapter_that_was_unloaded_is_loaded_again_with_what_its_folder_holds_now(
    api_server: Server, api_case: Case, put: Callable[[str, str], Path]
) -> None:
    for source in ("n8", "n4"):
        put("changed", source)
        assert api_server.tokens(api_case.prompts[0], "changed", NEW_TOKENS) == api_case.expected[source][0]
        assert api_server.call("/v1/unload_lora_adapter", {"lora_name": "changed"}, key=ADMIN_KEY)[0] == 200


def test_an_unload_waits_for_its_own_stream_and_nobody_waits_for_it(
    api_server: Server, api_case: Case, put: Callable[[str, str], Path]
) -> None:
    """Other adapters load, unload, pin and answer meanwhile, and the name is free for other weights."""
    path = str(put("busy", "n8"))
    prompt, expected = api_case.prompts[0], api_case.expected

    def call(route: str, **body: Any) -> tuple[int, Any]:
        return api_server.call(route, body, key=ADMIN_KEY)

    def unload(name: str) -> int:
        return call("/v1/unload_lora_adapter", lora_name=name)[0]

    assert api_server.tokens(prompt, "busy", NEW_TOKENS) == expected["n8"][0]
    with ThreadPoolExecutor(3) as pool:
        stream = pool.submit(api_server.tokens, prompt, "busy", 400)
        wait_for(lambda: listed(api_server)["busy"]["running"] == 1)
        leaving = pool.submit(unload, "busy")
        wait_for(lambda: not listed(api_server).get("busy", {}).get("lora_id"))
        assert call("/v1/load_lora_adapter", lora_name="other", lora_path=path)[0] == 200
        assert call("/adapters/sql/pin")[0] == 200
        assert call("/adapters/sql/unpin")[0] == 200
        assert api_server.tokens(prompt, "other", NEW_TOKENS) == expected["n8"][0]
        assert unload("other") == 200
        put("busy", "n2")
        assert api_server.tokens(prompt, "busy", NEW_TOKENS) == expected["n2"][0], "loaded anew for this request"
        assert not stream.done()
        assert not leaving.done()
        assert stream.result()[:NEW_TOKENS] == expected["n8"][0]
        assert leaving.result() == 200


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_server_replaces_an_adapter(
    api_server: Server, api_case: Case, put: Callable[[str, str], Path], mode: str
) -> None:
    """The order of trainers: pause, unload, load, continue. A stream that was paused ends with the old weights."""
    put("policy", "n8")
    prompt, expected = api_case.prompts[0], api_case.expected

    def call(route: str, **body: Any) -> int:
        return api_server.call(route, body, timeout=60, key=ADMIN_KEY)[0]

    assert api_server.tokens(prompt, "policy", NEW_TOKENS) == expected["n8"][0]
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(api_server.tokens, prompt, "policy", 300)
        wait_for(lambda: listed(api_server)["policy"]["running"] == 1)
        assert call("/pause_generation", mode=mode) == 200
        try:
            assert call("/v1/unload_lora_adapter", lora_name="policy") == 200
            new = str(api_case.adapters["n2"])
            assert call("/v1/load_lora_adapter", lora_name="policy", lora_path=new) == 200
            assert not stream.done()
        finally:
            assert call("/continue_generation") == 200
        assert api_server.tokens(prompt, "policy", NEW_TOKENS) == expected["n2"][0]
        assert stream.result()[:NEW_TOKENS] == expected["n8"][0]


def test_names_that_no_request_could_reach_are_refused(
    api_server: Server, api_case: Case, client: openai.OpenAI
) -> None:
    path = str(api_case.adapters["n8"])
    for name in ("llama", "default", "", "llama:sql", "default:x", "s\0ql"):
        for route in ("/load_lora_adapter", "/v1/load_lora_adapter"):
            status, answer = api_server.call(route, {"lora_name": name, "lora_path": path}, key=ADMIN_KEY)
            assert (status, "Pick another" in str(answer)) == (400, True), name
    for model, source in (("llama", None), ("default", None), ("llama:sql", NAMES["sql"])):
        answer = client.completions.create(
            model=model,
            prompt=api_case.prompts[0],
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert answer.usage is not None
        body = {"input_ids": api_case.prompts[0], "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
        adapter = None if source is None else "sql"
        assert api_server.call("/generate", body | {"lora_path": adapter})[1]["text"] == answer.choices[0].text
    assert {model.id for model in client.models.list()} == {"llama", *NAMES}


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask until it holds; a test that never sees it ends with the runner's limit."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never held")
