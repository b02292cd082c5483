"""Five adapters asked about one context, one after another: activated ones, plain ones, and the base model five times.

What is counted: prompt tokens that the server computed for all five (``prompt_tokens - cached_tokens`` of its answers).
What is timed, at the client: the first answer of one token, and the median of the four others. Every round has a
context that nobody has seen, the same for the variants but for its first token; the server is one, its adapters
resident.

SGLang's attention on a CPU computes a whole prompt's for the cached part too, which no GPU kernel does. So the model is
wide and has few heads: of 2048 tokens, attention is 4 % of the arithmetic, about as in Llama-3.1-8B.

    python -m benchmark.activated.serve [--rounds 3] [--tokens 2048 8192]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from blocklora_testing.models import VOCAB, AdapterChoice
from blocklora_testing.server import Server, running

from benchmark.record import Recorder
from benchmark.serving import tiny

ASKED = 5
INVOCATION = (17, 42, 99, 7)
QUESTION = 12
CHOICES = {f"activated-{i}": AdapterChoice(rank=16, invocation=INVOCATION) for i in range(ASKED)}
CHOICES |= {f"plain-{i}": AdapterChoice(rank=16) for i in range(ASKED)}
VARIANTS: dict[str, list[str | None]] = {
    "plain": [f"plain-{i}" for i in range(ASKED)],
    "activated": [f"activated-{i}" for i in range(ASKED)],
    "base model": [None] * ASKED,
}
LONGEST = 16384
SIZES = {"layers": 2, "hidden_size": 1024, "intermediate_size": 8192, "heads": 4, "kv_heads": 2, "head_dim": 64}


def ask(server: Server, prompt: list[int], adapter: str | None) -> tuple[float, int]:
    """Milliseconds to the first token, and the tokens of the prompt that were computed."""
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    started = time.perf_counter()
    status, answer = server.call("/generate", body)
    elapsed_ms = (time.perf_counter() - started) * 1000
    if status != 200:
        raise RuntimeError(f"{adapter}: {answer}")
    told = answer["meta_info"]
    return elapsed_ms, told["prompt_tokens"] - told["cached_tokens"]


def measure(recorder: Recorder, server: Server, tokens: int, round_: int) -> None:
    """One context of ``tokens`` tokens under every variant; every second round the other way round."""
    generator = torch.Generator().manual_seed(1000 * round_ + tokens)
    context = torch.randint(100, VOCAB, (tokens,), generator=generator).tolist()
    names = list(VARIANTS)
    for place, name in enumerate(names if round_ % 2 == 0 else reversed(names)):
        prompt = [place, *context[1:], *INVOCATION, *context[:QUESTION]]
        found = [ask(server, prompt, adapter) for adapter in VARIANTS[name]]
        figures = {
            "prefill_tokens": sum(computed for _, computed in found),
            "first_ttft_ms": found[0][0],
            "later_ttft_ms": statistics.median(ttft for ttft, _ in found[1:]),
        }
        if round_ >= 0:
            recorder.add(f"{tokens} tokens of context", name, round_, figures)


def build(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The model, with room for long prompts, and the flag that loads its adapters."""
    model, adapters = tiny.build(folder, CHOICES, SIZES)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONGEST}))
    return model, ("--lora-paths", *(f"{name}={path}" for name, path in adapters.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args()
    settings = {
        "model": "Llama of 2 layers, hidden 1024, FFN 8192, 4 + 2 heads, float32",
        "TP size": 1,
        "adapters": f"{ASKED} activated and {ASKED} plain, rank 16, all resident",
        "workload": f"one context, {ASKED} requests one after another, each with the same question of "
        f"{len(INVOCATION) + QUESTION} tokens behind it, answers of one token",
        "rounds": options.rounds,
    }
    flags = ("--tp", "1", "--max-total-tokens", str(65536), "--chunked-prefill-size", str(LONGEST))
    with tempfile.TemporaryDirectory() as name:
        model, paths = build(Path(name))
        with running(model, *flags, "--max-prefill-tokens", str(LONGEST), *paths, log=Path(name) / "log") as server:
            recorder = Recorder("activated", 0, settings)
            measure(recorder, server, min(options.tokens), -1)  # adapters come in
            for round_ in range(options.rounds):
                for tokens in options.tokens:
                    measure(recorder, server, tokens, round_)
            recorder.finish()


if __name__ == "__main__":
    main()
