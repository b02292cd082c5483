"""Finds from which token of a prompt on an activated adapter (aLoRA) is active, as PEFT does.

An activated adapter changes only what comes from its invocation on: a sequence of tokens that its training put before
the answer. Everything before it is computed by the base model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

# Where an answer says it (``meta_info``): the position, or None where the base model answered.
FIELD = "activated_from"


class ActivatedId(str):
    """A request's adapter, by id, and the first of its tokens that is computed with it. Equal to the plain id."""

    first: int

    def __new__(cls, lora_id: str, first: int) -> ActivatedId:
        made = super().__new__(cls, lora_id)
        made.first = first
        return made


def last_occurrence(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where ``invocation`` begins for the last time in ``tokens``, or None. Takes about 1 ns a token."""
    text, wanted = array("q", tokens).tobytes(), array("q", invocation).tobytes()
    found, end = text.rfind(wanted), len(text)
    while found > 0 and found % 8:  # not at the beginning of a number
        end = found + len(wanted) - 1
        found = text.rfind(wanted, 0, end)
    return None if found < 0 else found // 8


def text_of(invocation: Sequence[int], tokenizer: Any) -> str | None:
    """The text whose tokens are ``invocation``; None for an empty one, and where there is none.

    tokenizer  of transformers; None: a server without one
    """
    if not invocation or tokenizer is None:
        return None
    text: str = tokenizer.decode(list(invocation), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if tokenizer.encode(text, add_special_tokens=False) == list(invocation) else None


def runs(
    lora_ids: Sequence[str | None], prefix_lens: Sequence[int], token_counts: Sequence[int]
) -> tuple[Sequence[str | None], Sequence[int]]:
    """A prefill step's tokens in runs of one adapter, or of the base model (None): adapters and numbers of tokens.

    prefix_lens, token_counts  tokens of each request before the step, and in it
    A run is a request, but for those that meet their invocation in this step, which are two, and those before it.
    """
    if not any(isinstance(one, ActivatedId) for one in lora_ids):
        return lora_ids, token_counts
    keys: list[str | None] = []
    counts: list[int] = []
    for lora_id, prefix, count in zip(lora_ids, prefix_lens, token_counts, strict=True):
        before = min(max(lora_id.first - prefix, 0), count) if isinstance(lora_id, ActivatedId) else 0
        for key, tokens in ((None, before), (lora_id, count - before)):
            if tokens:
                keys.append(key)
                counts.append(tokens)
    return keys, counts
