"""What block-diagonal costs in quality: plain LoRA against it at equal rank, and at no more parameters.

SmolLM2-135M-Instruct learns the German names of emoji (``names.py``) with PEFT; adapters on all linears of its last
layers. The layers below are frozen and have no adapter, so their output is computed once and kept: the function is the
whole model's, at a fraction of the time. Learning rate and schedule are the same for all variants, not tuned for any.

    python -m benchmark.quality.train [--steps 48] [--seeds 3] [--layers 4]
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from blocklora_testing import smollm2
from sglang_blocklora.tools.match_rank import match_rank, plain_parameters
from tqdm import tqdm

from benchmark.quality import names
from benchmark.record import Recorder

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
RANK, NBLOCKS = 16, 8
BATCH = 8
CHUNK = 64  # examples at once through the frozen layers
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Shape:
    """An adapter's LoRA rank and number of blocks; 1 is plain."""

    rank: int
    nblocks: int


@dataclass(frozen=True)
class Examples:
    """What the adapted layers read, ``[examples, length, hidden size]``; labels and mask, ``[examples, length]``."""

    hidden: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor

    def chosen(self, which: torch.Tensor) -> Examples:
        """Those rows, cut to their longest."""
        length = int(self.mask[which].sum(1).max())
        return Examples(self.hidden[which, :length], self.labels[which, :length], self.mask[which, :length])


def cut(model: Any, layers: int, encoded: list[tuple[torch.Tensor, ...]]) -> list[Examples]:
    """Keep the last ``layers`` of ``model`` in it; return what the removed ones make of each encoded set."""
    body, norm = model.model, model.model.norm
    below, above = body.layers[:-layers], body.layers[-layers:]
    body.layers, body.norm = below, torch.nn.Identity()
    examples = []
    with torch.no_grad():
        for ids, labels, mask in encoded:
            lengths = mask.sum(1)
            hidden = torch.zeros(*ids.shape, model.config.hidden_size)
            for which in lengths.argsort().split(CHUNK):
                part = slice(int(lengths[which].max()))
                body_of = body(input_ids=ids[which, part], attention_mask=mask[which, part], use_cache=False)
                hidden[which, part] = body_of.last_hidden_state
            examples.append(Examples(hidden, labels, mask))
    body.layers, body.norm = above, norm
    return examples


def loss_of(model: Any, examples: Examples) -> torch.Tensor:
    """Mean cross entropy of the answer tokens; the vocabulary projection runs at their positions only."""
    causal = model.get_base_model()
    body = causal.model(inputs_embeds=examples.hidden, attention_mask=examples.mask, use_cache=False)
    wanted = examples.labels[:, 1:]
    at = wanted != names.IGNORED
    return torch.nn.functional.cross_entropy(causal.lm_head(body.last_hidden_state[:, :-1][at]), wanted[at])


def wrap(model: Any, shape: Shape) -> Any:
    """``model`` with a fresh trainable adapter."""
    from peft import BdLoraConfig, LoraConfig, get_peft_model

    blocks = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=COLUMN, nblocks=shape.nblocks)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=2 * shape.rank,
        target_modules=COLUMN + ROW,
        use_bdlora=blocks if shape.nblocks > 1 else None,
    )
    return get_peft_model(model, config)


def train(base: Any, shape: Shape, training: Examples, held_out: Examples, steps: int, seed: int) -> dict[str, float]:
    """Figures of one adapter after ``steps`` batches; ``seed`` makes its start and the order of the examples."""
    torch.manual_seed(seed)
    model = wrap(copy.deepcopy(base), shape)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    order = torch.cat([torch.randperm(len(training.mask)) for _ in range(steps * BATCH // len(training.mask) + 1)])
    losses = []
    for step in range(steps):
        loss = loss_of(model, training.chosen(order[step * BATCH : (step + 1) * BATCH]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
    with torch.inference_mode():
        everything = torch.arange(len(held_out.mask))
        return {
            "eval_loss": loss_of(model, held_out.chosen(everything)).item(),
            "train_loss": sum(losses[-10:]) / len(losses[-10:]),
            "parameters": sum(parameter.numel() for parameter in trainable),
        }


def shapes(model: Any) -> dict[str, Shape]:
    """The variants, on the linears of ``model``'s layers."""
    linears = [
        (name.rsplit(".", 1)[-1], module.in_features, module.out_features)
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    matched = match_rank(linears, NBLOCKS, plain_parameters(linears, RANK)).rank
    return {
        f"plain, r = {RANK}": Shape(RANK, 1),
        f"block-diagonal, r = {RANK} (equal rank)": Shape(RANK, NBLOCKS),
        f"block-diagonal, r = {matched} (no more parameters)": Shape(matched, NBLOCKS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="how many of the last layers are adapted")
    options = parser.parse_args()
    print("reading SmolLM2-135M-Instruct", flush=True)
    model, tokenizer = smollm2.load_gguf_model(), smollm2.load_gguf_tokenizer()
    model.requires_grad_(False)
    pairs = names.pairs()
    total = len(model.model.layers)
    used = pairs[names.HELD_OUT :][: options.steps * BATCH]
    encoded = [names.encode(tokenizer, part) for part in (used, pairs[: names.HELD_OUT])]
    print(f"{len(used) + names.HELD_OUT} names through {total - options.layers} layers, once", flush=True)
    training, held_out = cut(model, options.layers, encoded)
    settings = {
        "model": f"SmolLM2-135M-Instruct, float32, all linears of its last {options.layers} of {total} layers adapted",
        "task": "German names of emoji from English ones (PyPI package emoji), "
        f"{len(training.mask)} to learn from, {len(held_out.mask)} held out; loss of the answer's tokens",
        "training": f"{options.steps} steps of {BATCH}, AdamW, learning rate {LEARNING_RATE:g} with linear decay, "
        f"alpha = 2r, n = {NBLOCKS}",
        "rounds": f"{options.seeds} seeds",
    }
    recorder = Recorder("quality", 0, settings)
    runs = [(seed, name, shape) for seed in range(options.seeds) for name, shape in shapes(model).items()]
    for seed, name, shape in tqdm(runs, unit="adapter", disable=None):
        figures = train(model, shape, training, held_out, options.steps, seed)
        recorder.add("held-out loss", name, seed, figures)
        print(f"seed {seed}, {name}: eval loss {figures['eval_loss']:.3f}", flush=True)
    recorder.finish()


if __name__ == "__main__":
    main()
