"""The model of the CPU benchmarks: a tiny Llama whose step is dominated by fixed costs, as decode on a GPU is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from sglang_blocklora.tools.match_rank import match_rank, plain_parameters

from benchmark.serving.workload import Workload

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 4, 256, 768, 8, 4, 32
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
COLUMN = [("q_proj", HIDDEN, Q), ("k_proj", HIDDEN, KV), ("v_proj", HIDDEN, KV)]
COLUMN += [("gate_proj", HIDDEN, FFN), ("up_proj", HIDDEN, FFN)]
ROW = [("o_proj", Q, HIDDEN), ("down_proj", FFN, HIDDEN)]
BYTES = 4  # float32
DESCRIPTION = f"tiny Llama, {LAYERS} layers, hidden {HIDDEN}, FFN {FFN}, {HEADS} + {KV_HEADS} heads, float32"


def matched_rank(rank: int, nblocks: int) -> int:
    """Rank of a block-diagonal adapter with no more parameters than the plain one of ``rank``."""
    return match_rank(COLUMN + ROW, nblocks, plain_parameters(COLUMN + ROW, rank)).rank


def plain_bytes(tp: int) -> int:
    """Bytes on each TP rank of one LoRA rank of a plain adapter: A whole on column layers, B whole on row layers."""
    column = sum(inputs + outputs // tp for _, inputs, outputs in COLUMN)
    row = sum(inputs // tp + outputs for _, inputs, outputs in ROW)
    return LAYERS * (column + row) * BYTES


def kv_bytes(tp: int) -> int:
    """Bytes on each TP rank of one token's K and V."""
    return LAYERS * 2 * (KV_HEADS // tp) * HEAD_DIM * BYTES


SIZES = {
    "layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
}


def build(
    folder: Path, choices: Mapping[str, AdapterChoice], sizes: Mapping[str, int] = SIZES
) -> tuple[Path, dict[str, Path]]:
    """The model's folder, and name -> folder of the adapters."""
    print(f"making the model and {len(choices)} adapters", flush=True)
    model = build_model(folder / "model", "llama", **sizes)
    return model, build_adapters(model, folder / "adapters", choices)


def all_at_once(batches: Sequence[int], prompt_tokens: int, new_tokens: int, adapters: int = 1) -> dict[str, Workload]:
    """A scenario for each batch size: so many requests at the same time, each for one of ``adapters``, drawn evenly."""
    return {
        f"Batch {batch}": Workload(
            batch,
            math.inf,
            adapters,
            "zipf:0",
            user_tokens=(prompt_tokens, prompt_tokens + 1),
            new_tokens=(new_tokens, new_tokens + 1),
            vocab=VOCAB,
        )
        for batch in batches
    }


def lora_paths(adapters: Mapping[str, Path]) -> tuple[str, ...]:
    """SGLang's flag for loading them at the start."""
    return ("--lora-paths", *(f"{name}={path}" for name, path in adapters.items()))


def prompts_and_answers(
    model: Path, adapters: Mapping[str, Path], lengths: tuple[int, ...], new_tokens: int
) -> tuple[list[list[int]], dict[str | None, list[list[int]]]]:
    """Random prompts, and PEFT's greedy tokens for the base model (None) and each adapter."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return prompts, peft_tokens(model, adapters, prompts, new_tokens)


__all__ = ["VOCAB", "AdapterChoice"]
