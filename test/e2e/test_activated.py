"""Activated adapters on a real server: PEFT's tokens, and one context computed once for all of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from blocklora_testing.models import (
    VOCAB,
    AdapterChoice,
    build_adapters,
    build_model,
    dense_twin,
    peft_tokens,
)
from blocklora_testing.server import Server, running
from blocklora_testing.upstream import HAS_PAGES_ON_A_CPU
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import pre_tokenizers

NEW_TOKENS = 12
PAGE = 16
INVOCATION, OTHER = (17, 42, 99), (7,)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def ids_of(text: str) -> tuple[int, ...]:
    """Tokens of the byte-level tokenizer: printable ASCII counts from "!" on, a space is a letter of its own."""
    return tuple(ALPHABET.index("\u0120" if letter == " " else letter) for letter in text)


CHOICES = {
    "judge": AdapterChoice(rank=8, invocation=INVOCATION),
    "router": AdapterChoice(rank=4, invocation=INVOCATION, use_rslora=True),
    "one": AdapterChoice(rank=6, invocation=OTHER),
    "blocks": AdapterChoice(2, rank=8, invocation=INVOCATION),
    "four": AdapterChoice(4, rank=8, invocation=INVOCATION),
    "chat": AdapterChoice(rank=8, invocation=ids_of("assistant: ")),
    "plain": AdapterChoice(rank=8),
    "n2": AdapterChoice(2, rank=8),
}
ACTIVATED = [name for name, choice in CHOICES.items() if choice.invocation]


@dataclass(frozen=True)
class Case:
    """A tiny model, activated adapters beside others, prompts, and PEFT's tokens: ``expected[adapter][prompt]``."""

    model: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: dict[str | None, list[list[int]]]

    def check(self, server: Server, names: list[str | None], prompts: list[int] | None = None) -> None:
        """All at once, so that they share batches."""
        asked = [(i, name) for i in prompts or range(len(self.prompts)) for name in names]
        found = server.many([(self.prompts[i], name) for i, name in asked], NEW_TOKENS)
        for (i, name), tokens in zip(asked, found, strict=True):
            assert tokens == self.expected[name][i], (name, i)


def words(count: int, seed: int) -> list[int]:
    """Random tokens without an invocation."""
    found = torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return [token if token not in (17, *OTHER) else 5 for token in found.tolist()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("activated")
    model = build_model(folder / "model", "llama")
    adapters = build_adapters(model, folder / "adapters", CHOICES)
    # What PEFT is asked: it has no block-diagonal adapters with an invocation.
    asked = {
        name: dense_twin(path, folder / "twins" / name) if CHOICES[name].nblocks and CHOICES[name].invocation else path
        for name, path in adapters.items()
    }
    invoke, context = list(INVOCATION), words(100, 1)
    prompts = [
        context + invoke + words(3, 2),
        context + invoke,  # nothing behind it
        invoke + words(20, 3),  # nothing before it
        context[:40] + invoke + words(25, 4) + invoke + words(4, 5),  # the last one counts
        context + invoke[:2] + words(4, 6),  # half of it is none
        [*context[:64], 7, *invoke, 7, *words(2, 7)],  # both kinds
        [*context[:31], 7, 17, *invoke, *words(1, 8)],  # at a page's end, behind its own first token
        context,
    ]
    return Case(model, adapters, prompts, peft_tokens(model, asked, prompts, NEW_TOKENS))


def start(made: Case, folder: Path, *flags: str):
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in made.adapters.items())]
    debug = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}
    return running(made.model, *flags, *paths, log=folder / "log", environment=debug, warm=True)


def test_the_adapters_make_a_difference(made: Case) -> None:
    """Else the tests below could not fail: with them, where an invocation is, and only there."""
    for name in ACTIVATED:
        same = [own == base for own, base in zip(made.expected[name], made.expected[None], strict=True)]
        assert same == [not holds(prompt, CHOICES[name].invocation) for prompt in made.prompts]


