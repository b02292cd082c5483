"""What block-diagonal costs in quality, what wins it back, and how a converted adapter fares.

SmolLM2-135M-Instruct learns the German names of emoji (``names.py``) with PEFT; adapters on all linears of its last
layers. Every variant has the learning rate that is best for it, of the same ones, by a seed and examples of their own.
Then each is trained with the same seeds, and the loss on names that none has seen is set against plain LoRA's of that
seed: mean and 95 % confidence interval (Student's t).

    python -m benchmark.quality.train [--steps 96] [--seeds 5] [--layers 4] [--learning-rates 2e-3 4e-3 8e-3 16e-3]
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blocklora_testing import smollm2
from sglang_blocklora.tools.convert import convert
from tqdm import tqdm

from benchmark.quality import names
from benchmark.quality.adapters import BATCH, MLP, Shape, parameters, rank_within, train, wrap
from benchmark.quality.frozen import Examples, cut, eval_loss
from benchmark.record import Recorder

RANK, BLOCKS = 16, 8
PLAIN = f"plain, r = {RANK}"
TUNING_SEED = 1000  # of none of the runs that count
SCENARIO = "held-out loss"
PART = 4  # a converted adapter is trained on for this part of the steps


@dataclass(frozen=True)
class Task:
    """The base model, cut to the layers that are adapted, and three sets of examples that share no name."""

    base: Any
    training: Examples
    tuning: Examples
    held_out: Examples
    steps: int


def load(steps: int, layers: int) -> tuple[Task, dict[str, str]]:
    """The task, and what a reader has to know of it."""
    print("reading SmolLM2-135M-Instruct", flush=True)
    model, tokenizer = smollm2.load_gguf_model(), smollm2.load_gguf_tokenizer()
    model.requires_grad_(False)
    pairs, n = names.pairs(), names.HELD_OUT
    parts = (pairs[2 * n :][: steps * BATCH], pairs[n : 2 * n], pairs[:n])
    total = len(model.model.layers)
    print(f"{sum(map(len, parts))} names through {total - layers} layers, once", flush=True)
    task = Task(model, *cut(model, layers, [names.encode(tokenizer, part) for part in parts]), steps)
    return task, {
        "model": f"SmolLM2-135M-Instruct, float32, all linears of its last {layers} of {total} layers adapted",
        "task": "German names of emoji from English ones (PyPI package emoji), "
        f"{len(parts[0])} to learn from, {n} to choose the learning rate, {n} held out; loss of the answer's tokens",
        "training": f"{steps} steps of {BATCH}, AdamW with linear decay, alpha = 2r, {BLOCKS} blocks",
    }


def shapes(base: Any) -> dict[str, Shape]:
    """The variants, plain LoRA first."""
    matched = rank_within(base, BLOCKS, RANK)
    return {
        PLAIN: Shape(RANK),
        f"block-diagonal, r = {RANK} (equal rank)": Shape(RANK, BLOCKS),
        f"block-diagonal, r = {matched} (no more parameters)": Shape(matched, BLOCKS),
        f"block-diagonal, r = {BLOCKS * RANK} (equal bytes on each of {BLOCKS} TP ranks)": Shape(BLOCKS * RANK, BLOCKS),
        f"blocks on the MLP only, r = {RANK}": Shape(RANK, BLOCKS, MLP),
    }


def trained(task: Task, shape: Shape, learning_rate: float, seed: int) -> tuple[Any, float]:
    """A new adapter, trained, and its loss in training; ``seed`` makes its start and the order of the examples."""
    torch.manual_seed(seed)
    model = wrap(task.base, shape)
    return model, train(model, task.training, task.steps, learning_rate, seed)


def tune(task: Task, variants: Mapping[str, Shape], rates: list[float], recorder: Recorder) -> dict[str, float]:
    """The best learning rate of each variant."""
    best = {}
    for name, shape in variants.items():
        losses = {rate: eval_loss(trained(task, shape, rate, TUNING_SEED)[0], task.tuning) for rate in rates}
        best[name] = min(losses, key=lambda rate: losses[rate])
        recorder.add("learning rates", name, 0, {f"loss_{rate:g}": loss for rate, loss in losses.items()})
        print(f"{name}: {', '.join(f'{rate:g} {loss:.3f}' for rate, loss in losses.items())}", flush=True)
    return best


def converted(task: Task, plain: Any, rank: int, rate: float, seed: int) -> dict[str, dict[str, float]]:
    """Figures of ``plain``'s adapter made block-diagonal at ``rank``: as it is, and trained on for a while."""
    from peft import PeftModel  # not before the base model's loader has run

    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        made = Path(folder) / "blocks"
        lost = convert(Path(folder), made, BLOCKS, rank, math.inf).max_relative_error
        model = PeftModel.from_pretrained(copy.deepcopy(task.base), str(made), is_trainable=True)
    name = f"converted, r = {rank}"
    found = {name: {"eval_loss": eval_loss(model, task.held_out), "delta_lost": lost, "parameters": parameters(model)}}
    train_loss = train(model, task.training, task.steps // PART, rate, seed)
    loss = eval_loss(model, task.held_out)
    found[f"{name}, {task.steps // PART} steps more"] = {
        "eval_loss": loss,
        "train_loss": train_loss,
        "parameters": parameters(model),
    }
    return found


def measure(task: Task, seeds: int, rates: list[float], recorder: Recorder) -> None:
    """Tune, train, convert; every figure is kept as soon as it is there."""
    variants = shapes(task.base)
    best = tune(task, variants, rates, recorder)
    matched = next(name for name, shape in variants.items() if shape.rank == rank_within(task.base, BLOCKS, RANK))
    for seed in tqdm(range(seeds), unit="seed", disable=None):
        plain_loss = math.nan
        for name, shape in variants.items():
            model, train_loss = trained(task, shape, best[name], seed)
            loss = eval_loss(model, task.held_out)
            found = {name: {"eval_loss": loss, "train_loss": train_loss, "parameters": parameters(model)}}
            found[name]["learning_rate"] = best[name]
            if name == PLAIN:
                plain_loss = loss
                found |= converted(task, model, variants[matched].rank, best[matched], seed)
            for row, figures in found.items():
                recorder.add(SCENARIO, row, seed, figures | {"loss_over_plain": figures["eval_loss"] - plain_loss})
                print(f"seed {seed}, {row}: {figures['eval_loss']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="how many of the last layers are adapted")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 16e-3])
    options = parser.parse_args()
    task, settings = load(options.steps, options.layers)
    settings["learning rates"] = ", ".join(f"{rate:g}" for rate in options.learning_rates)
    settings["rounds"] = f"{options.seeds} seeds"
    recorder = Recorder("quality", 0, settings)
    measure(task, options.seeds, options.learning_rates, recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
