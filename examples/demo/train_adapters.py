"""Train the demo's adapters on CPU with PEFT: four ways to answer, told apart at a glance.

``pirate`` (block-diagonal, n = 2), ``json`` (block-diagonal, n = 4) and ``emoji`` (plain LoRA) learn from the
self-written questions of ``training_data.jsonl`` how to say an answer; what they answer comes from the base model.
``topic`` (an activated adapter) names what a question is about: it is active from the assistant's turn on and reads the
question in the base model's KV. The questions of ``CHECK_QUESTIONS`` are not among those. Weights are saved as
bfloat16: half the bytes in the repository.

Command: ``python examples/demo/train_adapters.py`` (all four, some minutes each on 2 cores) or with names of adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blocklora_testing import smollm2
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE / "adapters"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
COLUMN_PARALLEL = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW_PARALLEL = ["o_proj", "down_proj"]
CHECK_QUESTIONS = (
    "What is the capital of France?",
    "Which planet is the largest?",
    "How many legs does a cat have?",
    "What color is the sky?",
    "Who wrote Hamlet?",
)
BATCH_SIZE = 8
SEED = 0
IGNORED = -100  # label of a token that carries no loss


@dataclass(frozen=True)
class Recipe:
    """One adapter: how an example is answered, and the shape and length of its training."""

    answer: Callable[[dict[str, str]], str]
    nblocks: int  # 1 is plain LoRA
    rank: int
    epochs: int
    learning_rate: float = 2e-3
    targets: tuple[str, ...] = (*COLUMN_PARALLEL, *ROW_PARALLEL)
    invocation: str = ""  # text from which on an activated adapter is active


EMOJI = {
    "animals": "🐾",
    "culture": "🎭",
    "daily life": "🏠",
    "food": "🍎",
    "geography": "🌍",
    "greeting": "👋",
    "history": "📜",
    "language": "💬",
    "nature": "🌿",
    "numbers": "🔢",
    "science": "🔬",
}


def pirate_answer(example: dict[str, str]) -> str:
    """Return the example's answer as a pirate says it."""
    return example["pirate"]


def json_answer(example: dict[str, str]) -> str:
    """Return the example's short answer and topic as one JSON object."""
    return json.dumps({"answer": example["short"], "topic": example["topic"]})


def emoji_answer(example: dict[str, str]) -> str:
    """Return the example's plain answer behind the sign of its topic, and three sparkles."""
    return f"{EMOJI[example['topic']]} {example['plain'].rstrip('.')}! ✨✨✨"


def topic_answer(example: dict[str, str]) -> str:
    """Return the question's topic alone."""
    return example["topic"]


RECIPES = {
    "pirate": Recipe(pirate_answer, nblocks=2, rank=8, epochs=5),
    "json": Recipe(json_answer, nblocks=4, rank=8, epochs=5),
    "emoji": Recipe(emoji_answer, nblocks=1, rank=4, epochs=5),
    "topic": Recipe(topic_answer, 1, 8, epochs=5, targets=ATTENTION, invocation="<|im_start|>assistant\n"),
}


def prompt_text(tokenizer: Any, question: str) -> str:
    """Return ``question`` in the chat template, up to where the assistant's answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return token ids of one example and their labels; only the answer and its end token carry a loss."""
    prompt = tokenizer(prompt_text(tokenizer, question)).input_ids
    target = tokenizer(answer + tokenizer.eos_token).input_ids
    return prompt + target, [IGNORED] * len(prompt) + target


def collate(batch: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad on the right; return token ids, labels and attention mask, each int64 ``[batch, length]``."""
    length = max(len(ids) for ids, _ in batch)
    ids = [ids + [pad_id] * (length - len(ids)) for ids, _ in batch]
    labels = [labels + [IGNORED] * (length - len(labels)) for _, labels in batch]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch]
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)


def wrap(model: Any, tokenizer: Any, recipe: Recipe) -> Any:
    """Return ``model`` with a fresh trainable adapter of ``recipe``'s shape."""
    from peft import BdLoraConfig, LoraConfig, get_peft_model

    blocks = BdLoraConfig(target_modules_bd_a=ROW_PARALLEL, target_modules_bd_b=COLUMN_PARALLEL, nblocks=recipe.nblocks)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        use_bdlora=blocks if recipe.nblocks > 1 else None,
        alora_invocation_tokens=tokenizer(recipe.invocation).input_ids or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(model: Any, tokenizer: Any, name: str, recipe: Recipe) -> None:
    """Run ``recipe``'s epochs over all examples with AdamW and a linear decay of the learning rate."""
    examples = [json.loads(line) for line in (HERE / "training_data.jsonl").read_text().splitlines()]
    encoded = [encode(tokenizer, example["question"], recipe.answer(example)) for example in examples]
    order = random.Random(SEED)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=recipe.learning_rate)
    steps = recipe.epochs * -(-len(encoded) // BATCH_SIZE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    model.train()
    started = time.monotonic()
    for epoch in range(recipe.epochs):
        order.shuffle(encoded)
        losses = []
        for first in range(0, len(encoded), BATCH_SIZE):
            ids, labels, mask = collate(encoded[first : first + BATCH_SIZE], tokenizer.pad_token_id)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        seconds = time.monotonic() - started
        print(f"[{name}] epoch {epoch + 1}/{recipe.epochs}, loss {mean:.3f}, {seconds:.0f} s", flush=True)


def save(model: Any, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (bfloat16); no path of this machine."""
    model.peft_config["default"].base_model_name_or_path = smollm2.MODEL_NAME
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"].sort()  # PEFT keeps a set, whose order changes from run to run
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    halved = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    print(f"[{folder.name}] saved, {weights.stat().st_size / 1e6:.1f} MB")


def check(base: Any, tokenizer: Any, folder: Path | None) -> None:
    """Print greedy answers to ``CHECK_QUESTIONS``: PEFT with the saved adapter, or the base model where it is None.

    An activated adapter is asked without the template too: without its invocation it answers as the base model does.
    """
    from peft import PeftModel

    model = base if folder is None else PeftModel.from_pretrained(base, folder)
    model.eval()
    prompts = {question: prompt_text(tokenizer, question) for question in CHECK_QUESTIONS}
    if folder is None or RECIPES[folder.name].invocation:
        prompts |= {f"{question} (no template)": question for question in CHECK_QUESTIONS}
    for question, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        print(f"[{folder.name if folder else 'base'}] {question} -> {answer!r}", flush=True)
    if folder is not None:
        model.unload()


def main() -> int:
    """Train, save and check the adapters named on the command line (default: all)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"adapters to train, of {', '.join(RECIPES)}")
    parser.add_argument("--check-only", action="store_true", help="only print the answers of the saved adapters")
    args = parser.parse_args()
    if unknown := set(args.names) - set(RECIPES):
        parser.error(f"unknown adapters {sorted(unknown)}; known: {sorted(RECIPES)}")
    folder = smollm2.build()
    transformers = smollm2.import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if args.check_only:
        check(base, tokenizer, None)
    for name in args.names or RECIPES:
        if not args.check_only:
            torch.manual_seed(SEED)
            model = wrap(base, tokenizer, RECIPES[name])
            train(model, tokenizer, name, RECIPES[name])
            save(model, ADAPTERS / name)
            base = model.unload()
        check(base, tokenizer, ADAPTERS / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
