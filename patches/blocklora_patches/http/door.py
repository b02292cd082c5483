"""Checks what a client wrote before anything of its request is kept or sent (``managers/tokenizer_manager.py``).

Every way in (HTTP routes, ``Engine``, scores and embeddings) leads through the methods below, so that no route and no
field needs a check of its own. Upstream sends on what it is given: a token id outside the vocabulary ends the scheduler
or is another adapter's mark, and a value of another type is found out in the middle of everybody's batch.
"""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import SessionParams, msgpack_decode, msgpack_encode
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_blocklora.requests.adapter_names import check_adapter_names
from sglang_blocklora.requests.token_ids import (
    check_positions,
    check_text_or_token_ids,
    check_token_id_keys,
    check_token_ids,
)
from sglang_blocklora.requests.values import BadRequest, check_count, check_embeddings, check_range, check_types

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http import aborts

# What ``normalize`` makes of the others; with ``is_normalized`` given, it would take the rest as it is.
_MADE = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
SAMPLING_PARAMS = {name: kind for name, kind in typing.get_type_hints(SamplingParams).items() if name not in _MADE}
SESSION_PARAMS = typing.get_type_hints(SessionParams)
# Numbers that upstream puts into tensors of 32 bits, or multiplies by, without a look.
LONGEST = 2**31 - 1
RANGES = {"n": (1, 10_000), "top_k": (-1, LONGEST)}
# Fields that hold one value for each prompt of a batch.
PER_PROMPT = (
    "lora_path",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "custom_logit_processor",
    "multi_item_delimiter_indices",
    "token_indices_to_pool",
)


def _normalize_batch_and_arguments(original: Any, self: Any) -> None:
    self.is_single = True  # read when a stream has ended, also one that is refused here
    aborts.note(self)
    _check_as_written(self)
    try:
        original(self)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise BadRequest(
            f"The prompts of the request and what goes with them have no shape that fits: {error}"
        ) from error


def _check_as_written(self: Any) -> None:
    if self.lora_id is not None:
        raise BadRequest("lora_id is the server's; name the adapter in lora_path.")
    check_adapter_names("lora_path", self.lora_path)
    if getattr(self, "session_params", None):
        check_types("session_params", self.session_params, SESSION_PARAMS)
    if isinstance(self.sampling_params, list):
        if not self.sampling_params:
            raise BadRequest("sampling_params is an empty list. Give one value for each prompt.")
        for i, params in enumerate(self.sampling_params):
            _check_sampling_params(f"sampling_params[{i}]", params)
    elif self.sampling_params is not None:
        _check_sampling_params("sampling_params", self.sampling_params)


def _check_sampling_params(field: str, params: Any) -> None:
    check_types(field, params, SAMPLING_PARAMS)
    for name, (low, high) in RANGES.items():
        if params.get(name) is not None:
            check_range(f"{field}.{name}", params[name], low, high)


def _init_req_state(self: Any, obj: Any, request: Any = None) -> None:
    """The whole request, normalized: a batch is refused before any part of it runs."""
    if not hasattr(obj, "is_single"):  # one part of a request, which has been here as a whole
        aborts.check(obj)
        return
    if obj.is_single:
        for field in ("lora_path", "sampling_params"):
            if isinstance(getattr(obj, field), list):
                raise BadRequest(f"{field} is a list, but there is one prompt, and no list of prompts.")
        _check_part(obj, "", self.model_config)
    else:
        _check_batch(obj, self.model_config)
    aborts.mark(obj)


