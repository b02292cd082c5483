"""Writes the results of the adapter tools as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from sglang_blocklora.sharding.architectures import kind_of
from sglang_blocklora.tools.convert import Conversion
from sglang_blocklora.tools.inspect_adapter import Inspection
from sglang_blocklora.tools.match_rank import MatchedRank
from sglang_blocklora.tools.sizing import Sizing
from sglang_blocklora.tools.verify import Verification


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    cells = [list(header), *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def inspection_text(found: Inspection) -> str:
    structure = f"block-diagonal, nblocks {found.nblocks}" if found.nblocks > 1 else "plain LoRA"
    rank = f"rank {found.rank}{' (rslora)' if found.use_rslora else ''}"
    head = (
        f"{found.path}\n{structure}, {rank}, {found.layers} layers, {found.parameters:,} parameters\n"
        f"sha256 {found.content_hash}\n"
    )
    if found.invocation:
        text = "" if found.invocation_text is None else f", {found.invocation_text!r}"
        head += f"activated by tokens {', '.join(map(str, found.invocation))}{text}\n"
    modules = table(
        ("module", "count", "kind", "factor", "orientation", "rank", "n", "in", "out", "parameters"),
        (tuple(dataclasses.asdict(group).values()) for group in found.modules),
    )
    costs = table(
        ("TP", f"bytes per TP rank ({found.dtype})", "slots", "arena bytes per TP rank"),
        (
            (
                cost.tp_size,
                f"{max(cost.bytes_per_rank):,}",
                "-" if cost.slots is None else cost.slots,
                "-" if cost.arena_bytes is None else f"{cost.arena_bytes:,}",
            )
            for cost in found.tp
        ),
    )
    return "\n".join((head, modules, "", costs, *(f"warning: {warning}" for warning in found.warnings)))


def match_text(matched: MatchedRank) -> str:
    """The rank, and what to train with: an expression of PEFT's classes."""
    row = [module for module in matched.modules if kind_of(module) == "row"]
    column = [module for module in matched.modules if kind_of(module) == "column"]
    return (
        f"rank {matched.rank} (nblocks {matched.nblocks}, {matched.block_rank} a block): {matched.parameters:,} of "
        f"{matched.budget:,} parameters ({matched.parameters / matched.budget:.1%})\n\n"
        f"LoraConfig(\n    r={matched.rank},\n    lora_alpha={2 * matched.rank},\n"
        f"    target_modules={[*column, *row]},\n    use_bdlora=BdLoraConfig(\n"
        f"        target_modules_bd_a={row},\n        target_modules_bd_b={column},\n"
        f"        nblocks={matched.nblocks},\n    ),\n)"
    )


def conversion_text(made: Conversion) -> str:
    losses = table(
        ("module", "rank", "relative error"),
        ((loss.module, loss.rank, f"{loss.relative_error:.3g}") for loss in made.modules),
    )
    return (
        f"{losses}\n\nwrote {made.path}: rank {made.rank}, nblocks {made.nblocks}, {made.parameters:,} parameters "
        f"(before: {made.parameters_before:,}), largest relative error {made.max_relative_error:.3g}"
    )


def sizing_text(found: Sizing) -> str:
    structure = f"{found.nblocks} blocks" if found.nblocks > 1 else "plain LoRA"
    beside = f" beside {found.kv_tokens:,} tokens of KV" if found.kv_tokens else ", with nothing left for KV"
    estimated = " (estimated: a server tells the true number)" if found.estimated else ""
    rows = (
        ("an adapter", f"{found.slots_per_adapter:,} slots, {found.bytes_per_adapter / 2**20:,.1f} MiB"),
        ("slots", f"{found.slots:,} of {found.slot_bytes:,} bytes{estimated}"),
        ("resident", f"{found.resident:,} adapters{beside}"),
        ("in host memory", f"{found.in_host_memory:,} adapters; more are read from disk when they are asked for"),
    )
    head = f"rank {found.rank}, {structure}, {found.dtype}; on each of {found.tp_size} TP ranks"
    return "\n".join((head, *(f"{name:<16}{value}" for name, value in rows)))


def verification_text(checks: Iterable[Verification]) -> str:
    return table(
        ("TP", "modules", "largest relative error", "in module", "result"),
        (
            (c.tp_size, c.modules, f"{c.max_relative_error:.2g}", c.worst_module, "ok" if c.passed else "FAILED")
            for c in checks
        ),
    )
