"""What a soak serves: a tiny model, contents of adapters, prompts, and the tokens PEFT answers to each with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer

from blocklora_testing.models import VOCAB, AdapterChoice, answers_by_adapter, build_adapters, build_model

BLOCKS = (None, 1, 2, 4)  # plain, and block-diagonal of several n
SIZES: Mapping[str, int] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
}
NEW_TOKENS = 4  # what a usual request may ask for
LONG_TOKENS = 96  # what a request asks for that will be aborted, or left by its client
# Tokens are compared up to the first one whose logit wins by less: far above what float32 loses in another batch.
MARGIN = 1e-3
CHAT = "hi"  # a user's message, whose chat prompt is the first of a world's prompts


@dataclass(frozen=True, kw_only=True)
class World:
    """What is served, and what is right.

    contents  name of contents -> its folder; servers get copies
    prompts   token ids; many begin alike, so that cached prefixes are used
    expected  name of contents (None: the base model) -> PEFT's greedy tokens for each prompt, as far as they are
              certain; ``LONG_TOKENS`` for the last prompt, ``NEW_TOKENS`` for the others
    decode    tokens -> text
    """

    model: Path
    contents: Mapping[str, Path]
    prompts: Sequence[Sequence[int]]
    expected: Mapping[str | None, Sequence[Sequence[int]]]
    decode: Any

    @property
    def long(self) -> int:
        """Index of the prompt with the long answer."""
        return len(self.prompts) - 1

    def right(self, contents: str | None, prompt: int, answer: Sequence[int]) -> bool:
        """Whether PEFT answers so, as far as ``answer`` goes."""
        certain = self.expected[contents][prompt][: len(answer)]
        return list(answer[: len(certain)]) == list(certain)

    def tokens_of(self, contents: str | None, prompt: int, text: str) -> Sequence[int] | None:
        """PEFT's tokens that make ``text``, or None; as much of it as is not certain is taken for right."""
        certain = self.expected[contents][prompt][:NEW_TOKENS]
        made = [str(self.decode(certain[:count])) for count in range(len(certain) + 1)]
        if text in made:
            longest = len(made) - 1 - made[::-1].index(text)  # a token may add nothing that can be read
            return certain[:longest]
        if len(certain) < NEW_TOKENS and text.startswith(made[-1]):
            return [*certain, *[0] * (NEW_TOKENS - len(certain))]
        return None

    def who(self, prompt: int, answer: Sequence[int]) -> list[str]:
        """Contents that answer so, for the report of a wrong answer."""
        return [str(contents) for contents in self.expected if self.right(contents, prompt, answer)]


def build(folder: Path, contents: int, prompts: int, seed: int) -> World:
    """Make ``contents`` adapters and ``prompts`` prompts, and ask PEFT for all answers."""
    model = build_model(folder / "model", "llama", seed=seed, **SIZES)
    choices = {f"c{i}": AdapterChoice(BLOCKS[i % 4], rank=4, use_rslora=i % 5 == 4) for i in range(contents)}
    folders = build_adapters(model, folder / "contents", choices)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = Random(seed)
    asked = [_chat_prompt(tokenizer), *_prompts(rng, prompts - 1)]
    expected = _peft_answers(model, folders, asked)
    return World(model=model, contents=folders, prompts=asked, expected=expected, decode=tokenizer.decode)


def _chat_prompt(tokenizer: Any) -> list[int]:
    message = [{"role": "user", "content": CHAT}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text)["input_ids"])


def _prompts(rng: Random, count: int) -> list[list[int]]:
    """Conversations of a few beginnings: each goes on from one that is there, or begins anew."""
    roots = [[rng.randrange(VOCAB) for _ in range(16)] for _ in range(2)]
    made: list[list[int]] = []
    for i in range(count):
        before = roots[i % 2] if i < 4 else rng.choice([*roots, *made, []])
        more = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        made.append((before + more)[:32])
    return made


def _peft_answers(
    model: Path, folders: Mapping[str, Path], prompts: Sequence[Sequence[int]]
) -> dict[str | None, list[list[int]]]:
    lengths = [LONG_TOKENS if i == len(prompts) - 1 else NEW_TOKENS for i in range(len(prompts))]
    return answers_by_adapter(
        model,
        folders,
        lambda peft_model: [
            _certain_tokens(peft_model, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)
        ],
    )


def _certain_tokens(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy tokens up to the first near tie."""
    found = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=VOCAB + 1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    first, second = torch.cat(found.logits).topk(2).values.unbind(-1)
    close = (first - second < MARGIN).nonzero()
    certain = int(close[0]) if len(close) else new_tokens
    return list(found.sequences[0, len(prompt) :][:certain].tolist())