def holds(prompt: list[int], invocation: tuple[int, ...]) -> bool:
    return any(tuple(prompt[at : at + len(invocation)]) == invocation for at in range(len(prompt)))


@pytest.mark.parametrize(
    ("tp", "flags"),
    [
        (1, ("--chunked-prefill-size", "48", "--page-size", str(PAGE))),
        (2, ("--max-total-tokens", "1536", "--chunked-prefill-size", "32")),
        pytest.param(4, (), marks=pytest.mark.matrix),
        pytest.param(2, ("--adapter-memory", "static"), marks=pytest.mark.matrix),
        pytest.param(2, ("--page-size", str(PAGE)), marks=pytest.mark.matrix),
        pytest.param(1, (), marks=pytest.mark.matrix),
    ],
)
def test_tokens_equal_peft(made: Case, tmp_path: Path, tp: int, flags: tuple[str, ...]) -> None:
    if "--page-size" in flags and not HAS_PAGES_ON_A_CPU:
        pytest.skip("this SGLang's allocator of pages has a Triton kernel only")
    everyone: list[str | None] = [None, *made.adapters]
    with start(made, tmp_path, "--tp", str(tp), *flags) as server:
        made.check(server, ["judge"])  # cold
        made.check(server, everyone)  # warm from another one, and mixed
        assert server.call("/flush_cache", {})[0] == 200
        made.check(server, [None])
        made.check(server, ACTIVATED)  # warm from the base model
        made.check(server, everyone)  # warm from themselves
        for seed in range(20):  # others take the slots
            server.tokens(words(200, 100 + seed), None, 2)
        if "--max-total-tokens" in flags:
            evicted = {one["name"]: one["evictions"] for one in server.call("/adapters")[1]["data"]}
            assert any(evicted[name] for name in ACTIVATED), evicted
        made.check(server, everyone)


@pytest.fixture(scope="module")
def server(made: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("activated-server")
    shutil.copytree(made.adapters["chat"], folder / "later" / "late")
    with start(made, folder, "--enable-metrics", "--adapter-dir", str(folder / "later")) as server:
        yield server


def ask(server: Server, prompt: list[int], adapter: str | None, **more: object) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling, **more}
    status, answer = server.call("/generate", body)
    assert status == 200, answer
    return answer["meta_info"]


def test_the_context_is_computed_once_for_all(made: Case, server: Server) -> None:
    context = words(300, 50)
    prompt = context + list(INVOCATION)
    assert ask(server, prompt, "judge")["cached_tokens"] == 0
    for name in ("router", "blocks", "four"):
        assert ask(server, prompt, name)["cached_tokens"] == len(context), "up to the invocation"
    assert ask(server, prompt, "judge")["cached_tokens"] == len(prompt) - 1, "and its own"
    assert ask(server, [*context, 1], None)["cached_tokens"] == len(context), "the base model too"
    assert ask(server, [*context, 1], "plain")["cached_tokens"] == 0, "others compute their own"
    assert ask(server, prompt, None)["cached_tokens"] == len(context), "what is behind it is the adapters' alone"
    assert ask(server, prompt, "judge", extra_key="tenant")["cached_tokens"] == 0
    assert ask(server, [*context, 1], None, extra_key="tenant")["cached_tokens"] == len(context)


def test_an_answer_says_where_its_adapter_began(made: Case, server: Server) -> None:
    context = words(20, 60)
    assert ask(server, [*context, *INVOCATION, 1], "judge")["activated_from"] == 20
    assert ask(server, context, "judge")["activated_from"] is None
    assert "activated_from" not in ask(server, context, "plain")
    assert "activated_from" not in ask(server, context, None)


