"""The types, numbers, lists and shapes of a request, over SGLang's real routes and request handling."""

from __future__ import annotations

from typing import Any

import pytest
from blocklora_testing.http_process import HTTPProcess

MODEL = "llama"


def generate(**fields: Any) -> dict[str, Any]:
    return {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}} | fields


def params(**values: Any) -> dict[str, Any]:
    return generate(sampling_params={"max_new_tokens": 1} | values)


# What else of a request reaches a scheduler as it was written.
WRONG_VALUES: dict[str, Any] = {
    "max_new_tokens": [2.5, "7", True, 2**70],
    "min_new_tokens": ["7", 1.5],
    "temperature": ["hot", True, [1]],
    "top_k": [1.5, 2**31],
    "n": [0, -1, "2", 1.5, 10**9],
    "ignore_eos": ["yes", 1],
    "stop": [5, [5]],
    "regex": [5],
    "stop_regex": [5, "("],
    "logit_bias": [{"5": "x"}, [5], 5],
    "custom_params": [{"a": {"b": {"c": 1}}}, 5],
    "sampling_seed": [1.5],
    "stream_interval": ["a"],
    "nonsense": [1],
    "is_normalized": [True],
    "stop_str_max_len": [10**9],
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_sampling_parameters_have_the_types_that_the_scheduler_declares(process: HTTPProcess, name: str) -> None:
    for value in WRONG_VALUES[name]:
        assert name in process.refused("/generate", params(**{name: value}))
        batch = generate(input_ids=[[5], [6]], sampling_params=[{}, {name: value}])
        assert name in process.refused("/generate", batch)


@pytest.mark.parametrize(
    "fields",
    [
        {"session_params": {"id": 5}},
        {"session_params": {"id": "x", "offset": "a"}},
        {"session_params": {"zzz": 1}},
        {"positional_embed_overrides": [1]},
        {"positional_embed_overrides": {"embeds": [1], "positions": [10**6]}},
        {"lora_id": "nobody"},
        {"return_logprob": True, "top_logprobs_num": 257},
        {"return_logprob": True, "top_logprobs_num": -1},
        {"return_logprob": True, "logprob_start_len": -2},
        {"top_logprobs_num": 257},  # where another request of the batch wants them, so many are looked for
        {"top_logprobs_num": -1},
        {"logprob_start_len": -2},
        {"token_indices_to_pool": [0, 2]},
        {"multi_item_delimiter_indices": [-1]},
    ],
    ids=str,
)
def test_other_fields_are_what_the_scheduler_can_use(process: HTTPProcess, fields: dict) -> None:
    process.refused("/generate", generate(**fields))


LISTS = {
    "too short": (["sql"], "lora_path is a list of 1, but there are 2 prompts. Give one value for each."),
    "too long": (["sql", None, "sql"], "lora_path is a list of 3, but there are 2 prompts. Give one value for each."),
    "none": ([], "lora_path is a list of 0, but there are 2 prompts. Give one value for each."),
    "empty name": (["sql", ""], "lora_path[1] is ''; it is an adapter's name, or null for the base model."),
    "empty": ("", "lora_path is ''; it is an adapter's name, or null for the base model."),
}


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("case", LISTS)
def test_a_list_of_adapters_has_one_for_each_prompt(process: HTTPProcess, case: str, answers: int) -> None:
    names, message = LISTS[case]
    body = generate(input_ids=[[5], [6]], lora_path=names, sampling_params={"n": answers})
    assert process.refused("/generate", body) == message
    completion = {"model": MODEL, "prompt": ["a", "b"], "lora_path": names, "n": answers}
    assert process.refused("/v1/completions", completion) == message
    if answers == 1:
        assert "lora_path" in process.refused("/encode", {"input_ids": [[5], [6]], "lora_path": names})


@pytest.mark.parametrize("case", ["too short", "empty"])
def test_a_stream_is_refused_with_one_event(process: HTTPProcess, case: str) -> None:
    names, message = LISTS[case]
    assert process.refused("/generate", generate(input_ids=[[5], [6]], lora_path=names, stream=True)) == message


def test_a_list_for_one_prompt_is_refused(process: HTTPProcess) -> None:
    for names in (["sql"], [None], ["sql", "sql"]):
        message = process.refused("/generate", generate(lora_path=names))
        assert message == "lora_path is a list, but there is one prompt, and no list of prompts."
        assert process.refused("/v1/completions", {"model": MODEL, "prompt": "a", "lora_path": names}) == message


@pytest.mark.parametrize("names", [5, True, {"a": "b"}, ["sql", 5], ["sql", ["sql"]], [["sql"], ["sql"]]])
def test_names_of_adapters_are_texts(process: HTTPProcess, names: Any) -> None:
    for path, body in (
        ("/generate", generate(input_ids=[[5], [6]])),
        ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}),
    ):
        process.refused(path, body | {"lora_path": names})


@pytest.mark.parametrize("values", [[{}], [{}, {}, {}], []])
def test_other_lists_have_one_value_for_each_prompt(process: HTTPProcess, values: list) -> None:
    """Upstream cut some in silence, and answered the others with a 500."""
    assert "sampling_params" in process.refused("/generate", generate(sampling_params=values))
    message = process.refused("/generate", generate(input_ids=[[5], [6]], sampling_params=values))
    assert "sampling_params" in message
    for field in ("return_logprob", "top_logprobs_num", "logprob_start_len"):
        assert field in process.refused("/generate", generate(input_ids=[[5], [6]]) | {field: [0] * len(values)})


WIDTH = 288
EMBEDDINGS = {
    "narrow": [[0.5] * (WIDTH - 1)],
    "ragged": [[0.5] * WIDTH, [0.5]],
    "batch": [[[0.5] * WIDTH], [[0.5]]],
    "empty": [],
    "empty row": [[]],
    "empty in a batch": [[[0.5] * WIDTH], []],
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_have_the_width_of_the_model(process: HTTPProcess, case: str) -> None:
    process.refused("/generate", {"input_embeds": EMBEDDINGS[case], "sampling_params": {"max_new_tokens": 1}})


def test_embeddings_that_fit_come_to_upstreams_own_check(process: HTTPProcess) -> None:
    message = process.refused("/generate", {"input_embeds": [[0.5] * WIDTH], "sampling_params": {"max_new_tokens": 1}})
    assert "--disable-radix-cache" in message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": []}),
        ("/generate", {"text": ["a", "b"], "rid": ["a"]}),
        ("/encode", {"input_ids": []}),
        ("/encode", {"text": ["a"], "rid": "a"}),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_a_400(process: HTTPProcess, path: str, body: dict) -> None:
    process.refused(path, body)
