"""Per-rank linears of the benchmark's models, and adapters with the parameters of a plain LoRA."""

from __future__ import annotations

from typing import NamedTuple

HEAD_DIM = 128


class Model(NamedTuple):
    """Llama-3.1: hidden width, KV heads, MLP width (q has the hidden width)."""

    hidden: int
    kv_heads: int
    inter: int


MODELS = {"8B": Model(4096, 8, 14336), "70B": Model(8192, 8, 28672)}


class Linear(NamedTuple):
    """One linear on one TP rank; ``row_parallel``: its input is cut, else its output."""

    name: str
    in_features: int
    outputs: tuple[int, ...]
    row_parallel: bool


def linears(model: Model, tp: int) -> list[Linear]:
    kv = model.kv_heads * HEAD_DIM
    return [
        Linear("qkv", model.hidden, (model.hidden // tp, kv // tp, kv // tp), False),
        Linear("o", model.hidden // tp, (model.hidden,), True),
        Linear("gate_up", model.hidden, (model.inter // tp, model.inter // tp), False),
        Linear("down", model.inter // tp, (model.hidden,), True),
    ]


def row_width(model: Model, tp: int) -> int:
    """Elements of an arena row: the K row of one token in one layer on one TP rank."""
    return model.kv_heads * HEAD_DIM // tp


def parameters_per_rank(model: Model, nblocks: int) -> int:
    """Adapter parameters of one layer and unit of rank, all TP ranks together."""
    kv = model.kv_heads * HEAD_DIM
    column = [model.hidden, kv, kv, model.inter, model.inter]
    row = [model.hidden, model.inter]
    return sum(model.hidden + out // nblocks for out in column) + sum(i // nblocks + model.hidden for i in row)


def matched_rank(model: Model, plain_rank: int, nblocks: int) -> int:
    """Largest rank of a block-diagonal adapter, a multiple of ``nblocks``, with no more parameters than plain LoRA."""
    budget = plain_rank * parameters_per_rank(model, 1)
    return budget // parameters_per_rank(model, nblocks) // nblocks * nblocks


class Adapter(NamedTuple):
    """Local factors of each slice on one TP rank: rows of A and columns of B, and what the whole adapter is."""

    kind: str
    rank: int
    local_rank: int


def adapters(model: Model, tp: int) -> list[Adapter]:
    """Plain LoRA of rank 16 and 64 (whole on each TP rank), and block-diagonal ones of equal parameters, n = TP."""
    found = [Adapter("plain", rank, rank) for rank in (16, 64)]
    if tp > 1:
        found += [
            Adapter(f"BD matched to {rank}", matched, matched // tp)
            for rank in (16, 64)
            for matched in [matched_rank(model, rank, tp)]
        ]
    return found
