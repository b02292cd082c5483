"""What adapters add to a decode step on a CPU: one, four or eight of them in batches of 1, 8 and 32 requests.

Against the base model on the same server, and against a server that goes from adapter to adapter. The model, the plain
rank and the four adapters are those of a comparison with vLLM's CPU build on a machine of this kind, whose LoRA added
9.7 to 11.2 ms (batch 1), 14.8 to 16.6 (batch 8) and 24.8 to 28.8 (batch 32) at TP 2 in bfloat16. Rounds are
interleaved (A B B A), and tokens are checked against PEFT in float32 first. A step's time is the median gap between
tokens.

    python -m benchmark.decode.added_time [--tp 2] [--batch 1 8 32] [--rounds 6] [--tokens 32]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmark.record import Recorder, newest
from benchmark.serving import tiny
from benchmark.serving.fleet import Launch, check_tokens, fleet
from benchmark.serving.runner import Variant, interleave
from benchmark.serving.tiny import AdapterChoice

PART = "added_time"
MODEL = "Llama, 8 layers, hidden 512, FFN 1024, 8 + 8 heads, bfloat16"
SIZES = {"layers": 8, "hidden_size": 512, "intermediate_size": 1024, "heads": 8, "kv_heads": 8, "head_dim": 64}
PROMPT_TOKENS, CHECKED_TOKENS = 16, 8
STEP = "itl_ms_p50"
LOOP = ("-m", "benchmark.decode.loop_launcher")
PLAIN = {f"plain-{i}": AdapterChoice(rank=16) for i in range(8)}
BLOCKS = {f"bd-{i}": AdapterChoice(2, 22) for i in range(8)}
ADAPTERS = 8  # each request draws one of so many places, evenly
USED: dict[str, tuple[str, list[str | None]]] = {
    "base model": ("ours", [None]),
    "1 plain": ("ours", ["plain-0"]),
    "1 block-diagonal": ("ours", ["bd-0"]),
    "4 plain": ("ours", [*PLAIN][:4]),
    "4 block-diagonal": ("ours", [*BLOCKS][:4]),
    "8 block-diagonal": ("ours", [*BLOCKS]),
    "one by one, base model": ("loop", [None]),
    "one by one, 4 block-diagonal": ("loop", [*BLOCKS][:4]),
    "one by one, 8 block-diagonal": ("loop", [*BLOCKS]),
}
VARIANTS = {name: Variant(server, names * (ADAPTERS // len(names))) for name, (server, names) in USED.items()}


def measure(recorder: Recorder, options: argparse.Namespace, folder: Path) -> None:
    """All variants, in an empty folder."""
    model, adapters = tiny.build(folder, PLAIN | BLOCKS, SIZES)
    prompts, expected = tiny.prompts_and_answers(model, adapters, (PROMPT_TOKENS,), CHECKED_TOKENS)
    # No radix cache: the same prompts come again and again.
    flags = ("--tp", str(options.tp), "--disable-radix-cache", "--adapter-memory", "static")
    flags += tiny.lora_paths(adapters)
    launches = {
        "checked": Launch(False, flags),
        "ours": Launch(False, (*flags, "--dtype", "bfloat16")),
        "loop": Launch(False, (*flags, "--dtype", "bfloat16"), LOOP),
    }
    scenarios = tiny.all_at_once(options.batch, PROMPT_TOKENS, options.tokens, ADAPTERS)
    with fleet(model, launches, folder) as members:
        check_tokens(members, {"checked": [None, *adapters]}, prompts, expected)
        interleave(recorder, members, VARIANTS, scenarios, rounds=options.rounds, slo_ttft_s=1.0)


def base_of(variant: str) -> str:
    """The base model on the same server."""
    return "one by one, base model" if variant.startswith("one by one") else "base model"


def print_added(part: str, step: str, base_of: Callable[[str], str]) -> None:
    """Milliseconds that adapters add to the base model's step, median and range over the rounds of the newest run.

    step     the figure that is a step's time, in milliseconds
    base_of  variant -> the variant that it is set against, round by round
    """
    run = newest(part)
    assert run is not None
    for scenario, variants in run.figures.items():
        print(f"\n{scenario}\n{'':32} {'ms a step':>10} {'added':>7} {'min':>7} {'max':>7}")
        for name, figures in variants.items():
            added = [own - base for own, base in zip(figures[step], variants[base_of(name)][step], strict=True)]
            line = f"{name:32} {statistics.median(figures[step]):10.2f} {statistics.median(added):7.2f}"
            print(f"{line} {min(added):7.2f} {max(added):7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a request")
    options = parser.parse_args()
    settings = {
        "model": MODEL,
        "TP size": options.tp,
        "LoRA ranks": "plain 16, block-diagonal 22 (n = 2)",
        "workload": f"all requests at once, prompts of {PROMPT_TOKENS} random tokens, {options.tokens} new tokens",
        "rounds": options.rounds,
    }
    recorder = Recorder(PART, 0, settings)
    with tempfile.TemporaryDirectory() as folder:
        measure(recorder, options, Path(folder))
    recorder.finish()
    print_added(PART, STEP, base_of)


if __name__ == "__main__":
    main()
