"""Adapters of PEFT, plain and block-diagonal, and how they are trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from sglang_blocklora.sharding.architectures import kind_of
from sglang_blocklora.tools.match_rank import match_rank, plain_parameters

from benchmark.quality.frozen import Examples, loss_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BATCH = 8


@dataclass(frozen=True)
class Shape:
    """An adapter's LoRA rank and blocks: ``blocks`` on the linears ``in_blocks``, plain factors on the others."""

    rank: int
    blocks: int = 1
    in_blocks: tuple[str, ...] = ATTENTION + MLP


def wrap(base: Any, shape: Shape) -> Any:
    """A copy of ``base`` with a fresh adapter to train."""
    from peft import BdLoraConfig, LoraConfig, get_peft_model  # not before the base model's loader has run

    chosen = {kind: [name for name in shape.in_blocks if kind_of(name) == kind] for kind in ("row", "column")}
    blocks = BdLoraConfig(
        target_modules_bd_a=chosen["row"],
        target_modules_bd_b=chosen["column"],
        nblocks=shape.blocks,
        match_strict=False,  # the others are plain
    )
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=2 * shape.rank,
        target_modules=[*ATTENTION, *MLP],
        use_bdlora=blocks if shape.blocks > 1 else None,
    )
    return get_peft_model(copy.deepcopy(base), config)


def parameters(model: Any) -> int:
    """How many of ``model`` are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def rank_within(base: Any, blocks: int, plain_rank: int) -> int:
    """The rank of ``blocks`` blocks on all linears of ``base`` with no more parameters than plain ``plain_rank``."""
    linears = [
        (name.rsplit(".", 1)[-1], module.in_features, module.out_features)
        for name, module in base.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return match_rank(linears, blocks, plain_parameters(linears, plain_rank)).rank


def train(model: Any, examples: Examples, steps: int, learning_rate: float, seed: int) -> float:
    """Train ``model``'s adapter; mean loss of the last ten batches. ``seed`` makes the order of the examples."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    passes = steps * BATCH // len(examples.mask) + 1
    order = torch.cat([torch.randperm(len(examples.mask), generator=generator) for _ in range(passes)])
    losses = []
    for step in range(steps):
        loss = loss_of(model, examples.chosen(order[step * BATCH : (step + 1) * BATCH]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])
