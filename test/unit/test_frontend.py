"""The frontend language against a server that answers every call with the adapter it was asked for."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ADAPTERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def sgl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from sglang_blocklora import frontend
    return frontend


class Endpoint:
    """A server that keeps the requests it gets and answers with ``<adapter>``, or base."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.looked_up = 0
        self.adapter_names = list(ADAPTERS)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    outer.looked_up += 1
                    cards = [
                        {"id": "base", "parent": None},
                        *({"id": name, "parent": "base"} for name in outer.adapter_names),
                    ]
                    self.reply({"object": "list", "data": [card | {"object": "model"} for card in cards]})
                else:
                    self.reply({"model_path": "base"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"path": self.path})
                asked = body.get("lora_path") or body.get("model")
                if asked not in (None, "base", *outer.adapter_names):
                    self.reply({"error": {"message": "no such adapter"}}, status=404)
                    return
                if self.path != "/generate":
                    answer: Any = self.completion(body)
                elif isinstance(body.get("text"), list):
                    answer = [self.choice(text, body.get("lora_path")) for text in body["text"]]
                else:
                    n = body["sampling_params"].get("n", 1)
                    one = {"text": f"<{body.get('lora_path') or 'base'}>", "meta_info": {"prompt_tokens": 3}}
                    answer = [one] * n if n > 1 else one  # as SGLang answers
                self.reply(answer, stream=body.get("stream", False))

            def choice(self, text: str, adapter: str | None) -> dict:
                """The choice that names the request's adapter is the likeliest."""
                logprob = -1.0 if text.endswith(adapter or "base") else -5.0
                return {"meta_info": {"input_token_logprobs": [[logprob, 1, "?"]] * 2, "output_token_logprobs": []}}

            def completion(self, body: dict) -> dict:
                text = f"<{body['model']}>"
                part = {"index": 0, "finish_reason": "stop"}
                part |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
                if body.get("stream"):
                    part["delta"] = {"content": text}
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                return {"id": "1", "object": "x", "created": 1, "model": "m", "choices": [part], "usage": usage}

            def reply(self, answer: Any, stream: bool = False, status: int = 200) -> None:
                data = json.dumps(answer)
                payload = f"data: {data}\n\ndata: [DONE]\n\n" if stream else data
                self.send_response(status)
                self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
                self.end_headers()
                self.wfile.write(payload.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def adapters(self) -> list[str | None]:
        return [request.get("lora_path") for request in self.requests]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def backend(sgl: Any, endpoint: Endpoint) -> Any:
    return sgl.RuntimeEndpoint(endpoint.url)


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


def test_streaming(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += sgl.gen("first") + sgl.gen("second", adapter="b")

    state = program.run(backend=backend, stream=True, adapter="a")
    assert "".join(state.text_iter()) == "<a><b>"
    state = program.run(backend=backend, stream=True)

    async def collect() -> str:
        return "".join([part async for part in state.text_async_iter()])

    assert asyncio.run(collect()) == "<base><b>"


def test_several_answers_and_constraints_reach_the_server(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    @sgl.function
    def program(s):
        s += sgl.gen("x", adapter="a", n=3, regex="[0-9]+", json_schema='{"type": "string"}')

    assert program.run(backend=backend)["x"] == ["<a>"] * 3
    sent = endpoint.requests[0]["sampling_params"]
    assert (sent["n"], sent["regex"], sent["json_schema"]) == (3, "[0-9]+", '{"type": "string"}')


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the program's own thread
def test_unknown_adapter_in_a_stream_raises_at_its_reader(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x", adapter="nobody")

    state = program.run(backend=backend, stream=True)
    with pytest.raises(sgl.UnknownAdapter):
        list(state.text_iter())


class LookedAt(threading.Event):
    """Lets its reader look before ``set`` returns: the worst that a scheduler of threads can do."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def clear(self) -> None:
        super().clear()
        self.looked.set()

    def set(self) -> None:
        self.looked.clear()
        super().set()
        self.looked.wait(0.2)


def test_a_stream_ends_however_quick_its_reader_is(sgl: Any, backend: Any) -> None:
    ready = threading.Event()

    @sgl.function
    def program(s):
        s.stream_executor.stream_text_event = LookedAt()
        ready.set()
        s += "x"

    state = program.run(backend=backend, stream=True)
    assert ready.wait(10)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(state.text_iter()), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    assert pieces == ["x"]


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the program's own thread
def test_several_answers_in_a_stream_are_refused_and_not_mixed(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x", adapter="a", n=2)

    for options in ({}, {"adapter": "b"}):
        with pytest.raises(sgl.SeveralAnswersInStream, match="n=2"):
            list(program.run(backend=backend, stream=True, **options).text_iter())
    assert endpoint.requests == []


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
    from blocklora_patches import lang

    assert sglang.gen is sgl.gen
    assert sglang.adapter is sgl.adapter
    assert not [hook.target for hook in lang.HOOKS if hook.target.startswith("sglang.srt.")]
