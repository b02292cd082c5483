"""Every route that takes a model, over SGLang's real application: the name is resolved, or refused, never ignored."""

from __future__ import annotations

import typing
import warnings

import msgspec
import pytest
from blocklora_testing.bodies import BASE_ONLY, EMBEDDING, RESOLVES, SAME_FOR_ALL
from blocklora_testing.http_process import HTTPProcess

BASE, ADAPTER = "llama", "sql"


def ask(process: HTTPProcess, path: str, model: str) -> tuple[int, str]:
    """Status and text of an answer."""
    body = {**RESOLVES, **SAME_FOR_ALL, **BASE_ONLY, **EMBEDDING}[path] | {"model": model}
    if path != "/v1/audio/transcriptions":
        status, answer = process.call(path, body)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form = process.client.post(path, data=body, files={"file": ("a.wav", b"no sound")})
            answer = process.run(form)
        status, answer = answer.status_code, answer.text
    return status, answer if isinstance(answer, str) else msgspec.json.encode(answer).decode()


def adapter_id(process: HTTPProcess) -> str:
    return process.manager.lora_registry.get_all_adapters()[ADAPTER].lora_id


@pytest.mark.parametrize("path", [*RESOLVES, *SAME_FOR_ALL, *BASE_ONLY, *EMBEDDING])
@pytest.mark.parametrize("model", ["nobody", f"{BASE}:nobody", "SQL", f"{ADAPTER}:{BASE}", " "])
def test_an_unknown_model_is_a_404_that_lists_the_known_ones(process: HTTPProcess, path: str, model: str) -> None:
    status, text = ask(process, path, model)
    assert status == 404, text
    assert model in text
    assert ADAPTER in text
    assert BASE in text
    assert process.scheduler.requests() == []


@pytest.mark.parametrize("path", RESOLVES)
@pytest.mark.parametrize("model", [BASE, ADAPTER, f"{BASE}:{ADAPTER}"])
def test_a_model_is_answered_by_whom_it_names(process: HTTPProcess, path: str, model: str) -> None:
    status, text = ask(process, path, model)
    assert status == 200, text
    wanted = None if model == BASE else adapter_id(process)
    assert {request.lora_id for request in process.scheduler.requests()} == {wanted}


@pytest.mark.parametrize("path", SAME_FOR_ALL)
def test_known_models_have_one_tokenizer(process: HTTPProcess, path: str) -> None:
    answers = {model: ask(process, path, model) for model in (BASE, ADAPTER)}
    assert {status for status, _ in answers.values()} == {200}
    if path != "/api/show":
        assert answers[BASE] == answers[ADAPTER]


@pytest.mark.parametrize("path", BASE_ONLY)
def test_an_adapter_is_refused_where_the_base_model_answers_alone(process: HTTPProcess, path: str) -> None:
    status, text = ask(process, path, ADAPTER)
    assert status == 400, text
    assert f"answered by the base model only, not by the adapter '{ADAPTER}'" in text
    assert process.scheduler.requests() == []
    assert "base model only" not in ask(process, path, BASE)[1]


def test_an_embedding_of_an_adapter_is_asked_for_under_its_name(process: HTTPProcess) -> None:
    """This model makes none, which is told only once the adapter was found."""
    for model in (BASE, ADAPTER):
        status, text = ask(process, "/v1/embeddings", model)
        assert status == 400
        assert "does not appear to be an embedding model" in text


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_streams_and_names_with_its_tag(process: HTTPProcess, path: str) -> None:
    for model, wanted in ((f"{ADAPTER}:latest", adapter_id(process)), (f"{BASE}:latest", None)):
        process.scheduler.received.clear()
        status, text = process.call(path, RESOLVES[path] | {"model": model, "stream": True})
        assert status == 200
        lines = [msgspec.json.decode(line) for line in text.splitlines()]
        assert lines[-1]["done"]
        assert {line["model"] for line in lines} == {ADAPTER if wanted else BASE}
        assert [request.lora_id for request in process.scheduler.requests()] == [wanted]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_is_told_of_bad_options(process: HTTPProcess, path: str) -> None:
    body = RESOLVES[path] | {"model": BASE, "options": {"num_predict": 2.5}}
    status, answer = process.call(path, body)
    assert status == 400
    assert "max_new_tokens is 2.5" in answer["error"]
    status, text = process.call(path, body | {"stream": True})
    assert status == 200
    assert "max_new_tokens is 2.5" in msgspec.json.decode(text.splitlines()[-1])["error"]


def test_ollama_is_told_of_a_chat_that_cannot_be(process: HTTPProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """No message, or one that the model's template refuses; both were internal errors."""
    body = RESOLVES["/api/chat"] | {"model": BASE}
    assert process.call("/api/chat", body | {"messages": []}) == (400, {"error": "messages is empty"})
    monkeypatch.setattr(process.manager.tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    assert process.call("/api/chat", body) == (400, {"error": "no such role"})


def test_ollama_lists_adapters(process: HTTPProcess) -> None:
    models = process.call("/api/tags")[1]["models"]
    assert [model["name"] for model in models] == [BASE, ADAPTER]
    assert process.call("/api/show", {"model": f"{ADAPTER}:latest"})[0] == 200


def test_every_route_that_takes_a_model_is_known(process: HTTPProcess) -> None:
    """A route that a release of SGLang adds is noticed here."""
    known = {*RESOLVES, *SAME_FOR_ALL, *BASE_ONLY, *EMBEDDING, "/v1/models/{model:path}"}
    found = set()
    for route in process.app.routes:
        endpoint = getattr(route, "endpoint", None)
        hints = typing.get_type_hints(endpoint) if endpoint else {}
        kinds = [kind for hint in hints.values() for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
        if "model" in hints or any("model" in getattr(kind, "__annotations__", {}) for kind in kinds):
            found.add(route.path)
    assert found == known
