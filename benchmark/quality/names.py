"""A small real text task: German names of emoji from English ones (Unicode CLDR, shipped by the PyPI package emoji)."""

from __future__ import annotations

import random
from typing import Any

import emoji
import torch
from emoji.unicode_codes import load_from_json

FULLY_QUALIFIED = 2
HELD_OUT = 128
IGNORED = -100  # label of a token that carries no loss


def pairs() -> list[tuple[str, str]]:
    """(English, German) names in a fixed random order; skin tones left out, and names that are the same in both."""
    load_from_json("de")
    found = {}
    for entry in emoji.EMOJI_DATA.values():
        english, german = (entry.get(language, "").strip(":").replace("_", " ") for language in ("en", "de"))
        if entry["status"] == FULLY_QUALIFIED and german and german != english and "skin tone" not in english:
            found[english] = german
    ordered = sorted(found.items())
    random.Random(0).shuffle(ordered)
    return ordered


def encode(tokenizer: Any, examples: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and attention mask, each int64 ``[examples, length]``; only the German name carries a loss."""
    rows = []
    for english, german in examples:
        prompt = tokenizer(f"English: {english}\nGerman:").input_ids
        target = tokenizer(f" {german}\n").input_ids
        rows.append((prompt, target))
    length = max(len(prompt) + len(target) for prompt, target in rows)

    def padded(parts: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([part + [value] * (length - len(part)) for part in parts])

    ids = padded([prompt + target for prompt, target in rows], 0)
    labels = padded([[IGNORED] * len(prompt) + target for prompt, target in rows], IGNORED)
    mask = padded([[1] * len(prompt + target) for prompt, target in rows], 0)
    return ids, labels, mask
