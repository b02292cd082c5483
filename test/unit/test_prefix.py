"""Keys of the radix tree: no two owners have one, whatever their strings and ids hold."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sglang_blocklora.memory.entries import Entries
from sglang_blocklora.memory.prefix import are_token_ids, request_key, salted_tokens, split_key

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)  # lone surrogates too
LORA_ID = "0123456789abcdef" * 2
TOKENS = st.lists(st.integers(0, (1 << 32) - 1), min_size=8, max_size=40).map(lambda ids: array("q", ids))


@given(st.none() | ANY_TEXT, st.none() | ANY_TEXT, st.none() | st.integers(0, 10**8))
@example(None, LORA_ID, None)
@example(None, "32:" + LORA_ID, None)
@example(None, "32@7:" + LORA_ID, None)
@example(LORA_ID, ":", 7)
@example("", "0:", None)
@example("", "@0:", 0)
@example("\ud83d\ude00", "\U0001f600", None)
def test_an_adapter_and_a_clients_extra_key_are_read_out_of_the_key_they_make(
    lora_id: str | None, own: str | None, first: int | None
) -> None:
    """So no two requests make one key, and a client without an adapter makes none of a client with one."""
    if lora_id is None:
        first = None
    assert split_key(request_key(lora_id, own, first)) == (lora_id, own or None, first)


@given(ANY_TEXT)
def test_a_string_that_no_request_makes_is_refused_or_read_in_one_way(text: str) -> None:
    try:
        parts = split_key(text)
    except ValueError:
        return
    assert parts[0] is not None or request_key(*parts) in (text, None)


@given(TOKENS, st.tuples(ANY_TEXT, ANY_TEXT), st.tuples(ANY_TEXT, ANY_TEXT))
@example(array("q", range(8)), ("a", "bc"), ("ab", "c"))
@example(array("q", range(8)), ("", "a"), ("a", ""))
@example(array("q", range(8)), ("\ud83d\ude00", ""), ("\U0001f600", ""))
@example(array("q", range(8)), ("", ""), ("", "s"))
def test_other_salts_make_other_tokens(tokens: array[int], one: tuple[str, str], other: tuple[str, str]) -> None:
    salted = salted_tokens(tokens, *one)
    assert (salted == salted_tokens(tokens, *other)) == (one == other)
    assert [token & 0xFFFFFFFF for token in salted] == tokens.tolist()
    assert are_token_ids(salted) == (one == ("", "")), "a salted token could pass for an id"
    for length in (0, 1, 7, 8):
        assert salted_tokens(tokens[:length], *one) == salted[:length], "a key does not begin as a shorter one"


@pytest.mark.parametrize("wrong", [-1, -(1 << 63), 1 << 32, 1 << 62, (1 << 63) - 1])
def test_what_is_no_id_is_seen(wrong: int) -> None:
    assert are_token_ids(array("q", [0, 1, (1 << 32) - 1]))
    assert are_token_ids(array("q"))
    for tokens in ([wrong], [1, 2, wrong], [wrong, *range(100)]):
        assert not are_token_ids(array("q", tokens))


def test_contents_are_known_with_one_number_of_slots_and_ids_with_one_content() -> None:
    entries = Entries()
    entries.know("a", "A", 4)
    entries.know("a", "A", 4)
    for lora_id, contents, slots in (("a", "B", 4), ("b", "A", 5), ("a", "A", 8)):
        with pytest.raises(ValueError, match="known otherwise"):
            entries.know(lora_id, contents, slots)
    assert len(entries) == 1
    assert "b" not in entries
