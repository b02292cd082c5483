"""Toy decoders without SGLang: their linears as a TP rank sees them, and random adapters in PEFT's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from sglang_blocklora.adapters.loading import Found
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.sharding.linears import Interval, LinearSpec, ModelSpec, Source

from blocklora_testing.ranks import HandReads

ROW_MODULES = ("o_proj", "down_proj")
# Llama-3.1-8B, as its config.json has it.
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class ToyModel:
    """Sizes of a Llama-like decoder. Where one does not divide by the TP size the last ranks hold padding."""

    layers: int = 2
    hidden: int = 24
    heads: int = 24
    kv_heads: int = 24
    head_dim: int = 2
    intermediate: int = 48
    fused: bool = False

    def shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Module path -> (in, out) of the layer's Hugging Face linears."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attn, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        down = {f"{attn}.o_proj": (q, self.hidden), f"{mlp}.down_proj": (self.intermediate, self.hidden)}
        if self.fused:
            return {
                f"{attn}.qkv_proj": (self.hidden, q + 2 * kv),
                f"{mlp}.gate_up_proj": (self.hidden, 2 * self.intermediate),
            } | down
        return {
            f"{attn}.q_proj": (self.hidden, q),
            f"{attn}.k_proj": (self.hidden, kv),
            f"{attn}.v_proj": (self.hidden, kv),
            f"{mlp}.gate_proj": (self.hidden, self.intermediate),
            f"{mlp}.up_proj": (self.hidden, self.intermediate),
        } | down

    def spec(self, rank: int, size: int, dtype: torch.dtype = torch.float64, row_width: int = 40) -> ModelSpec:
        return ModelSpec(
            layers=tuple(self._layer(i, rank, size) for i in range(self.layers)),
            row_width=row_width,
            dtype=dtype,
            vocab_size=1000,
            tp_rank=rank,
            tp_size=size,
        )

    def _layer(self, layer: int, rank: int, size: int) -> tuple[LinearSpec, ...]:
        attn, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        share = lambda total: Interval(-(-total // size) * rank, -(-total // size) * (rank + 1), total)  # noqa: E731
        if size > self.kv_heads and size % self.kv_heads == 0:  # replicated KV heads
            head = rank // (size // self.kv_heads)
            kv_share = Interval(head * self.head_dim, (head + 1) * self.head_dim, kv)
        else:
            kv_share = share(kv)
        whole = lambda total: Interval(0, total, total)  # noqa: E731
        if self.fused:
            qkv = {f"{attn}.qkv_proj": Source((0, 1, 2), (0, q, q + kv), q + 2 * kv)}
            gate_up = {f"{mlp}.gate_up_proj": Source((0, 1), (0, self.intermediate), 2 * self.intermediate)}
        else:
            qkv = {
                f"{attn}.{x}_proj": Source((i,), (0,), s) for i, (x, s) in enumerate([("q", q), ("k", kv), ("v", kv)])
            }
            gate_up = {f"{mlp}.{x}_proj": Source((i,), (0,), self.intermediate) for i, x in enumerate(["gate", "up"])}
        return (
            LinearSpec(
                name=f"{attn}.qkv_proj",
                kind="column",
                inputs=whole(self.hidden),
                outputs=(share(q), kv_share, kv_share),
                sources=qkv,
            ),
            LinearSpec(
                name=f"{attn}.o_proj",
                kind="row",
                inputs=share(q),
                outputs=(whole(self.hidden),),
                sources={f"{attn}.o_proj": Source((0,), (0,), self.hidden)},
            ),
            LinearSpec(
                name=f"{mlp}.gate_up_proj",
                kind="column",
                inputs=whole(self.hidden),
                outputs=(share(self.intermediate), share(self.intermediate)),
                sources=gate_up,
            ),
            LinearSpec(
                name=f"{mlp}.down_proj",
                kind="row",
                inputs=share(self.intermediate),
                outputs=(whole(self.hidden),),
                sources={f"{mlp}.down_proj": Source((0,), (0,), self.hidden)},
            ),
        )


def write_adapter(
    folder: Path,
    model: ToyModel,
    *,
    rank: int = 6,
    nblocks: int | None = None,
    orientation: str = "right",
    targets: tuple[str, ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> dict[str, torch.Tensor]:
    """Write a random adapter in PEFT's format and return each module's dense delta, scaling included (float64).

    nblocks      None for plain LoRA; orientation "right" or "wrong" (A-blocks on column layers and the reverse)
    targets      module suffixes, None for all; options go into adapter_config.json
    The deltas are dense algebra from the packed chunks, independent of the code under test.
    """
    generator = torch.Generator().manual_seed(seed)
    rank_pattern: dict[str, int] = options.get("rank_pattern", {})  # type: ignore[assignment]
    tensors, deltas = {}, {}
    for layer in range(model.layers):
        for module, (inputs, outputs) in model.shapes(layer).items():
            suffix = module.rsplit(".", 1)[-1]
            if targets is not None and suffix not in targets:
                continue
            r = rank_pattern.get(suffix, rank)
            row = suffix in ROW_MODULES
            block_a = nblocks is not None and (row if orientation == "right" else not row)
            n = nblocks or 1
            a = torch.randn(r, inputs // n if block_a else inputs, generator=generator, dtype=torch.float64)
            b = torch.randn(outputs, r // n if nblocks and not block_a else r, generator=generator, dtype=torch.float64)
            a, b = a.to(dtype), b.to(dtype)
            name = f"base_model.model.{module}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
            dense_a = torch.block_diag(*a.double().chunk(n)) if block_a else a.double()
            dense_b = torch.block_diag(*b.double().chunk(n)) if nblocks and not block_a else b.double()
            deltas[module] = dense_b @ dense_a * scaling(suffix, r, options)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    column = sorted({m.rsplit(".", 1)[-1] for m in model.shapes(0)} - set(ROW_MODULES))
    bd_a, bd_b = (list(ROW_MODULES), column) if orientation == "right" else (column, list(ROW_MODULES))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "bias": "none"} | options
    if nblocks is not None:
        config["use_bdlora"] = {
            "target_modules_bd_a": bd_a,
            "target_modules_bd_b": bd_b,
            "nblocks": nblocks,
            "match_strict": True,
        }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def scaling(suffix: str, rank: int, options: dict) -> float:
    """alpha / r of a module under the options of ``write_adapter``."""
    alpha = options.get("alpha_pattern", {}).get(suffix, options.get("lora_alpha", 16))
    return alpha / rank**0.5 if options.get("use_rslora") else alpha / rank


def host_only_images() -> ImageStore:
    """Images that stay in host memory: nothing is ever read again."""

    def read(adapter) -> Found:
        raise AssertionError(f"{adapter.name} was read again")

    return ImageStore(2**60, 1, read, HandReads(), DecisionLog(None, 0))
