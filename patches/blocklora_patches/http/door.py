"""Checks what a client wrote before anything of its request is kept or sent.

Every way in (HTTP routes, ``Engine``, scores and embeddings) leads through ``tokenizer_manager.py``, which asks the
functions below, so that no route and no field needs a check of its own. Upstream sends on what it is given: a token id
outside the vocabulary ends the scheduler or is another adapter's mark, and a value of another type is found out in the
middle of everybody's batch.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import SessionParams, msgpack_decode, msgpack_encode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_blocklora.requests.adapter_names import check_adapter_names
from sglang_blocklora.requests.token_ids import (
    check_positions,
    check_text_or_token_ids,
    check_token_id_keys,
    check_token_ids,
)
from sglang_blocklora.requests.values import BadRequest, check_count, check_embeddings, check_range, check_types

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

# What SGLang raises while it normalizes a request whose fields do not go together.
NO_SHAPE = (AssertionError, AttributeError, IndexError, KeyError, TypeError)


def check_as_written(obj: Any) -> None:
    """What can be told of a request before SGLang normalizes it. Raises ``BadRequest``."""
    if obj.lora_id is not None:
        raise BadRequest("lora_id is the server's; name the adapter in lora_path.")
    check_adapter_names("lora_path", obj.lora_path)
    if getattr(obj, "session_params", None):
        check_types("session_params", obj.session_params, SESSION_PARAMS)
    if isinstance(obj.sampling_params, list):
        if not obj.sampling_params:
            raise BadRequest("sampling_params is an empty list. Give one value for each prompt.")
        for i, params in enumerate(obj.sampling_params):
            _check_sampling_params(f"sampling_params[{i}]", params)
    elif obj.sampling_params is not None:
        _check_sampling_params("sampling_params", obj.sampling_params)


def _check_sampling_params(field: str, params: Any) -> None:
    check_types(field, params, SAMPLING_PARAMS)
    for name, (low, high) in RANGES.items():
        if params.get(name) is not None:
            check_range(f"{field}.{name}", params[name], low, high)


def check_normalized(obj: Any, model: Any) -> None:
    """A whole request that SGLang has normalized; ``model`` is its model's config. Raises ``BadRequest``."""
    obj.blocklora_normalized = True
    if not obj.is_single:
        _check_batch(obj, model)
        return
    for field in ("lora_path", "sampling_params"):
        if isinstance(getattr(obj, field), list):
            raise BadRequest(f"{field} is a list, but there is one prompt, and no list of prompts.")
    _check_part(obj, "", model)


def is_normalized(obj: Any) -> bool:
    """Whether ``check_normalized`` has seen a request; what is raised before that is about how it was written."""
    return hasattr(obj, "blocklora_normalized")


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
    if hasattr(obj, "top_logprobs_num"):  # also without return_logprob: it counts where another of the batch has that
        check_range("logprob_start_len" + at, obj.logprob_start_len, -1, LONGEST)
        check_range("top_logprobs_num" + at, obj.top_logprobs_num, 0, vocabulary)


def _check_not_empty(field: str, obj: Any, prompt: Any) -> None:
    """Upstream refuses an empty prompt alone, and answers one in a batch with what was last computed for others."""
    if prompt is not None and len(prompt) == 0 and not getattr(obj, "session_params", None):
        raise BadRequest(f"{field} is empty; a prompt has at least one token.")


def check_tokenized(obj: Any, input_ids: Any, vocabulary: int) -> None:
    """What is known of one prompt once its text is tokenized. Raises ``BadRequest``.

    A tokenizer may know more tokens than the model. Ids that a processor of images makes are its own.
    """
    _check_not_empty("The prompt", obj, input_ids)
    if obj.input_ids is None and input_ids is not None and not obj.contains_mm_input():
        check_token_ids("token ids of text", input_ids, vocabulary)
    for field in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        if getattr(obj, field) is not None:
            check_positions(field, getattr(obj, field), len(input_ids or ()))


def checked_types(make: Callable[[], Any]) -> Any:
    """What ``make`` makes to be sent, if all of it has the type that the scheduler declares. Raises ``BadRequest``.

    Prompts were checked above, images are not ours.
    """
    try:
        made = make()
    except re.error as error:
        raise BadRequest(f"sampling_params.stop_regex: {error}") from error
    rest = msgspec.structs.replace(made, input_ids=None, mm_inputs=None, time_stats=None)
    try:
        msgpack_decode(msgpack_encode(rest))
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise BadRequest(f"A value of the request has the wrong type: {error}") from error
    return made


def check_score(given: Mapping[str, Any], vocabulary: int) -> None:
    """The arguments of a score, which have other names than those of the request it becomes. Raises ``BadRequest``."""
    for field in ("query", "items", "label_token_ids"):
        check_text_or_token_ids(field, given.get(field), vocabulary)
    for field in ("score_extraction_token_id", "embed_override_token_id"):
        if given.get(field) is not None:
            check_token_ids(field, [given[field]], vocabulary)


@functools.wraps(http_server.openai_v1_detokenize)
async def detokenize(*, request: Any, raw_request: Any) -> Any:
    """SGLang's endpoint, which asks no tokenizer manager, for ids that are of the vocabulary."""
    serving = raw_request.app.state.openai_serving_detokenize
    try:
        check_text_or_token_ids("tokens", request.tokens, serving.tokenizer_manager.model_config.vocab_size)
    except BadRequest as error:
        return serving.create_error_response(str(error), "BadRequest")
    return await http_server.openai_v1_detokenize(request=request, raw_request=raw_request)
