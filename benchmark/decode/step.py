"""What the parts about a decode step share: the model, their options, the order of rounds, and how a step is timed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmark.serving import client, tiny
from benchmark.serving.client import Dialect

MODEL = "Llama, 8 layers, hidden 512, FFN 1024, 8 + 8 heads, bfloat16"
SIZES = {"layers": 8, "hidden_size": 512, "intermediate_size": 1024, "heads": 8, "kv_heads": 8, "head_dim": 64}
PROMPT_TOKENS = 16
SHORT, LONG = 16, 48  # tokens of the two answers whose times are compared
WORKLOAD = f"all requests at once, prompts of {PROMPT_TOKENS} random tokens, {SHORT} and {LONG} new tokens"

Requests = list[tuple[list[int], str | None]]  # token ids of a prompt, and an adapter's name or None


def parser(document: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options ``tp``, ``batch`` (sizes) and ``rounds`` of a part that ``document`` describes."""
    made = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tp", type=int, default=2)
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--rounds", type=int, default=rounds)
    return made


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Number of a round and a name, forth in one round and back in the next; round -1 comes first and warms up."""
    for number in range(-1, rounds):
        for name in names[:: -1 if number % 2 else 1]:
            yield number, name


def make_requests(batch: int, names: Sequence[str | None], generator: torch.Generator) -> Requests:
    """``batch`` random prompts, for ``names`` in turn."""
    prompts = torch.randint(0, tiny.VOCAB, (batch, PROMPT_TOKENS), generator=generator).tolist()
    return [(prompt, names[i % len(names)]) for i, prompt in enumerate(prompts)]


def time_step(url: str, requests: Requests, dialect: Dialect) -> dict[str, float]:
    """``step_ms``, what a long answer takes beyond a short one, a token; ``short_ms``, the short ones. Milliseconds."""
    short, long = (client.whole(url, requests, tokens, dialect) for tokens in (SHORT, LONG))
    return {"step_ms": (long - short) / (LONG - SHORT) * 1000, "short_ms": short * 1000}
