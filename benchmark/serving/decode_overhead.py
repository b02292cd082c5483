"""ms per output token at TP 2: base model, stock SGLang LoRA and block-diagonal LoRA, interleaved in one run.

Four variants: stock SGLang without LoRA, stock LoRA (plain, rank r), ours with the base model, ours with a
block-diagonal adapter whose rank is matched in parameters (n = TP size). All servers are up all the time; those that
are not measured are stopped with SIGSTOP, so that they take no cycles. Tokens of the two LoRA servers are checked
against PEFT before anything is timed. Prints a table; appends a JSON line to benchmark/results/decode_overhead.jsonl.

    python benchmark/serving/decode_overhead.py [--tp 2] [--rank 16] [--rounds 8] [--tokens 64]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "test"))

from support.models import AdapterChoice, build_adapters, build_model, peft_tokens  # noqa: E402
from support.server import Server, running  # noqa: E402

STOCK = (str(Path(__file__).with_name("stock_server.py")),)
RESULTS = REPOSITORY / "benchmark/results/decode_overhead.jsonl"
# The model of the issue: a tiny Llama whose step is dominated by fixed costs, as decode on a GPU is.
MODEL = {"layers": 4, "hidden_size": 256, "intermediate_size": 768, "heads": 8, "kv_heads": 4, "head_dim": 32}


@dataclass(frozen=True)
class Variant:
    """What is measured: a server and the adapter its requests name."""

    name: str
    server: Server
    adapter: str | None


def matched_rank(rank: int, nblocks: int) -> int:
    """Largest multiple of n whose block-diagonal adapter has no more parameters than the plain one of ``rank``."""
    q, kv = MODEL["heads"] * MODEL["head_dim"], MODEL["kv_heads"] * MODEL["head_dim"]
    hidden, ffn = MODEL["hidden_size"], MODEL["intermediate_size"]
    column, row = [(hidden, q), (hidden, kv), (hidden, kv), (hidden, ffn), (hidden, ffn)], [(q, hidden), (ffn, hidden)]
    plain = rank * sum(i + o for i, o in column + row)
    per_rank = sum(i + o / nblocks for i, o in column) + sum(i / nblocks + o for i, o in row)
    return int(plain / per_rank) // nblocks * nblocks


def decode_ms(variant: Variant, prompt: list[int], tokens: int) -> float:
    """Milliseconds per output token after the first, measured by the client on the token stream."""
    body = {
        "input_ids": prompt,
        "lora_path": variant.adapter,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{variant.server.url}/generate", data, {"Content-Type": "application/json"})
    times = []
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    assert len(times) == tokens, f"{variant.name}: {len(times)} chunks for {tokens} tokens"
    return (times[-1] - times[0]) / (tokens - 1) * 1000


def set_running(server: Server, on: bool) -> None:
    os.killpg(server.process.pid, signal.SIGCONT if on else signal.SIGSTOP)


def measure(variants: list[Variant], prompt: list[int], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Figures by variant, rounds interleaved forth and back (A B C D D C B A)."""
    figures: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants if number % 2 else reversed(variants):
            set_running(variant.server, True)
            time.sleep(0.2)
            value = decode_ms(variant, prompt, tokens)
            set_running(variant.server, False)
            if number:  # the first round warms up
                figures[variant.name].append(value)
    return figures


def report(figures: dict[str, list[float]], conditions: dict[str, object]) -> None:
    base = statistics.median(figures["base"])
    print(f"\n{'variant':28} {'ms/token median':>16} {'min':>7} {'max':>7} {'over base':>10}")
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"{name:28} {median:16.2f} {min(values):7.2f} {max(values):7.2f} {median / base - 1:+10.1%}")
    print(json.dumps(conditions))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as out:
        out.write(json.dumps(conditions | {"ms_per_token": figures}) + "\n")


def check_tokens(folder: Path, servers: dict[str, Server], adapters: dict[str, Path], prompt: list[int]) -> None:
    """No figure without right tokens."""
    expected = peft_tokens(folder, adapters, [prompt], 12)
    for name, server in servers.items():
        for adapter in (None, name) if name in adapters else (None,):
            found = server.tokens(prompt, adapter, 12)
            assert found == expected[adapter][0], f"{name}: wrong tokens for {adapter}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="rank of the plain adapter")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    options = parse()
    prompt = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    rank = matched_rank(options.rank, options.tp)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        print("making the model and the adapters", flush=True)
        model = build_model(folder / "model", "llama", **MODEL)
        choices = {"stock LoRA": AdapterChoice(rank=options.rank), "block-diagonal": AdapterChoice(options.tp, rank)}
        adapters = build_adapters(model, folder / "adapters", choices)
        plain, bd = ([f"{n}={adapters[n]}"] for n in choices)
        flags = {
            "base": (STOCK, []),
            "stock LoRA": (STOCK, ["--lora-backend", "torch_native", "--lora-paths", *plain]),
            "block-diagonal": (("-m", "sglang_blocklora.launch_server"), ["--lora-paths", *bd]),
        }
        servers = {}
        for variant, (module, extra) in flags.items():
            print(f"starting {variant}", flush=True)
            log = folder / f"{variant}.log"
            common = ("--tp", str(options.tp), "--disable-radix-cache", *extra)
            servers[variant] = stack.enter_context(running(model, *common, log=log, module=module))
            stack.callback(set_running, servers[variant], True)
            check_tokens(model, {variant: servers[variant]}, adapters, prompt)
            set_running(servers[variant], False)
        variants = [
            Variant("base", servers["base"], None),
            Variant("stock LoRA", servers["stock LoRA"], "stock LoRA"),
            Variant("ours, base model", servers["block-diagonal"], None),
            Variant("block-diagonal", servers["block-diagonal"], "block-diagonal"),
            Variant("base again (noise)", servers["base"], None),
        ]
        print(f"measuring, {options.rounds} rounds", flush=True)
        figures = measure(variants, prompt, options.tokens, options.rounds)
    report(figures, conditions(options, rank))


def conditions(options: argparse.Namespace, rank: int) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "command": " ".join(["python", "benchmark/serving/decode_overhead.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "model": MODEL,
        "dtype": "float32",
        "adapter_ranks": {"plain": options.rank, "block-diagonal": rank, "nblocks": options.tp},
        "options": vars(options),
        "seed": 0,
    }


if __name__ == "__main__":
    main()
