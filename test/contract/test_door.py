"""What a client may write, over SGLang's real routes and request handling: nothing else reaches a scheduler."""

from __future__ import annotations

import dataclasses
import time
import typing
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from blocklora_testing.http_process import HTTPProcess
from blocklora_testing.upstream import LATER_INTEGERS
from pydantic import BaseModel
from sglang_blocklora.requests.token_ids import check_token_id_keys, check_token_ids
from sglang_blocklora.requests.values import BadRequest

MODEL = "llama"
BAD_IDS = [256, -1, 10**6, 2**40]  # of a vocabulary of 256
NO_IDS = [True, 5.5, "7", [5], {"5": 5}, None]


def generate(**fields: Any) -> dict[str, Any]:
    return {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}} | fields


def params(**values: Any) -> dict[str, Any]:
    return generate(sampling_params={"max_new_tokens": 1} | values)


# Every field through which a client names token ids: case -> route, body around an id, how a refusal calls it.
FIELDS: dict[str, tuple[str, Any, str]] = {
    "input_ids": ("/generate", lambda i: generate(input_ids=[5, i]), "input_ids[1]"),
    "input_ids, stream": ("/generate", lambda i: generate(input_ids=[5, i], stream=True), "input_ids[1]"),
    "input_ids, n": (
        "/generate",
        lambda i: generate(input_ids=[5, i], sampling_params={"n": 3}),
        "input_ids[0][1]",
    ),
    "input_ids, batch": ("/generate", lambda i: generate(input_ids=[[5, 6], [5, i]]), "input_ids[1][1]"),
    "stop_token_ids": ("/generate", lambda i: params(stop_token_ids=[5, i]), "sampling_params.stop_token_ids[1]"),
    "stop_token_ids, batch": (
        "/generate",
        lambda i: generate(input_ids=[[5], [6]], sampling_params=[{}, {"stop_token_ids": [i]}]),
        "sampling_params[1].stop_token_ids[0]",
    ),
    "token_ids_logprob": (
        "/generate",
        lambda i: generate(return_logprob=True, token_ids_logprob=[5, i]),
        "token_ids_logprob[1]",
    ),
    "custom_params": (
        "/generate",
        lambda i: params(custom_params={"token_ids": [5, i]}),
        "sampling_params.custom_params.token_ids[1]",
    ),
    "session": ("/generate", lambda i: generate(input_ids=[5, i], session_params={"id": "s"}), "input_ids[1]"),
    "vertex": (
        "/vertex_generate",
        lambda i: {"instances": [{"input_ids": [i]}], "parameters": {"sampling_params": {}}},
        "input_ids[0][0]",
    ),
    "prompt": ("/v1/completions", lambda i: {"model": MODEL, "prompt": [5, i]}, "input_ids[1]"),
    "prompt, batch": ("/v1/completions", lambda i: {"model": MODEL, "prompt": [[5], [6, i]]}, "input_ids[1][1]"),
    "prompt, n": ("/v1/completions", lambda i: {"model": MODEL, "prompt": [5, i], "n": 2}, "input_ids[0][1]"),
    "completion stop": (
        "/v1/completions",
        lambda i: {"model": MODEL, "prompt": "a", "stop_token_ids": [i]},
        "sampling_params.stop_token_ids[0]",
    ),
    "chat input_ids": (
        "/v1/chat/completions",
        lambda i: {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "input_ids": [i]},
        "input_ids[0]",
    ),
    "chat stop": (
        "/v1/chat/completions",
        lambda i: {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stop_token_ids": [i]},
        "sampling_params.stop_token_ids[0]",
    ),
    "sagemaker": (
        "/invocations",
        lambda i: {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "input_ids": [i]},
        "input_ids[0]",
    ),
    "encode": ("/encode", lambda i: {"input_ids": [5, i]}, "input_ids[1]"),
    "encode, batch": ("/encode", lambda i: {"input_ids": [[5], [i]]}, "input_ids[1][0]"),
    "encode override": (
        "/encode",
        lambda i: {"input_ids": [5], "embed_override_token_id": i},
        "embed_override_token_id[0]",
    ),
    "classify": ("/classify", lambda i: {"input_ids": [5, i]}, "input_ids[1]"),
    "embeddings": ("/v1/embeddings", lambda i: {"model": MODEL, "input": [5, i]}, "input_ids[1]"),
    "embeddings, batch": ("/v1/embeddings", lambda i: {"model": MODEL, "input": [[5], [i]]}, "input_ids[1][0]"),
    "v1 classify": ("/v1/classify", lambda i: {"model": MODEL, "input": [5, i]}, "input_ids[1]"),
    "score query": (
        "/v1/score",
        lambda i: {"model": MODEL, "query": [5, i], "items": [[5]], "label_token_ids": [5]},
        "query[1]",
    ),
    "score items": (
        "/v1/score",
        lambda i: {"model": MODEL, "query": [5], "items": [[5], [i]], "label_token_ids": [5]},
        "items[1][0]",
    ),
    "score labels": (
        "/v1/score",
        lambda i: {"model": MODEL, "query": "a", "items": ["b"], "label_token_ids": [5, i]},
        "label_token_ids[1]",
    ),
    "score labels, batch": (
        "/v1/score",
        lambda i: {"model": MODEL, "query": "a", "items": ["b"], "label_token_ids": [[i]]},
        "label_token_ids[0][0]",
    ),
    "score override": (
        "/v1/score",
        lambda i: {"model": MODEL, "query": "a", "items": ["b"], "label_token_ids": [5], "embed_override_token_id": i},
        "embed_override_token_id[0]",
    ),
    "detokenize": ("/v1/detokenize", lambda i: {"tokens": [5, i]}, "tokens[1]"),
    "detokenize, batch": ("/detokenize", lambda i: {"tokens": [[5], [i]]}, "tokens[1][0]"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_ids_outside_the_vocabulary_are_refused(process: HTTPProcess, name: str) -> None:
    path, body, field = FIELDS[name]
    for value in BAD_IDS[:1] if "stream" in name else BAD_IDS:  # SGLang waits for 2 s after a stream
        message = process.refused(path, body(value))
        if message != "Token ID at index 1 must be non-negative":  # embeddings: SGLang's own
            assert message == f"{field} is {value}; a token id of this model is an integer in [0, 256)."


@pytest.mark.parametrize("name", [name for name in FIELDS if "stream" not in name])
def test_what_is_no_id_is_refused_or_never_sent(process: HTTPProcess, name: str) -> None:
    """Where SGLang's own parser of bodies makes a number of it, that number counts."""
    path, body, _ = FIELDS[name]
    for value in NO_IDS:
        status, answer = process.call(path, body(value))
        if status == 200:
            for request in process.scheduler.requests():
                assert {int(id) for id in request.input_ids} <= set(range(256))
                assert request.sampling_params.stop_token_ids in (None, {1}, {7})
            assert value in (True, "7", None), (value, answer)


@pytest.mark.parametrize("value", NO_IDS)
def test_what_is_no_id_is_refused_by_generate(process: HTTPProcess, value: Any) -> None:
    for name in ("input_ids", "input_ids, batch", "stop_token_ids", "custom_params"):
        path, body, _ = FIELDS[name]
        process.refused(path, body(value))


@pytest.mark.parametrize("key", ["256", "-1", "1000000", "5.5", "x", "", "\u0665", "1_0", " 5"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_keys_of_logit_bias(process: HTTPProcess, path: str, key: str) -> None:
    body: dict[str, Any] = {"logit_bias": {"5": 1.0, key: 1.0}}
    if path == "/generate":
        body = generate(sampling_params=body)
    elif path == "/v1/completions":
        body |= {"model": MODEL, "prompt": [5]}
    else:
        body |= {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    assert process.refused(path, body).startswith("sampling_params.logit_bias key[0] is ")


def test_good_ids_pass(process: HTTPProcess) -> None:
    for name in ("input_ids", "input_ids, batch", "input_ids, n", "stop_token_ids", "prompt, batch", "chat stop"):
        path, body, _ = FIELDS[name]
        for value in (0, 255):
            assert process.call(path, body(value))[0] == 200
    assert process.call("/generate", params(logit_bias={"0": 1, "255": -2.5}))[0] == 200


EMPTY: dict[str, tuple[str, Any]] = {
    "alone": ("/generate", generate(input_ids=[])),
    "batch of one": ("/generate", generate(input_ids=[[]])),
    "in a batch": ("/generate", generate(input_ids=[[5, 6], []])),
    "text": ("/generate", {"text": "", "sampling_params": {}}),
    "text in a batch": ("/generate", {"text": ["a", ""], "sampling_params": {}}),
    "prompt in a batch": ("/v1/completions", {"model": MODEL, "prompt": [[5], []]}),
    "encode": ("/encode", {"input_ids": [[5], []]}),
}


@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_prompt_is_refused(process: HTTPProcess, case: str) -> None:
    """In a batch it was answered, each time otherwise: with what the last step had left of others' prompts."""
    path, body = EMPTY[case]
    process.refused(path, body)


def test_a_tokenizer_that_knows_more_tokens_than_the_model(process: HTTPProcess) -> None:
    """As after ``resize_token_embeddings`` on one of the two: the prompt is refused, the scheduler never sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.manager.model_config, "vocab_size", 70)
        message = process.refused("/generate", {"text": "Az", "sampling_params": {}})
        assert message == "token ids of text[1] is 89; a token id of this model is an integer in [0, 70)."
        process.refused("/v1/completions", {"model": MODEL, "prompt": "z"})
        process.refused("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "z"}]})


def test_ids_that_a_processor_of_images_makes_are_its_own() -> None:
    """Placeholders of images may lie beyond the vocabulary; what the client wrote was checked before."""
    from blocklora_patches.http import door

    fields = {"input_ids": None, "multi_item_delimiter_indices": None, "token_indices_to_pool": None}
    image = SimpleNamespace(**fields, contains_mm_input=lambda: True)
    text = SimpleNamespace(**fields, contains_mm_input=lambda: False)
    door.check_tokenized(image, [5, 10**6], 256)
    with pytest.raises(BadRequest):
        door.check_tokenized(text, [5, 10**6], 256)


@pytest.mark.parametrize("ids", [[5, 256], [5, True], [5, np.int64(5)], [5, 2**70], np.array([5, 256]), "ab", [[5], 6]])
def test_python_callers_get_a_value_error(process: HTTPProcess, ids: Any) -> None:
    """``Engine`` calls the same methods, with values that no body can hold."""
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

    for request in (GenerateReqInput(input_ids=ids), EmbeddingReqInput(input_ids=ids)):
        with pytest.raises(ValueError, match=r"."):
            process.run(anext(process.manager.generate_request(request)))
    with pytest.raises(ValueError, match="label_token_ids"):
        process.run(process.manager.score_request("a", ["b"], label_token_ids=ids))
    assert process.scheduler.requests() == []


def test_a_hundred_thousand_ids_take_no_time_that_counts() -> None:
    """One pass in C: compared with what the same pass costs in Python, not with a clock's limit."""
    ids = list(range(100_000))
    started = time.process_time()
    for _ in range(10):
        check_token_ids("input_ids", ids, 100_000)
    ours, started = time.process_time() - started, time.process_time()
    for _ in range(10):
        assert all(type(one) is int and 0 <= one < 100_000 for one in ids)
    assert ours < (time.process_time() - started) / 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (5, "f is 5, not a list"),
        ("ab", "f is 'ab', not a list"),
        ({5: 1}, "f is {5: 1}, not a list"),
        ([5, 10**5000], "f[1] is an integer of 16610 bits"),
        ([5, [[[[[[5]]]]]]], "f[1] is [[[[...]]]]"),
        ([None], "f[0] is None"),
        (["x" * 10_000], "f[0] is '"),
    ],
    ids=["scalar", "text", "mapping", "huge", "nested", "null", "long"],
)
def test_messages_are_short_whatever_the_value(ids: Any, message: str) -> None:
    with pytest.raises(BadRequest) as error:
        check_token_ids("f", ids, 256)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200


def test_keys_that_are_no_digits() -> None:
    check_token_id_keys("f", {"0": 1, "255": 2, 7: 3}, 256)
    for keys in ({"9" * 5000: 1}, {True: 1}, {None: 1}, {(1,): 1}, [1]):
        with pytest.raises(BadRequest):
            check_token_id_keys("f", keys, 256)


# Fields of request bodies that hold integers in lists or mappings. "ids": checked above.
INTEGERS = {
    "GenerateReqInput.input_ids": "ids",
    "GenerateReqInput.token_ids_logprob": "ids",
    "GenerateReqInput.logprob_start_len": "a position for each prompt",
    "GenerateReqInput.top_logprobs_num": "a count for each prompt",
    "GenerateReqInput.bootstrap_port": "disaggregation",
    "GenerateReqInput.bootstrap_room": "disaggregation",
    "GenerateReqInput.decode_tp_size": "disaggregation",
    "GenerateReqInput.num_items_assigned": "images",
    "GenerateReqInput.multi_item_delimiter_indices": "positions",
    "GenerateReqInput.token_indices_to_pool": "positions",
    "EmbeddingReqInput.input_ids": "ids",
    "EmbeddingReqInput.multi_item_delimiter_indices": "positions",
    "EmbeddingReqInput.token_indices_to_pool": "positions",
    "CompletionRequest.prompt": "ids",
    "CompletionRequest.stop_token_ids": "ids",
    "CompletionRequest.bootstrap_port": "disaggregation",
    "CompletionRequest.bootstrap_room": "disaggregation",
    "ChatCompletionRequest.stop_token_ids": "ids",
    "ChatCompletionRequest.input_ids": "ids",
    "ChatCompletionRequest.bootstrap_port": "disaggregation",
    "ChatCompletionRequest.bootstrap_room": "disaggregation",
    "ResponsesRequest.bootstrap_port": "disaggregation",
    "ResponsesRequest.bootstrap_room": "disaggregation",
    "EmbeddingRequest.input": "ids",
    "ClassifyRequest.input": "ids",
    "DetokenizeRequest.tokens": "ids",
    "ScoringRequest.query": "ids",
    "ScoringRequest.items": "ids",
    "ScoringRequest.label_token_ids": "ids",
    "OllamaGenerateRequest.context": "not read by SGLang",
    "SamplingParams.stop_token_ids": "ids",
    "SamplingParams.custom_params": "ids",
    "SamplingParams.logit_bias": "ids",
    # Not requests for tokens.
    "SetInternalStateReq.server_args": "control",
    "UpdateWeightsFromDistributedReqInput.shapes": "control",
    "PdRoleSwitchReqInput.decode_cuda_graph_bs": "control",
    "AbortReq.finished_reason": "control",
}


def bodies(app: Any) -> dict[str, type]:
    """Classes of request bodies by name, of every route of SGLang's application."""
    found: dict[str, type] = {}
    routes = [route for route in app.routes if getattr(route, "endpoint", None)]
    for hint in (hint for route in routes for hint in typing.get_type_hints(route.endpoint).values()):
        for kind in (hint, *typing.get_args(hint)):
            if isinstance(kind, type) and (
                issubclass(kind, BaseModel | msgspec.Struct) or dataclasses.is_dataclass(kind)
            ):
                found[kind.__name__] = kind
    return found


def holds_integers(kind: Any, inside: bool = False) -> bool:
    """Whether values of a type may hold integers in a list, a set or a mapping."""
    if kind is int:
        return inside
    inside = inside or typing.get_origin(kind) in (list, set, tuple, frozenset, dict)
    return any(holds_integers(one, inside) for one in typing.get_args(kind))


def test_every_field_of_integers_is_known(process: HTTPProcess) -> None:
    """A field that a release of SGLang adds is noticed here: check it, or say above why it names no tokens."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    classes = bodies(process.app) | {"SamplingParams": SamplingParams}
    found = {
        f"{name}.{field}"
        for name, kind in classes.items()
        for field, hint in typing.get_type_hints(kind).items()
        if holds_integers(hint)
    }
    assert found | {"SamplingParams.logit_bias"} == INTEGERS.keys() | LATER_INTEGERS  # its keys are texts of digits
