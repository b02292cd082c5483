"""(b) Decode on a CPU, end to end over HTTP: block-diagonal, S-LoRA's sharding, stock SGLang and the base model.

The base model is measured on stock SGLang without LoRA, twice, which shows the noise, and on ours with LoRA on.
Otherwise one adapter is in the batch, as in most of the paper's runs. The plain adapter has rank r on stock SGLang and
S-LoRA's sharding; block-diagonal ones (n = TP size) have r, 2r, 4r, and the largest rank with no more parameters
("matched"). Rounds are interleaved (A B B A), servers that are not measured are stopped, and tokens are checked against
PEFT first. A step's time is the median gap between tokens. Two cores exchange over gloo, where a collective is dear:
the order of the variants says something about GPUs, the size of the gaps does not (docs/benchmarks.md).

    python -m benchmark.paper.end_to_end [--tp 2] [--batch 1 8 32] [--rounds 10] [--tokens 12]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmark.record import Recorder, newest
from benchmark.sections import ratio
from benchmark.serving import tiny
from benchmark.serving.fleet import Launch, check_tokens, fleet
from benchmark.serving.runner import Variant, interleave
from benchmark.serving.tiny import AdapterChoice

RANK = 16
CHECKED_TOKENS = 8
PROMPT_TOKENS = 8
STEP = "itl_ms_p50"
# No radix cache on either side: the same prompts come again and again.
OURS = ("--adapter-memory", "static")
S_LORA = ("-m", "benchmark.paper.s_lora.launcher")
# What issue 7 wants of block-diagonal at matched parameters, as a ratio of step times.
WANTED = {"S-LoRA": 1.6, "stock LoRA": 1.3, "base": 1 / 1.15}
VARIANTS = {
    "base": Variant("base", [None]),
    "stock LoRA": Variant("stock", ["plain"]),
    "S-LoRA": Variant("ours", ["plain"]),
    "block-diagonal, r": Variant("ours", ["bd-r"]),
    "block-diagonal, matched": Variant("ours", ["bd-matched"]),
    "block-diagonal, 2r": Variant("ours", ["bd-2r"]),
    "block-diagonal, 4r": Variant("ours", ["bd-4r"]),
    "ours, base model": Variant("ours", [None]),
    "base again (noise)": Variant("base", [None]),
}


def adapters_of(tp: int) -> dict[str, AdapterChoice]:
    """Name -> adapter; block-diagonal ones are named by their rank."""
    ranks = {"r": RANK, "2r": 2 * RANK, "4r": 4 * RANK, "matched": tiny.matched_rank(RANK, tp)}
    return {"plain": AdapterChoice(rank=RANK)} | {f"bd-{k}": AdapterChoice(tp, rank) for k, rank in ranks.items()}


def part(tp: int) -> str:
    """Of the raw results."""
    return f"end_to_end_tp{tp}"


def measure(recorder: Recorder, options: argparse.Namespace, folder: Path) -> None:
    """All variants, in an empty folder."""
    tp = options.tp
    model, adapters = tiny.build(folder, adapters_of(tp))
    prompts, expected = tiny.prompts_and_answers(model, adapters, (PROMPT_TOKENS,), CHECKED_TOKENS)
    common = ("--tp", str(tp), "--disable-radix-cache")
    plain = tiny.lora_paths({"plain": adapters["plain"]})
    launches = {
        "base": Launch(True, common),
        "stock": Launch(True, (*common, "--lora-backend", "torch_native", *plain)),
        "ours": Launch(False, (*common, *OURS, *tiny.lora_paths(adapters)), S_LORA),
    }
    scenarios = tiny.all_at_once(options.batch, PROMPT_TOKENS, options.tokens)
    with fleet(model, launches, folder) as members:
        check_tokens(members, {"base": [None], "stock": ["plain"], "ours": [None, *adapters]}, prompts, expected)
        interleave(recorder, members, VARIANTS, scenarios, rounds=options.rounds, slo_ttft_s=1.0)


def report(tp: int) -> None:
    """Step times of the newest run and their ratios to block-diagonal at matched parameters, wanted ones beside."""
    run = newest(part(tp))
    assert run is not None
    for scenario, variants in run.figures.items():
        steps = {name: statistics.median(figures[STEP]) for name, figures in variants.items()}
        print(f"\n{scenario}\n{'':28} {'ms per token':>12} {'min':>7} {'max':>7} {'/ matched':>10}")
        for name, step in steps.items():
            values = variants[name][STEP]
            found = ratio(values, variants["block-diagonal, matched"][STEP])
            line = f"{name:28} {step:12.2f} {min(values):7.2f} {max(values):7.2f} {found:10.2f}"
            if name in WANTED:
                line += f"  wanted {WANTED[name]:.2f}: {'yes' if found >= WANTED[name] else 'NO'}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=12, help="new tokens of a request")
    options = parser.parse_args()
    ranks = ", ".join(f"{name} {choice.rank}" for name, choice in adapters_of(options.tp).items())
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": options.tp,
        "LoRA ranks": f"{ranks}; n = {options.tp}",
        "workload": f"all requests at once, prompts of {PROMPT_TOKENS} random tokens, {options.tokens} new tokens",
        "rounds": options.rounds,
    }
    recorder = Recorder(part(options.tp), 0, settings)
    with tempfile.TemporaryDirectory() as folder:
        measure(recorder, options, Path(folder))
    recorder.finish()
    report(options.tp)


if __name__ == "__main__":
    main()
