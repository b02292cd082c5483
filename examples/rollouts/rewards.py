"""What each variant is rewarded for: words that a program can judge, so that no other model is needed."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence

# Texts that every variant goes on with.
BEGINNINGS = (
    "The sea was",
    "That winter we",
    "My cat is",
    "The old city",
    "We heard music",
    "In the garden",
    "For dinner we",
    "The moon is",
)
MOST_LETTERS = 12

# What one word, in lower case, is worth: 0 to 1.
REWARDS: Mapping[str, Callable[[str], float]] = {
    "long-words": lambda word: len(word) / MOST_LETTERS,
    "short-words": lambda word: float(len(word) <= 3),
    "without-e": lambda word: float("e" not in word),
    "s-words": lambda word: float(word.startswith("s")),
}


def worth(pieces: Sequence[str], reward: Callable[[str], float]) -> list[float]:
    """What each token of an answer is worth: as much as the word that it is part of.

    pieces  the tokens' texts; a word begins at one that begins with a space
    A word that came before, or has more than ``MOST_LETTERS``, is worth nothing, nor is what is not a word: otherwise a
    policy soon repeats one word, or never ends it.
    """
    starts = [i for i, piece in enumerate(pieces) if i == 0 or piece[:1].isspace()]
    found: list[float] = []
    seen = set()
    for start, stop in itertools.pairwise([*starts, len(pieces)]):
        text = "".join(pieces[start:stop])
        word = text.strip(string.punctuation + string.whitespace).lower()
        counts = text[:1].isspace() and word.isascii() and word.isalpha() and len(word) <= MOST_LETTERS
        found += [reward(word) if counts and word not in seen else 0.0] * (stop - start)
        seen.add(word)
    return found
