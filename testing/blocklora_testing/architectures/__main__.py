"""Tries architectures one by one, and says of each whether tokens equal PEFT's, or why it does not serve.

A tiny random model is built by transformers, a plain and a block-diagonal adapter on it by PEFT, and our server answers
for base and adapters in one batch, or says at load why it does not. "its base model differs" is said where already
SGLang's own tokens differ from transformers': adapters cannot be judged there.

    python -m blocklora_testing.architectures [MODEL_TYPE ...] [--tp 1 2 4]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blocklora_testing import warm_imports  # noqa: F401  makes SGLang importable on a CPU, so it comes first
from blocklora_testing.architectures.tiny import config_of, model_types, modules_of
from blocklora_testing.case import Case
from blocklora_testing.latent_attention import use_latents
from blocklora_testing.models import VOCAB, AdapterChoice, build, build_adapters, peft_tokens
from blocklora_testing.server import ServerFailed, running

NEW_TOKENS = 12


@dataclass(frozen=True)
class Outcome:
    """What came of one: its modules that were adapted, and what was found at each TP size."""

    architecture: str
    model_type: str
    modules: tuple[str, ...]
    found: tuple[str, ...]

    @property
    def row(self) -> str:
        """A line of the table."""
        return f"| {self.architecture} | {self.model_type} | {', '.join(self.modules)} | {' | '.join(self.found)} |"


def try_one(model_type: str, architecture: str, tp_sizes: Sequence[int], folder: Path) -> Outcome:
    """Build, serve, compare. ``folder`` is empty."""
    modules: tuple[str, ...] = ()
    try:
        config = config_of(model_type, kv_heads=max(2, *tp_sizes))  # a TP rank has whole KV heads
        config.architectures = [architecture]
        model = build(folder / "model", config, model_type)
        modules = modules_of(model)
        choices = {
            "plain": AdapterChoice(targets=modules),
            "blocks": AdapterChoice(2, rank=8, targets=modules),
        }
        adapters = build_adapters(model, folder / "adapters", choices)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 23)]
        case = Case(model, adapters, prompts, peft_tokens(model, adapters, prompts, NEW_TOKENS))
    except Exception as error:
        return Outcome(architecture, model_type, modules, (f"transformers: {_short(error)}",) * len(tp_sizes))
    return Outcome(architecture, model_type, modules, tuple(serve(case, tp, folder / f"log.{tp}") for tp in tp_sizes))


def serve(case: Case, tp: int, log: Path) -> str:
    """Whether a server's tokens are PEFT's, or what it does instead."""
    flags = ("--tp", str(tp), "--adapter-memory", "static", "--adapter-memory-mb", "64")
    requests = case.requests()
    try:
        with running(case.model, *flags, *case.lora_paths, log=log, warm=True, change=use_latents) as server:
            found = server.many(requests, NEW_TOKENS)
    except ServerFailed:
        return f"SGLang: {_cause(log.read_text())}"
    except Exception as error:
        return f"SGLang: {_short(error)}"
    wrong = {name for (_, name), tokens, right in zip(requests, found, case.answers(), strict=True) if tokens != right}
    if None in wrong:
        return "its base model differs"
    if any(case.expected[name] == case.expected[None] for name in case.adapters):
        return "an adapter that changes nothing: not shown"
    return f"wrong under {sorted(wrong)}" if wrong else "equal"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def _cause(log: str) -> str:
    """The last exception of a server's log."""
    lines = [line for line in log.splitlines() if re.match(r"^(\[.*\] )?[\w.]*(Error|Exception)\b", line)]
    return lines[-1][:200] if lines else "no reason in its log"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="default: all that both have")
    parser.add_argument("--tp", type=int, nargs="+", default=[2], help="TP sizes, one server each (default: 2)")
    options = parser.parse_args()
    from sglang.srt.models.registry import ModelRegistry  # not before warm_imports

    known = {kind: name for kind, name in model_types().items() if name in ModelRegistry.models}
    if unknown := set(options.model_types) - known.keys():
        sys.exit(f"not of transformers' and SGLang's causal models: {', '.join(sorted(unknown))}")
    print(f"| architecture | model type | adapted | {' | '.join(f'TP {tp}' for tp in options.tp)} |")
    print(f"{'|---' * (3 + len(options.tp))}|", flush=True)
    for kind in options.model_types or sorted(known, key=lambda kind: (known[kind], kind)):
        with tempfile.TemporaryDirectory() as folder:
            print(try_one(kind, known[kind], options.tp, Path(folder)).row, flush=True)


if __name__ == "__main__":
    main()
