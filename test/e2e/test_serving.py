"""One server at TP 2 and everything a user does with it."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.server import Server, running
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def llama(case) -> Case:
    return case("llama", 2)


@pytest.fixture(scope="module")
def root(llama: Case) -> Path:
    """The folder that adapters may come from."""
    return llama.model.parent


@pytest.fixture(scope="module")
def server(llama: Case, root: Path, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--tp", "2", "--adapter-root", str(root), "--served-model-name", "tiny", "--max-lora-rank", "64"]
    # Room for about four of the eight adapters: they also come and go.
    flags += [
        "--adapter-memory",
        "static",
        "--adapter-memory-mb",
        "1",
        "--max-loras-per-batch",
        "4",
        "--enable-cache-report",
    ]
    with running(llama.model, *flags, *llama.lora_paths, log=log, warm=True) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_mixed_batches_equal_peft_cold_and_warm(server: Server, llama: Case) -> None:
    for _ in range(2):
        assert server.many(llama.requests(), NEW_TOKENS) == llama.answers()


def test_model_list_names_parents(client: openai.OpenAI, llama: Case) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", *llama.adapters}
    assert models["n2"].parent == "tiny"
    assert models["tiny"].parent is None


@pytest.mark.parametrize("form", ["{}", "tiny:{}"])
def test_openai_model_chooses_the_adapter(client: openai.OpenAI, server: Server, form: str) -> None:
    def completion(model: str) -> str:
        return client.completions.create(model=model, prompt="hello", max_tokens=8, temperature=0).choices[0].text

    def chat(model: str) -> str | None:
        messages = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        return answer.choices[0].message.content

    def streamed(model: str) -> str:
        messages = [{"role": "user", "content": "hello"}]
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=8, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    def response(model: str) -> str:
        return client.responses.create(model=model, input="hello", max_output_tokens=8, temperature=0).output_text

    def response_streamed(model: str) -> str:
        stream = client.responses.create(model=model, input="hello", max_output_tokens=8, temperature=0, stream=True)
        return "".join(event.delta for event in stream if event.type == "response.output_text.delta")

    def generate(adapter: str | None, text: str) -> str:
        body = {"text": text, "lora_path": adapter, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
        return server.call("/generate", body)[1]["text"]

    def same(left: str | None, right: str) -> bool:
        """Equal up to the end: the APIs hold back an unfinished UTF-8 character, and /v1/responses some tokens."""
        left, right = (left or "").rstrip("\ufffd"), right.rstrip("\ufffd")
        return len(left) >= 3 and right.startswith(left)

    chat_text = "user: hello\nassistant: "
    assert generate("n2", "hello") != generate(None, "hello")
    for name in ("n2", "plain"):
        model = form.format(name)
        assert same(completion(model), generate(name, "hello"))
        for ask in (chat, streamed, response, response_streamed):
            assert same(ask(model), generate(name, chat_text)), ask.__name__
    for ask in (chat, streamed, response, response_streamed):
        assert same(ask("tiny"), generate(None, chat_text)), ask.__name__


@pytest.mark.parametrize("model", ["nobody", "tiny:nobody", "other:n2", ""])
def test_unknown_model_is_a_404_with_the_known_names(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    asks = [
        lambda: client.completions.create(model=model, prompt="hello"),
        lambda: client.chat.completions.create(model=model, messages=messages),
        lambda: client.chat.completions.create(model=model, messages=messages, stream=True),
        lambda: client.responses.create(model=model, input="hello"),
    ]
    if model == "":
        return  # SGLang's default: the base model
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match="n2") as error:
            ask()
        assert model in str(error.value)


def test_unknown_adapter_on_generate_is_refused(server: Server) -> None:
    status, answer = server.call("/generate", {"text": "hello", "lora_path": "nobody"})
    assert status == 400
    assert "nobody" in json.dumps(answer)


def load(server: Server, name: str, path: Path, **options: object) -> tuple[int, dict]:
    return server.call("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **options})


def unload(server: Server, name: str) -> tuple[int, dict]:
    return server.call("/unload_lora_adapter", {"lora_name": name})


def test_load_unload_and_reload_while_requests_run(server: Server, llama: Case) -> None:
    """Other adapters' requests never fail or change; the reloaded name answers with what was loaded last."""
    failures: list[object] = []
    stop = threading.Event()

    def keep_asking(start: int) -> None:
        requests = list(zip(llama.requests(), llama.answers(), strict=True))
        for (prompt, name), expected in itertools.islice(itertools.cycle(requests), start, None):
            if stop.is_set():
                return
            try:
                found = server.tokens(prompt, name, NEW_TOKENS)
            except AssertionError as error:
                failures.append((name, error))
                return
            if found != expected:
                failures.append((name, found, expected))
                return

    threads = [threading.Thread(target=keep_asking, args=(i * 3,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for source in ("n4", "plain", "n3", "n4", "n8"):
            status, answer = load(server, "moving", llama.adapters[source])
            assert (status, answer["success"]) == (200, True), answer
            for i, prompt in enumerate(llama.prompts):
                assert server.tokens(prompt, "moving", NEW_TOKENS) == llama.expected[source][i], source
            assert unload(server, "moving")[0] == 200
            status, _ = server.call("/generate", {"text": "hello", "lora_path": "moving"})
            assert status == 400, "an unloaded adapter still answers"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.fixture
def copy(llama: Case, root: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the n2 adapter below the root, for breaking."""
    folder = root / f"copy-{tmp_path.name}"
    shutil.copytree(llama.adapters["n2"], folder)
    yield folder
    shutil.rmtree(folder)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def nan_in_the_last_rows(tensors: dict) -> None:
    """Bad only in what TP rank 1 reads."""
    name = next(n for n in sorted(tensors) if "q_proj.lora_B" in n)
    tensors[name][-1] = float("nan")


BREAKS = {
    "no folder": (lambda f: shutil.move(f, f.with_name("gone")), "no folder"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 100), "cannot be read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora"),
    "rank limit": (lambda f: edit_config(f, r=96), "at most 64"),
    "NaN on one TP rank only": (lambda f: edit_weights(f, nan_in_the_last_rows), "NaN or Inf"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_adapter_is_refused_on_every_rank_and_nothing_is_taken(
    server: Server, llama: Case, copy: Path, root: Path, kind: str
) -> None:
    break_it, message = BREAKS[kind]
    good = root / "good-copy"
    shutil.copytree(copy, good)
    try:
        break_it(copy)
        status, answer = load(server, "broken", copy)
        assert status == 400
        assert "'broken'" in answer["error_message"]
        assert message in answer["error_message"]
        assert "broken" not in {model["id"] for model in server.call("/v1/models")[1]["data"]}
        # The name is free, and every TP rank agrees that it is.
        assert load(server, "broken", good)[0] == 200
        assert server.tokens(llama.prompts[0], "broken", NEW_TOKENS) == llama.expected["n2"][0]
        assert unload(server, "broken")[0] == 200
    finally:
        shutil.rmtree(good)
        shutil.rmtree(copy.with_name("gone"), ignore_errors=True)
        copy.mkdir(exist_ok=True)


def test_duplicate_name_and_path_outside_the_root_are_refused(
    server: Server, llama: Case, root: Path, tmp_path: Path
) -> None:
    assert "already loaded" in load(server, "n2", llama.adapters["n4"])[1]["error_message"]
    outside = tmp_path / "outside"
    shutil.copytree(llama.adapters["n2"], outside)
    link = root / "link"
    link.symlink_to(outside)
    try:
        for path in (outside, link, root / ".." / outside.relative_to("/")):
            status, answer = load(server, "outside", path)
            assert status == 400
            assert "--adapter-root" in answer["error_message"] or "no folder" in answer["error_message"]
    finally:
        link.unlink()
    assert server.many(llama.requests(), NEW_TOKENS) == llama.answers()