def test_a_chat_template_may_carry_the_invocation(made: Case, server: Server) -> None:
    """The test model's ends with "assistant: "; text prompts are the same prompt, and so are its tokens."""
    text = "user: How many?\nassistant: "
    place = len(text) - len("assistant: ")
    chat = {"model": "chat", "messages": [{"role": "user", "content": "How many?"}], "temperature": 0, "max_tokens": 4}
    status, answer = server.call("/v1/chat/completions", chat)
    assert (status, answer["metadata"]["activated_from"]) == (200, place)
    sampling = {"temperature": 0, "max_new_tokens": 4}
    found = [
        server.call("/generate", {**prompt, "lora_path": "chat", "sampling_params": sampling})[1]
        for prompt in ({"text": text}, {"input_ids": list(ids_of(text.replace("\n", "\u010a")))})
    ]
    assert [one["meta_info"]["activated_from"] for one in found] == [place, place]
    assert [one["text"] for one in found] == [answer["choices"][0]["message"]["content"]] * 2
    done = {"model": "chat", "prompt": "How many?", "temperature": 0, "max_tokens": 4}
    status, answer = server.call("/v1/completions", done)
    assert (status, answer["metadata"]["activated_from"]) == (200, None)


def test_a_call_of_the_language_may_write_the_invocation(made: Case, server: Server) -> None:
    """Each adapter's own, behind one context that is computed once; what PEFT answers to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from sglang_blocklora import frontend as sgl
    names: list[str | None] = ["chat", "one", "plain", None]
    context = "Five of them are asked about this. "
    prompts = {name: list(ids_of(context)) + list(CHOICES[name].invocation if name else ()) for name in names}
    adapters = {name: made.adapters[name] for name in names if name}
    expected = peft_tokens(made.model, adapters, list(prompts.values()), NEW_TOKENS)

    @sgl.function
    def program(s, names):
        s += context
        branches = s.fork(len(names))
        for branch, name in zip(branches, names, strict=True):
            branch += sgl.gen("x", adapter=name, invoke=True, return_logprob=True)
        return [branch.get_meta_info("x") for branch in branches]

    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    backend = sgl.RuntimeEndpoint(server.url)
    found = program.run(names, backend=backend, **sampling).ret_value
    answers = [[token for _, token, *_ in told["output_token_logprobs"]] for told in found]
    assert answers == [expected[name][i] for i, name in enumerate(names)]
    assert [told.get("activated_from") for told in found] == [len(context)] * 2 + [None] * 2
    assert [told["cached_tokens"] for told in found[:2]] == [len(context)] * 2
    assert server.call("/adapters/late")[1]["lora_id"] is None
    (late,) = program.run(["late"], backend=backend, **sampling).ret_value
    assert [token for _, token, *_ in late["output_token_logprobs"]] == expected["chat"][0], "loaded for its invocation"

    @sgl.function
    def untold(s):
        s += context + sgl.gen("x", adapter="judge", invoke=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's word on it
        with pytest.raises(sgl.InvocationUnknown, match=r"tokens \[17, 42, 99\], and no text"):
            untold.run(backend=backend)["x"]


def test_a_shared_context_counts_as_prefix_hits_of_whoever_found_it(server: Server) -> None:
    def hits() -> dict[str, float]:
        series = text_string_to_metric_families(server.call("/metrics")[1])
        (family,) = [one for one in series if one.name == "sglang_blocklora:adapter_prefix_hit_tokens"]
        return {one.labels["adapter"]: one.value for one in family.samples if one.name.endswith("_total")}

    context = words(80, 70)
    before = hits()
    for name in (None, "judge", "router", "plain"):
        ask(server, [*context, *INVOCATION], name)
    after = hits()
    found = {name: after[name] - before.get(name, 0) for name in ("(base)", "judge", "router", "plain")}
    assert found == {"(base)": 0, "judge": 80, "router": 80, "plain": 0}


def test_every_piece_of_a_stream_says_it(server: Server) -> None:
    body = {"input_ids": [1, 2, *INVOCATION, 3], "lora_path": "judge", "stream": True}
    status, text = server.call("/generate", body | {"sampling_params": {"max_new_tokens": 5, "ignore_eos": True}})
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: {")]
    assert status == 200
    assert pieces
    assert {piece["meta_info"]["activated_from"] for piece in pieces} == {2}
