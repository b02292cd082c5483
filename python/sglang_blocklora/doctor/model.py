"""Tells which linears of a base model are adapted, and what an adapter costs on each TP rank."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sglang_blocklora import cpu_only, launch_server
from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.inspect_adapter import cost_per_rank
from sglang_blocklora.tools.sizing import shapes, undivided

MIB = 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16, "float32": torch.float32}


def check(asked: Asked) -> Iterator[Finding]:
    """Whether the model that was named is served, its adapted linears, and an adapter's slots on each TP rank."""
    if asked.model is None:
        yield skipped("base model", "none was named (--model FOLDER)")
        return
    try:
        base = BaseSizes.read(Path(asked.model))
    except ValueError as error:
        yield fault(
            "base model",
            str(error).removeprefix("base model: "),
            "Serve it with stock SGLang, or another model with us (README.md).",
        )
        return
    unsure = "" if base.compared else "; not compared with PEFT, so a server checks them when it loads the model"
    yield ok("adapted linears", f"{', '.join(one.name for one in base.linears)} of {base.layers} layers{unsure}")
    yield from cost(base, asked, on_gpu=not cpu_only.is_cpu_only())


def cost(base: BaseSizes, asked: Asked, on_gpu: bool) -> Iterator[Finding]:
    """What the adapter that was asked for costs."""
    what = f"an adapter of rank {asked.rank}"
    if on_gpu and base.engine_for(asked.tp) == "cpu":
        found = f"{base.heads} heads, {base.kv_heads} KV heads and {base.intermediate} columns do not divide by it"
        yield fault(f"TP size {asked.tp}", found, "Use a --tp that divides them.")
        return
    if wrong := undivided(base, asked.rank, asked.nblocks):
        yield fault(what, f"{wrong} is no multiple of nblocks {asked.nblocks}", "Choose another --nblocks or --rank.")
        return
    dtype = served_dtype(asked.flags)
    _, slots, size = cost_per_rank(base, shapes(base, asked.rank, asked.nblocks), asked.tp, dtype)
    kind = f"{asked.nblocks} blocks" if asked.nblocks > 1 else "plain LoRA"
    found = (
        f"{slots} slots, {size / MIB:.1f} MiB on each of {asked.tp} TP ranks "
        f"({kind}, {str(dtype).removeprefix('torch.')})"
    )
    settings = launch_server.parse(asked.launch_flags)[0]
    arena = settings.adapter_memory_mb * MIB
    if settings.adapter_memory == "static" and size > arena:
        yield fault(what, f"{found}; the arena has {arena / MIB:g} MiB", "Give a larger --adapter-memory-mb.")
    else:
        yield ok(what, found)


def served_dtype(flags: Sequence[str]) -> torch.dtype:
    """Data type of the weights, from ``flags`` of the launcher; without one all models are served in 16 bits."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    return DTYPES.get(parser.parse_known_args(flags)[0].dtype, torch.bfloat16)
