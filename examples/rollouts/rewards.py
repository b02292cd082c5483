"""What each variant is rewarded for: numbers that a program sees in a text, so that no judge is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

PROMPTS = (
    "Write a sentence about the sea.",
    "Tell me something about winter.",
    "Describe a cat.",
    "What do you see in a city?",
    "Say something about music.",
    "Write a sentence about a garden.",
    "Describe your favourite meal.",
    "Tell me about the moon.",
)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def long_words(text: str) -> float:
    """Mean length of the words, over 10 letters."""
    words = _words(text)
    return sum(map(len, words)) / len(words) / 10 if words else 0.0


def short_words(text: str) -> float:
    """Share of the words that have at most three letters."""
    words = _words(text)
    return sum(len(word) <= 3 for word in words) / len(words) if words else 0.0


def no_letter_e(text: str) -> float:
    """Share of the words without an e."""
    words = _words(text)
    return sum("e" not in word.lower() for word in words) / len(words) if words else 0.0


def alliteration(text: str) -> float:
    """Share of the words that begin with an s."""
    words = _words(text)
    return sum(word.lower().startswith("s") for word in words) / len(words) if words else 0.0


REWARDS: Mapping[str, Callable[[str], float]] = {
    "long-words": long_words,
    "short-words": short_words,
    "without-e": no_letter_e,
    "s-words": alliteration,
}
