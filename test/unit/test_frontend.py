"""The frontend language against a server that answers every call with the adapter it was asked for."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blocklora_testing.endpoint import ADAPTERS, Endpoint


def test_each_call_names_its_adapter(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("plain")
        s += sgl.gen("own", adapter="a")
        with sgl.adapter("b"):
            s += sgl.gen_int("int")
            s += sgl.gen_string("string", adapter="c")
            s += sgl.gen("base", adapter=None)
            with sgl.adapter(None):
                s += sgl.gen("inner")
            s += sgl.gen("after", stop="\n", regex="[a-z]+")
        s += sgl.gen("last")

    state = program.run(backend=backend)
    found = {name: state[name] for name in ("plain", "own", "int", "string", "base", "inner", "after", "last")}
    assert found == {
        "plain": "<base>",
        "own": "<a>",
        "int": "<b>",
        "string": "<c>",
        "base": "<base>",
        "inner": "<base>",
        "after": "<b>",
        "last": "<base>",
    }


def test_run_gives_the_default_and_blocks_outside_do_not_override_it(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += sgl.gen("default") + sgl.gen("base", adapter=None) + sgl.gen("own", adapter="b")

    def answers(**options: Any) -> list[str]:
        state = program.run(backend=backend, **options)
        return [state["default"], state["base"], state["own"]]

    assert answers() == ["<base>", "<base>", "<b>"]
    assert answers(adapter="a") == ["<a>", "<base>", "<b>"]
    with sgl.adapter("c"):
        assert answers() == ["<c>", "<base>", "<b>"]
        assert answers(adapter="a") == ["<a>", "<base>", "<b>"]
        assert answers(adapter=None) == ["<base>", "<base>", "<b>"]
    assert answers() == ["<base>", "<base>", "<b>"]


def test_run_batch_and_its_shared_prefix_have_the_adapter(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    @sgl.function
    def program(s, question):
        s += "A prefix of more than sixty-four characters, which run_batch sends ahead once." + question + sgl.gen("x")

    states = program.run_batch([{"question": str(i)} for i in range(5)], backend=backend, adapter="a")
    assert [state["x"] for state in states] == ["<a>"] * 5
    assert endpoint.requests[0]["text"].endswith("once.")
    assert endpoint.adapters() == ["a"] * 6


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_lazy_batch_has_the_adapter_it_was_called_with(sgl: Any, backend: Any, num_threads: int) -> None:
    @sgl.function
    def program(s, question):
        s += question + sgl.gen("x")

    def lazy(**options: Any) -> Any:
        arguments = [{"question": str(i)} for i in range(3)]
        return program.run_batch(arguments, backend=backend, num_threads=num_threads, generator_style=True, **options)

    with sgl.adapter("b"):
        from_block = lazy()
    with sgl.adapter("c"):
        assert [state["x"] for state in lazy(adapter="a")] == ["<a>"] * 3
        assert [state["x"] for state in from_block] == ["<b>"] * 3


def test_a_programs_own_parameter_called_adapter_stays_its_own(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s, adapter):
        s += sgl.gen("x", adapter=adapter)

    assert program.run(adapter="b", backend=backend)["x"] == "<b>"


def test_fork_with_an_adapter_per_branch(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "question"
        forks = s.fork(3)
        for fork, name in zip(forks, ADAPTERS, strict=True):
            fork += sgl.gen("own", adapter=name) + sgl.gen("default")
        forks.join()

    state = program.run(backend=backend, adapter="c")
    assert state["own"] == ["<a>", "<b>", "<c>"]
    assert state["default"] == ["<c>"] * 3


def test_what_is_before_a_fork_is_sent_once_for_all_branches(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    """Under the program's adapter, however late the text is written by the program's thread."""

    @sgl.function
    def program(s):
        for piece in ["a long", " context"] * 20:
            s += piece
        forks = s.fork(2)
        for fork, name in zip(forks, ("b", "c"), strict=True):
            fork += sgl.gen("x", adapter=name)
        forks.join()

    for _ in range(10):
        endpoint.requests.clear()
        program.run(backend=backend, adapter="a")
        first, *others = endpoint.requests
        assert (first["text"], first["lora_path"]) == ("a long context" * 20, "a")
        assert first["sampling_params"]["max_new_tokens"] == 0
        assert {one["lora_path"] for one in others} == {"b", "c"}


def test_several_answers_and_constraints_reach_the_server(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    @sgl.function
    def program(s):
        s += sgl.gen("x", adapter="a", n=3, regex="[0-9]+", json_schema='{"type": "string"}')

    assert program.run(backend=backend)["x"] == ["<a>"] * 3
    sent = endpoint.requests[0]["sampling_params"]
    assert (sent["n"], sent["regex"], sent["json_schema"]) == (3, "[0-9]+", '{"type": "string"}')


def facts(text: str | None, *tokens: int, lora_id: str | None = "1") -> dict[str, Any]:
    return {"lora_id": lora_id, "invocation": list(tokens), "invocation_text": text}


def test_a_call_writes_the_invocation_where_its_adapter_has_one(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    endpoint.facts = {"a": facts("<A>", 3), "b": facts("\nB:", 4, 5), "c": facts(None)}

    @sgl.function
    def program(s):
        s += "x" + sgl.gen("a", adapter="a", invoke=True) + sgl.gen("again", adapter="a")
        with sgl.adapter("b"):
            s += sgl.select("select", choices=["base", "b"], invoke=True) + sgl.gen_int("int", invoke=True)
        s += sgl.gen("plain", adapter="c", invoke=True) + sgl.gen("base", adapter=None, invoke=True)
        s += sgl.gen("default", invoke=True)

    for stream in (False, True):
        state = program.run(backend=backend, adapter="a", stream=stream)
        assert state.text() == "x<A><a><a>\nB:b\nB:<b><c><base><A><a>"
    assert endpoint.looked_up == 4, "each adapter once, and once the names that there are"


@pytest.mark.filterwarnings("ignore:Error in stream_executor")  # upstream's word on it
def test_an_invocation_that_cannot_be_had_raises_where_the_answer_is_read(
    sgl: Any, backend: Any, openai_backend: Any, endpoint: Endpoint
) -> None:
    endpoint.facts = {"b": facts(None, 200)}

    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x", invoke=True)

    cases = (
        ("a", backend, "RuntimeEndpoint does not tell what activates"),  # SGLang's own server
        ("b", backend, r"activated by tokens \[200\], and no text gives those"),
        ("c", openai_backend(is_chat_model=False), "OpenAI does not tell what activates"),
    )
    for adapter, one, message in cases:
        with pytest.raises(sgl.InvocationUnknown, match=f"{adapter!r}, invoke=True: .*{message}"):
            program.run(backend=one, adapter=adapter)["x"]
    assert endpoint.requests == []


@pytest.mark.parametrize("form", ["select", "choices"])
def test_select_scores_with_the_adapter(sgl: Any, backend: Any, endpoint: Endpoint, form: str) -> None:
    @sgl.function
    def program(s):
        ask = sgl.select if form == "select" else sgl.gen
        s += "which? " + ask("x", choices=["base", "a", "b"], adapter="b")

    assert program.run(backend=backend)["x"] == "b"
    assert endpoint.adapters() == ["b", "b"]


def test_unknown_adapter_raises_where_it_is_named_with_the_known_names(
    sgl: Any, backend: Any, endpoint: Endpoint
) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.user("hello" + sgl.gen("x", adapter="nobody"))

    with pytest.raises(sgl.UnknownAdapter, match=r"'nobody' is not loaded at http.*Loaded: a, b, c\."):
        program.run(backend=backend)
    with pytest.raises(sgl.UnknownAdapter):
        program.run_batch([{}, {}], backend=backend, adapter="nobody")
    assert endpoint.requests == []


@pytest.mark.filterwarnings("ignore:Error in stream_executor")  # upstream's word on it
def test_an_adapter_that_was_unloaded_meanwhile_raises_where_its_answer_is_read(
    sgl: Any, backend: Any, openai_backend: Any, endpoint: Endpoint
) -> None:
    @sgl.function
    def program(s, name):
        s += "x" + sgl.gen("x", adapter=name)

    backends = [backend, openai_backend(is_chat_model=False)]
    for one in backends:
        program.run(name="a", backend=one)
    endpoint.adapter_names.remove("a")
    for one in backends:
        with pytest.raises(sgl.UnknownAdapter, match=r"Loaded: b, c\."):
            program.run(name="a", backend=one)["x"]
        assert program.run(name="b", backend=one)["x"] == "<b>"


def test_images_travel_unchanged_beside_the_adapter(
    sgl: Any, backend: Any, openai_backend: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(bytes(range(256)))

    @sgl.function
    def ask(s, adapter):
        s += sgl.image(str(picture)) + "What is this?" + sgl.gen("x", adapter=adapter)
        s += sgl.select("y", choices=["base", "a"], adapter=adapter)

    assert ask.run(adapter=None, backend=backend).text() == "<image>What is this?<base>base"
    without = list(endpoint.requests)
    endpoint.requests.clear()
    state = ask.run(adapter="a", backend=backend)
    assert (state["x"], state["y"]) == ("<a>", "a")
    assert endpoint.adapters() == ["a"] * 3  # gen, and select's prefix and scores
    images = [base64.b64decode(request["image_data"]) for request in endpoint.requests]
    assert images == [picture.read_bytes()] * 3
    assert endpoint.requests[0] == without[0] | {"lora_path": "a"}
    assert "".join(ask.run(adapter="b", backend=backend, stream=True).text_iter()).startswith("<image>What is this?<b>")
    assert endpoint.requests[3]["image_data"] == endpoint.requests[0]["image_data"]

    @sgl.function
    def chat(s, adapter):
        s += sgl.user(sgl.image(str(picture)) + "What is this?")
        s += sgl.assistant(sgl.gen("x", adapter=adapter))

    endpoint.requests.clear()
    for adapter in (None, "a"):
        assert chat.run(adapter=adapter, backend=openai_backend(is_chat_model=True)).text()
    plain, adapted = endpoint.requests
    assert adapted == plain | {"model": "a"}
    url = adapted["messages"][-1]["content"][1]["image_url"]["url"]
    assert base64.b64decode(url.split(",")[1]) == picture.read_bytes()


def test_adapters_loaded_later_are_found_and_known_ones_are_looked_up_once(
    sgl: Any, backend: Any, endpoint: Endpoint
) -> None:
    @sgl.function
    def program(s, name):
        s += sgl.gen("x", adapter=name)

    for name in ("a", "b", "a"):
        program.run(name=name, backend=backend)
    assert endpoint.looked_up == 1
    endpoint.adapter_names.append("new")
    assert program.run(name="new", backend=backend)["x"] == "<new>"
    assert endpoint.looked_up == 2


@pytest.mark.parametrize(
    ("module", "name"), [("anthropic", "Anthropic"), ("vertexai", "VertexAI"), ("litellm", "LiteLLM")]
)
def test_upstreams_backends_for_other_services_refuse_adapters(sgl: Any, module: str, name: str) -> None:
    """Made without their clients, which are not installed: the adapter is refused before one would be called."""
    backend_class = getattr(importlib.import_module(f"sglang.lang.backend.{module}"), name)
    backend = object.__new__(backend_class)
    super(backend_class, backend).__init__()

    @sgl.function
    def program(s):
        s += sgl.user("hello")
        s += sgl.assistant(sgl.gen("x", adapter="a"))

    with pytest.raises(sgl.AdaptersNotSupported, match=f"{name} cannot choose an adapter"):
        program.run(backend=backend)


def test_a_backend_that_cannot_choose_raises_and_still_answers_for_the_base_model(sgl: Any) -> None:
    from sglang.lang.backend.base_backend import BaseBackend

    class Other(BaseBackend):
        def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict]:
            return "other", {}

    @sgl.function
    def program(s, name):
        s += sgl.gen("x", adapter=name)

    with pytest.raises(sgl.AdaptersNotSupported, match="Other cannot choose an adapter"):
        program.run(name="a", backend=Other())
    with pytest.raises(sgl.AdaptersNotSupported):
        program.run(name=None, adapter="a", backend=Other())
    assert program.run(name=None, backend=Other())["x"] == "other"


@pytest.fixture
def openai_backend(sgl: Any, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import tiktoken

    # The vocabulary is a download; the backend reads it for select and for integers only.
    stub = SimpleNamespace(_mergeable_ranks={}, _special_tokens={"<|endoftext|>": 0})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stub)

    made = []

    def make(**options: Any) -> Any:
        made.append(sgl.OpenAI("base", base_url=f"{endpoint.url}/v1", api_key="none", **options))
        return made[-1]

    yield make
    for backend in made:
        backend.client.close()


def test_openai_completions_send_the_adapter_as_model(sgl: Any, openai_backend: Any, endpoint: Endpoint) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("base") + sgl.gen("a", adapter="a") + sgl.gen("again")

    backend = openai_backend(is_chat_model=False)
    state = program.run(backend=backend)
    assert [state[name] for name in ("base", "a", "again")] == ["<base>", "<a>", "<base>"]
    assert program.run(backend=backend, adapter="b").text() == "x<b><a><b>"
    assert backend.token_usage.completion_tokens == 6
    with pytest.raises(sgl.UnknownAdapter, match="a, b, c"):
        program.run(backend=backend, adapter="nobody")


@pytest.mark.filterwarnings("ignore:The parameter max_tokens")  # upstream's word on every speculative call
def test_openai_chat_streams_and_speculates(sgl: Any, openai_backend: Any) -> None:
    @sgl.function
    def chat(s):
        s += sgl.user("hello")
        s += sgl.assistant(sgl.gen("x", adapter="a"))

    backend = openai_backend(is_chat_model=True)
    assert chat.run(backend=backend)["x"] == "<a>"
    assert "<a>" in "".join(chat.run(backend=backend, stream=True).text_iter())

    @sgl.function(num_api_spec_tokens=8)
    def speculative(s, name):
        s += sgl.user("hello")
        s += sgl.assistant(sgl.gen("x", stop="\n", adapter=name))

    for adapter in ("b", "c"):
        assert speculative.run(name=adapter, adapter=adapter, backend=backend)["x"] == f"<{adapter}>"
    with pytest.raises(sgl.AdaptersNotSupported, match="one adapter"):
        speculative.run(name="a", adapter="b", backend=backend)


def test_the_language_alone_is_patched(sgl: Any) -> None:
    """No server hook in a user's process, and importing sglang gives the same functions."""
    import sglang
    from blocklora_patches.language import activate as lang

    assert sglang.gen is sgl.gen
    assert sglang.adapter is sgl.adapter
    assert not [hook.target for hook in lang.hooks() if hook.target.startswith("sglang.srt.")]
