"""What the base model's own requests cost on a server that has activated adapters.

Beside five plain ones in their place, and beside stock SGLang without LoRA, which is measured twice: that shows the
noise. All adapters are resident whenever something is measured; prompts are new each time. Rounds are interleaved
(A B B A), servers that are not measured are stopped. A step's time is the median gap between tokens.

    python -m benchmark.activated.base_cost [--rounds 8] [--batch 1 8]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from benchmark.activated.serve import ASKED, CHOICES, INVOCATION
from benchmark.record import Recorder
from benchmark.serving import client, tiny
from benchmark.serving.fleet import Launch, Member, fleet

PROMPT_TOKENS, NEW_TOKENS = 512, 32
VARIANTS = {
    "stock SGLang, no LoRA": "stock",
    f"ours, {ASKED} plain adapters": "plain",
    f"ours, {ASKED} activated adapters": "activated",
    "stock again (noise)": "stock",
}


def measure(recorder: Recorder, members: dict[str, Member], batches: list[int], rounds: int) -> None:
    """Every second round the other way round; the first, which nothing is recorded of, warms up."""
    scenarios = tiny.all_at_once(batches, PROMPT_TOKENS, NEW_TOKENS)
    for number in range(-1, rounds):
        for place, variant in list(enumerate(VARIANTS))[:: -1 if number % 2 else 1]:
            member = members[VARIANTS[variant]]
            with member.awake() as server:
                for name in (name for name in CHOICES if name.startswith(f"{member.name}-")):
                    server.tokens([1, *INVOCATION, 2], name, 1)
                for scenario, workload in scenarios.items():
                    # The second pass over a server has other prompts, or it would find them cached.
                    seed = len(VARIANTS) * (number + 1) + (place if variant.startswith("stock again") else 0)
                    sessions = dataclasses.replace(workload, seed=seed).generate()
                    figures = client.summary(*client.play(server.url, sessions, [None], variant), slo_ttft_s=1.0)
                    print(
                        f"round {number + 1} of {rounds}, {scenario}, {variant}: {figures['itl_ms_p50']:.1f} ms a step"
                    )
                    if number >= 0:
                        recorder.add(scenario, variant, number, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": 1,
        "adapters": f"{ASKED}, rank 16, resident and not asked for meanwhile; unified memory",
        "workload": f"the base model's, all at once, prompts of {PROMPT_TOKENS} random tokens, {NEW_TOKENS} new ones",
        "rounds": options.rounds,
    }
    with tempfile.TemporaryDirectory() as name:
        model, adapters = tiny.build(Path(name), CHOICES)
        launches = {"stock": Launch(True, ("--tp", "1"))}
        for kind in ("plain", "activated"):
            own = {name: path for name, path in adapters.items() if name.startswith(f"{kind}-")}
            launches[kind] = Launch(False, ("--tp", "1", *tiny.lora_paths(own)))
        with fleet(model, launches, Path(name)) as members:
            recorder = Recorder("activated_base_cost", 0, settings)
            measure(recorder, members, options.batch, options.rounds)
            recorder.finish()


if __name__ == "__main__":
    main()
