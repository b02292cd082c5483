"""What the example of rollouts (``examples/rollouts``) rewards, by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/rollouts/rewards.py"))
S_WORDS = EXAMPLE["REWARDS"]["s-words"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([" She", " s", "aw", " it", "."], [1, 1, 1, 0, 0]),
        ([" See", " saw", ",", " see", "!"], [1, 1, 1, 0, 0]),  # a word counts once
        (["s", "ide", " Sea"], [0, 0, 1]),  # the end of the prompt's own word
        (["\n", "Sea", " sun", ""], [1, 1, 1, 1]),  # the token that ends an answer is part of its last word
        ([" s", "cape" * 3], [0, 0]),  # longer than words are
        ([" s3", " -", " ñs", " \ufffd"], [0, 0, 0, 0]),  # no words
        ([], []),
    ],
)
def test_a_token_is_worth_what_its_word_is(pieces: list[str], expected: list[float]) -> None:
    assert EXAMPLE["worth"](pieces, S_WORDS) == expected


@pytest.mark.parametrize(
    ("variant", "values"),
    [
        ("long-words", [2 / 12, 1.0, 9 / 12]),
        ("short-words", [1, 0, 0]),
        ("without-e", [1, 0, 1]),
        ("s-words", [0, 0, 1]),
    ],
)
def test_words_are_worth_more_where_they_are_what_a_variant_learns(variant: str, values: list[float]) -> None:
    reward = EXAMPLE["REWARDS"][variant]
    assert [reward(word) for word in ("do", "electrically", "stockings")] == pytest.approx(values)