def _check_batch(obj: Any, model: Any) -> None:
    for field in PER_PROMPT:
        values = getattr(obj, field, None)
        if isinstance(values, list):
            check_count(field, len(values) // getattr(obj, "parallel_sample_num", 1), obj.batch_size)
    for i in range(obj.batch_size):
        _check_part(obj[i], f"[{i}]", model)


def _check_part(obj: Any, at: str, model: Any) -> None:
    """One prompt and all that goes with it; ``at`` is its place in a batch."""
    params, vocabulary = obj.sampling_params, model.vocab_size
    if obj.input_embeds is not None:
        check_embeddings("input_embeds" + at, obj.input_embeds, model.hidden_size)
    override = getattr(obj, "embed_override_token_id", None)
    lists = {
        "input_ids" + at: obj.input_ids,
        "token_ids_logprob" + at: getattr(obj, "token_ids_logprob", None),
        "embed_override_token_id": None if override is None else [override],
        f"sampling_params{at}.stop_token_ids": params.get("stop_token_ids"),
        f"sampling_params{at}.custom_params.token_ids": (params.get("custom_params") or {}).get("token_ids"),
    }
    for field, ids in lists.items():
        if ids is not None:
            check_token_ids(field, ids, vocabulary)
    _check_not_empty("input_ids" + at, obj, obj.input_ids)
    _check_not_empty("text" + at, obj, obj.text)
    if params.get("logit_bias") is not None:
        check_token_id_keys(f"sampling_params{at}.logit_bias", params["logit_bias"], vocabulary)
    if getattr(obj, "return_logprob", False):
        check_range("logprob_start_len" + at, obj.logprob_start_len, -1, LONGEST)
        check_range("top_logprobs_num" + at, obj.top_logprobs_num, 0, vocabulary)


def _check_not_empty(field: str, obj: Any, prompt: Any) -> None:
    """Upstream refuses an empty prompt alone, and answers one in a batch with what was last computed for others."""
    if prompt is not None and len(prompt) == 0 and not getattr(obj, "session_params", None):
        raise BadRequest(f"{field} is empty; a prompt has at least one token.")


def _validate_one_request(self: Any, obj: Any, input_ids: Any) -> None:
    """What is known once a text is tokenized. A tokenizer may know more tokens than the model.

    Ids that a processor of images makes are its own.
    """
    _check_not_empty("The prompt", obj, input_ids)
    if obj.input_ids is None and input_ids is not None and not obj.contains_mm_input():
        check_token_ids("token ids of text", input_ids, self.model_config.vocab_size)
    for field in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        if getattr(obj, field) is not None:
            check_positions(field, getattr(obj, field), len(input_ids or ()))


def _create_tokenized_object(original: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """All that is sent has the type that the scheduler declares. Prompts were checked above, images are not ours."""
    aborts.check(obj)
    try:
        result = original(self, obj, *args, **kwargs)
    except re.error as error:
        raise BadRequest(f"sampling_params.stop_regex: {error}") from error
    rest = msgspec.structs.replace(result, input_ids=None, mm_inputs=None, time_stats=None)
    try:
        msgpack_decode(msgpack_encode(rest))
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise BadRequest(f"A value of the request has the wrong type: {error}") from error
    return result


async def _score_request(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A score is asked for by other names than those of the request that it becomes."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    for field in ("query", "items", "label_token_ids"):
        check_text_or_token_ids(field, given.get(field), self.model_config.vocab_size)
    for field in ("score_extraction_token_id", "embed_override_token_id"):
        if given.get(field) is not None:
            check_token_ids(field, [given[field]], self.model_config.vocab_size)
    return await original(self, *args, **kwargs)


def _convert_detokenize_request(self: Any, request: Any, raw_request: Any) -> None:
    check_text_or_token_ids("tokens", request.tokens, self.tokenizer_manager.model_config.vocab_size)


def _hook(target: str, handler: Any, kind: HookType) -> Hook:
    return Hook(
        f"sglang.srt.{target}",
        handler,
        kind,
        process=Process.HTTP,
        why="Upstream sends a scheduler whatever clients write.",
        retire_when="upstream checks types, numbers and token ids itself",
    )


_MANAGER = "managers.tokenizer_manager.TokenizerManager"
_SCORE = "managers.tokenizer_manager_score_mixin.TokenizerManagerScoreMixin"
_DETOKENIZE = "entrypoints.openai.serving_tokenize.OpenAIServingDetokenize"
HOOKS = (
    *(
        _hook(
            f"managers.io_struct.{kind}.normalize_batch_and_arguments", _normalize_batch_and_arguments, HookType.AROUND
        )
        for kind in ("GenerateReqInput", "EmbeddingReqInput")
    ),
    _hook(f"{_MANAGER}._init_req_state", _init_req_state, HookType.BEFORE),
    _hook(f"{_MANAGER}._validate_one_request", _validate_one_request, HookType.BEFORE),
    _hook(f"{_MANAGER}._create_tokenized_object", _create_tokenized_object, HookType.AROUND),
    _hook(f"{_SCORE}.score_request", _score_request, HookType.AROUND),
    _hook(f"{_DETOKENIZE}._convert_to_internal_request", _convert_detokenize_request, HookType.BEFORE),
)
