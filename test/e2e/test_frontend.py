"""``sgl.function`` programs, the examples and the code in the docs, against a server at TP 2.

Expected texts come from plain HTTP requests to ``/generate`` that name the adapter; test_serving.py compares those with
PEFT.
"""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from blocklora_testing.case import NAMES
from blocklora_testing.server import Server

REPOSITORY = Path(__file__).parents[2]
GREEDY = {"temperature": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def server(api_server: Server) -> Server:
    return api_server


@pytest.fixture(scope="module")
def sgl(server: Server) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from sglang_blocklora import frontend
    return frontend


@pytest.fixture
def backend(sgl: Any, server: Server) -> Any:
    return sgl.RuntimeEndpoint(server.url)


def direct(server: Server, text: str, adapter: str | None, **sampling: Any) -> dict:
    body = {"text": text, "lora_path": adapter, "sampling_params": GREEDY | sampling}
    status, answer = server.call("/generate", body)
    assert status == 200, answer
    return answer


def test_calls_blocks_and_defaults_answer_as_their_adapters(server: Server, sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "hello" + sgl.gen("default")
        s += sgl.gen("sql", adapter="sql")
        with sgl.adapter("support"):
            s += sgl.gen("support")
            s += sgl.gen("base", adapter=None)

    state = program.run(backend=backend, adapter="legal", **GREEDY)
    text = "hello"
    for name, adapter in (("default", "legal"), ("sql", "sql"), ("support", "support"), ("base", None)):
        expected = direct(server, text, adapter)["text"]
        assert state[name] == expected, name
        text += expected
    assert state.text() == text
    assert len({direct(server, "hello", adapter)["text"] for adapter in (*NAMES, None)}) == 4


def test_fork_batch_and_stream(server: Server, sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s, question):
        s += question
        branches = s.fork(4)
        for branch, adapter in zip(branches, (*NAMES, None), strict=True):
            branch += sgl.gen("answer", adapter=adapter)
        branches.join()

    questions = ["one?", "two?", "three?"]
    states = program.run_batch([{"question": q} for q in questions], backend=backend, **GREEDY)
    for question, state in zip(questions, states, strict=True):
        assert state["answer"] == [direct(server, question, adapter)["text"] for adapter in (*NAMES, None)]

    @sgl.function
    def streamed(s):
        s += "hello" + sgl.gen("x", adapter="sql")

    states = streamed.run_batch([{}] * 3, backend=backend, adapter="legal", **GREEDY)
    assert [state["x"] for state in states] == [direct(server, "hello", "sql")["text"]] * 3
    state = streamed.run(backend=backend, stream=True, **GREEDY)
    assert "".join(state.text_iter()) == "hello" + direct(server, "hello", "sql")["text"]


def test_constraints_and_several_answers(server: Server, sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "number: " + sgl.gen("regex", max_tokens=4, regex="[0-9]{4}", adapter="sql")
        s += sgl.gen(
            "json", max_tokens=1, json_schema='{"type": "integer", "minimum": 1, "maximum": 9}', adapter="support"
        )
        s += " " + sgl.gen_int("int", max_tokens=4, adapter="legal")
        s += sgl.gen_string("string", max_tokens=4, adapter="support")
        s += sgl.gen("several", n=3, adapter="sql")

    state = program.run(backend=backend, **GREEDY)
    assert re.fullmatch("[0-9]{4}", state["regex"])
    assert state["regex"] == direct(server, "number: ", "sql", regex="[0-9]{4}", max_new_tokens=4)["text"]
    assert 1 <= int(state["json"]) <= 9
    assert re.fullmatch(r"[-+]?[0-9]+[ \n]*", state["int"])
    assert re.fullmatch(r'"[^"]*"?', state["string"])
    assert len(state["several"]) == 3
    assert len(set(state["several"])) == 1, "greedy answers of one adapter are equal"


def test_select_scores_under_the_adapter(server: Server, sgl: Any, backend: Any) -> None:
    """The winner is the choice whose tokens that adapter finds likeliest, by its own input logprobs."""
    choices = ["alpha", "omega", "delta", "kappa"]

    @sgl.function
    def program(s, adapter):
        s += "pick: " + sgl.select("x", choices=choices, adapter=adapter)

    winners = set()
    for adapter in (*NAMES, None):
        scores = []
        for choice in choices:
            body = {
                "text": "pick: " + choice,
                "lora_path": adapter,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": len("pick: ") - 1,  # one token a byte
            }
            logprobs = [one[0] for one in server.call("/generate", body)[1]["meta_info"]["input_token_logprobs"]]
            scores.append(sum(logprobs[-len(choice) :]) / len(choice))
        found = program.run(adapter=adapter, backend=backend)["x"]
        assert found == choices[scores.index(max(scores))], adapter
        winners.add(found)
    assert len(winners) > 1, "every adapter picks the same: the test shows nothing"


def test_prefixes_are_shared_with_the_same_adapter_and_with_no_other(sgl: Any, backend: Any) -> None:
    prompt = "a prompt of some length that nobody else sends"

    def gen(name: str, adapter: str | None) -> Any:
        # ASCII: text that is no valid UTF-8 would not come back as the same tokens.
        return sgl.gen(name, regex="[a-z]{8}", adapter=adapter)

    @sgl.function
    def program(s):
        s += prompt + gen("first", "sql") + gen("same", "sql") + gen("other", "support")
        s += gen("base", None) + gen("back", "sql")

    state = program.run(backend=backend, **GREEDY)
    cached = {name: state.get_meta_info(name)["cached_tokens"] for name in ("first", "same", "other", "base", "back")}
    assert cached["first"] == cached["other"] == cached["base"] == 0
    # One token a byte; the last generated token's KV is not computed when a request ends.
    assert cached["same"] >= len(prompt) + GREEDY["max_new_tokens"] - 1
    assert cached["back"] >= cached["same"] + GREEDY["max_new_tokens"] - 1


def test_an_image_reaches_the_server_beside_the_adapter(server: Server, sgl: Any, backend: Any, tmp_path: Path) -> None:
    """No vision model is served: the server takes the picture, looks at the text only and answers as the adapter."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(bytes(range(256)))

    @sgl.function
    def program(s, adapter):
        s += sgl.image(str(picture)) + "What is this?" + sgl.gen("x", adapter=adapter)

    for adapter in (*NAMES, None):
        state = program.run(adapter=adapter, backend=backend, **GREEDY)
        assert state["x"] == direct(server, "<image>What is this?", adapter)["text"]


def test_unknown_adapter_names_the_known_ones(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x", adapter="nobody")

    with pytest.raises(sgl.UnknownAdapter, match="legal, sql, support"):
        program.run(backend=backend)


@pytest.mark.parametrize("chat", [False, True])
def test_openai_backend(server: Server, sgl: Any, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    import tiktoken

    class Vocabulary:  # a download; the backend reads it for select and integers only
        _mergeable_ranks: dict = {}  # noqa: RUF012
        _special_tokens = {"<|endoftext|>": 0}  # noqa: RUF012

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Vocabulary)
    backend = sgl.OpenAI("llama", is_chat_model=chat, base_url=f"{server.url}/v1", api_key="none")

    @sgl.function
    def program(s, adapter):
        if chat:
            s += sgl.user("hello")
            s += sgl.assistant(sgl.gen("x", adapter=adapter))
        else:
            s += "hello" + sgl.gen("x", adapter=adapter)

    prompt = "user: hello\nassistant: " if chat else "hello"
    for adapter in (*NAMES, None):
        found = program.run(adapter=adapter, backend=backend, **GREEDY)["x"].rstrip("\ufffd")
        expected = direct(server, prompt, adapter)["text"].rstrip("\ufffd")
        assert len(found) >= 3  # the API holds back an unfinished UTF-8 character
        assert expected.startswith(found)
    with pytest.raises(sgl.UnknownAdapter, match="legal, sql, support"):
        program.run(adapter="nobody", backend=backend)


def code_blocks() -> list[Any]:
    """Python blocks of README and docs that talk to a server."""
    found = []
    for path in (REPOSITORY / "README.md", REPOSITORY / "docs" / "frontend.md", REPOSITORY / "docs" / "api.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        found += [
            pytest.param(block, id=f"{path.name}-{i}") for i, block in enumerate(blocks) if "localhost:30000" in block
        ]
    return found


@pytest.mark.parametrize("code", code_blocks())
def test_code_in_the_docs_runs_as_it_stands(server: Server, sgl: Any, code: str, capsys) -> None:
    """Only the address is another: the port 30000 of this machine may be somebody else's."""
    exec(compile(code.replace("localhost:30000", f"127.0.0.1:{server.port}"), "docs", "exec"), {})
    assert capsys.readouterr().err == ""


# in_process_engine.py starts an engine of its own: test_engine.py.
EXAMPLES = sorted((REPOSITORY / "examples" / "frontend").glob("[!i]*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples(server: Server, sgl: Any, example: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In this process: importing SGLang anew for each takes longer than all they do."""
    monkeypatch.setattr(sys, "argv", [str(example), "--url", server.url, "--adapters", *NAMES])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert any(name in printed.out for name in NAMES)
