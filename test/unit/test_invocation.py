"""Where an activated adapter begins: PEFT's own answer, and which tokens of a step are whose."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from blocklora_testing.models import save_tokenizer
from blocklora_testing.toy import ToyModel, write_adapter
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets
from sglang_blocklora.adapters.config import parse_config
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.requests.activation import ActivatedId, last_occurrence, runs, text_of
from transformers import AutoTokenizer

# Few ids, so that sequences occur; and ids whose bytes look like parts of others.
IDS = st.sampled_from([0, 1, 2, 256, 1 << 16, 1 << 24, (1 << 24) + 1])
CONFIG = {"peft_type": "LORA", "r": 4}


@given(st.lists(IDS, min_size=1, max_size=40), st.lists(IDS, min_size=1, max_size=4))
@example([1, 1, 1], [1, 1])
@example([1], [1, 1])
@example([0, 1], [1 << 32])
def test_it_begins_where_peft_says(prompt: list[int], invocation: list[int]) -> None:
    config = {"a": SimpleNamespace(alora_invocation_tokens=invocation)}
    (offset,) = calculate_alora_offsets(config, "a", torch.tensor([prompt]))
    assert last_occurrence(prompt, invocation) == (None if offset is None else len(prompt) - offset)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "plain", "a", "b"]),
            st.integers(0, 12),  # where the invocation is
            st.integers(0, 12),  # tokens before the step
            st.integers(1, 8),  # tokens of it
        ),
        max_size=5,
    )
)
def test_tokens_of_a_step_are_the_adapters_from_the_invocation_on(requests: list[tuple]) -> None:
    """However a prompt is cut into chunks: token by token."""
    ids = [ActivatedId(name, first) if name in ("a", "b") else name for name, first, _, _ in requests]
    prefixes, counts = [before for *_, before, _ in requests], [count for *_, count in requests]
    expected = [
        None if name in ("a", "b") and at < first else name
        for name, first, before, count in requests
        for at in range(before, before + count)
    ]
    keys, lengths = runs(ids, prefixes, counts)
    assert [key for key, count in zip(keys, lengths, strict=True) for _ in range(count)] == expected
    assert all(lengths)


def test_an_id_that_knows_its_place_is_the_plain_id() -> None:
    known = ActivatedId("a", 3)
    assert {known: 1} == {"a": 1}
    assert len({known, "a", ActivatedId("a", 4)}) == 1
    assert pickle.loads(pickle.dumps({str(known): 1})) == {"a": 1}


@pytest.mark.parametrize("value", [[1, -1], [1.0], ["a"], [True], "abc", {"a": 1}, 3, [1 << 31], [[1]]])
def test_what_is_no_list_of_token_ids_is_refused(value: object) -> None:
    with pytest.raises(AdapterError, match="alora_invocation_tokens"):
        parse_config("a", CONFIG | {"alora_invocation_tokens": value})


@pytest.mark.parametrize("value", [None, [], False])
def test_without_tokens_it_is_an_adapter_like_others(value: object) -> None:
    assert parse_config("a", CONFIG | {"alora_invocation_tokens": value}).invocation == ()


def test_an_invocation_is_told_as_text_where_a_text_gives_its_tokens(tmp_path) -> None:
    """The byte-level tokenizer's ids count from "!" on; a byte alone is no text."""
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert text_of([39, 68, 79], tokenizer) == "Hep"
    assert text_of([39, 99], tokenizer) is None
    assert text_of([], tokenizer) is None
    assert text_of([39], None) is None


def test_tokens_that_no_prompt_can_hold_are_refused(tmp_path) -> None:
    model = ToyModel()
    write_adapter(tmp_path / "in", model, alora_invocation_tokens=[5, 999])
    shard, _ = load_shard("in", tmp_path / "in", model.spec(0, 1), 64)
    assert shard.invocation == (5, 999)
    write_adapter(tmp_path / "out", model, alora_invocation_tokens=[5, 1000])
    with pytest.raises(AdapterError, match="below 1000"):
        load_shard("out", tmp_path / "out", model.spec(0, 1), 64)
