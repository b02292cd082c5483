"""(d) One TP rank of eight on one GPU: stock SGLang LoRA and ours at the per-rank shapes of TP 8. Not yet run on one.

The model is one eighth of Llama-3.1-8B or 70B (heads, KV heads, FFN and vocabulary divided by 8, hidden size kept) with
dummy weights, served at TP 1 by the real scheduler with CUDA graphs. Adapters have the shapes that one of eight ranks
holds: of a plain adapter of rank r under stock SGLang (A of column layers and B of row layers whole), and of a
block-diagonal one matched in parameters with 8 blocks, which on one rank is a plain adapter of rank r'/8.
No collective runs, so what is compared is kernels and host time; stock's two all-reduces a layer come on top of it.
Weights are random, so tokens are not checked here; the kernels' own tests do that on the same GPU.

    python -m benchmark.paper.one_rank [--model Llama-3.1-8B] [--rank 64] [--batch 1 8 32]

``--model tiny`` runs on a CPU and only shows that the program works.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from blocklora_testing.models import save_tokenizer
from safetensors.torch import save_file
from sglang_blocklora.sharding.architectures import MODULES, SPLIT_MODULES
from sglang_blocklora.tools.base_model import BaseSizes

from benchmark.paper.shardings import LLAMA, matched_rank, modules_of
from benchmark.record import Recorder
from benchmark.serving.fleet import Launch, fleet
from benchmark.serving.runner import Variant, interleave
from benchmark.serving.tiny import lora_paths
from benchmark.serving.workload import Workload

TP = 8
WHOLE = LLAMA | {
    "tiny": BaseSizes(hidden=256, intermediate=768, heads=8, kv_heads=8, head_dim=32, layers=2, vocab=2048)
}
VOCAB = 256  # of the tokenizer; prompts stay below it
VARIANTS = {
    "base": Variant("stock", [None]),
    "stock LoRA": Variant("stock", ["plain"]),
    "ours, base model": Variant("ours", [None]),
    "ours, block-diagonal": Variant("ours", ["bd"]),
    "base again (noise)": Variant("stock", [None]),
}


def one_eighth(base: BaseSizes) -> BaseSizes:
    """What one of eight TP ranks holds of a model whose heads divide by 8."""
    return BaseSizes(
        hidden=base.hidden,
        intermediate=base.intermediate // TP,
        heads=base.heads // TP,
        kv_heads=base.kv_heads // TP,
        head_dim=base.head_dim,
        layers=base.layers,
        vocab=base.vocab // TP,
    )


def save_model(base: BaseSizes, folder: Path) -> Path:
    """A folder with config and tokenizer; SGLang makes up the weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=base.vocab,
        hidden_size=base.hidden,
        intermediate_size=base.intermediate,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.kv_heads,
        head_dim=base.head_dim,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(base: BaseSizes, rank: int, folder: Path) -> Path:
    """A random plain adapter of ``rank`` on all linears, in PEFT's format."""
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(base.layers):
        for suffix, inputs, outputs in modules_of(base):
            name = f"base_model.model.model.layers.{layer}.{MODULES[suffix].parent}.{suffix}"
            for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=generator) * 0.01
                tensors[f"{name}.lora_{factor}.weight"] = values.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": list(SPLIT_MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def workload(batch: int, tokens: int) -> Workload:
    """``batch`` requests at once, prompts of 64 tokens."""
    return Workload(batch, math.inf, 1, "zipf:0", user_tokens=(64, 65), new_tokens=(tokens, tokens + 1), vocab=VOCAB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WHOLE), default="Llama-3.1-8B")
    parser.add_argument("--rank", type=int, default=64, help="rank of the plain adapter")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    whole = WHOLE[options.model]
    base, bd_rank = one_eighth(whole), matched_rank(whole, options.rank, TP)
    settings = {
        "model": f"one of {TP} TP ranks of {options.model}, dummy weights, bfloat16",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: no figure about GPUs",
        "adapters": f"plain rank {options.rank}; block-diagonal rank {bd_rank}, {bd_rank // TP} on a TP rank",
        "rounds": options.rounds,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_model(base, folder / "model")
        plain = save_adapter(base, options.rank, folder / "plain")
        bd = save_adapter(base, bd_rank // TP, folder / "bd")
        common = ("--load-format", "dummy", "--dtype", "bfloat16", "--disable-radix-cache")
        common += ("--mem-fraction-static", "0.4")
        launches = {
            "stock": Launch(True, (*common, *lora_paths({"plain": plain}))),
            "ours": Launch(False, (*common, "--adapter-memory", "static", *lora_paths({"bd": bd}))),
        }
        if not torch.cuda.is_available():
            launches["stock"] = Launch(True, (*launches["stock"].flags, "--lora-backend", "torch_native"))
        scenarios = {f"{options.model}, batch {batch}": workload(batch, options.tokens) for batch in options.batch}
        recorder = Recorder("one_rank", 0, settings)
        with fleet(model, launches, folder) as members:
            interleave(recorder, members, VARIANTS, scenarios, rounds=options.rounds, slo_ttft_s=1.0)
        recorder.finish()


if __name__ == "__main__":
    main()
