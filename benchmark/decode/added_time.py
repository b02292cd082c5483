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
import tempfile
from pathlib import Path

from benchmark.decode import step
from benchmark.record import Recorder
from benchmark.report import print_brief
from benchmark.serving import tiny
from benchmark.serving.fleet import Launch, check_tokens, fleet
from benchmark.serving.runner import CHECKED_TOKENS, Variant, interleave
from benchmark.serving.tiny import AdapterChoice

PART = "added_time"
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
    model, adapters = tiny.build(folder, PLAIN | BLOCKS, step.SIZES)
    prompts, expected = tiny.prompts_and_answers(model, adapters, (step.PROMPT_TOKENS,), CHECKED_TOKENS)
    # No radix cache: the same prompts come again and again.
    flags = ("--tp", str(options.tp), "--disable-radix-cache", "--adapter-memory", "static")
    flags += tiny.lora_paths(adapters)
    launches = {
        "checked": Launch(False, flags),
        "ours": Launch(False, (*flags, "--dtype", "bfloat16")),
        "loop": Launch(False, (*flags, "--dtype", "bfloat16"), LOOP),
    }
    scenarios = tiny.all_at_once(options.batch, step.PROMPT_TOKENS, options.tokens, ADAPTERS)
    with fleet(model, launches, folder) as members:
        check_tokens(members, {"checked": [None, *adapters]}, prompts, expected)
        interleave(recorder, members, VARIANTS, scenarios, rounds=options.rounds, slo_ttft_s=1.0)


def main() -> None:
    parser = step.parser(__doc__, rounds=6)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a request")
    options = parser.parse_args()
    settings = {
        "model": step.MODEL,
        "TP size": options.tp,
        "LoRA ranks": "plain 16, block-diagonal 22 (n = 2)",
        "workload": f"all requests at once, prompts of {step.PROMPT_TOKENS} random tokens, {options.tokens} new tokens",
        "rounds": options.rounds,
    }
    recorder = Recorder(PART, 0, settings)
    with tempfile.TemporaryDirectory() as folder:
        measure(recorder, options, Path(folder))
    recorder.finish()
    print_brief(PART)


if __name__ == "__main__":
    main()
