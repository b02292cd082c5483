"""Tries architectures one by one, and says of each whether tokens equal PEFT's, or why it does not serve.

A tiny random model is built by transformers, a plain and a block-diagonal adapter on it by PEFT, and our server answers
for base and adapters in one batch, or says at load why it does not. "its base model differs" is said where already
SGLang's own tokens differ from transformers': adapters cannot be judged there.

    python -m blocklora_testing.architectures [--tp 2] [MODEL_TYPE ...]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from blocklora_testing import warm_imports  # noqa: F401  makes SGLang importable on a CPU, so it comes first
from blocklora_testing.architectures.tiny import config_of, model_types, modules_of
from blocklora_testing.models import (
    VOCAB,
    AdapterChoice,
    build,
    build_adapters,
    peft_tokens,
)
from blocklora_testing.server import ServerFailed, running

NEW_TOKENS = 12


@dataclass(frozen=True)
class Outcome:
    """What came of one: its modules that were adapted, and what was found."""

    architecture: str
    model_type: str
    modules: tuple[str, ...]
    found: str


def try_one(model_type: str, architecture: str, tp: int, folder: Path) -> Outcome:
    """Build, serve, compare. ``folder`` is empty."""
    modules: tuple[str, ...] = ()
    try:
        config = config_of(model_type)
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
        expected = peft_tokens(model, adapters, prompts, NEW_TOKENS)
    except Exception as error:
        return Outcome(architecture, model_type, modules, f"transformers: {_short(error)}")
    flags = ("--tp", str(tp), "--adapter-memory", "static", "--adapter-memory-mb", "64")
    paths = [f"{name}={path}" for name, path in adapters.items()]
    try:
        with running(model, *flags, "--lora-paths", *paths, log=folder / "log") as server:
            requests = [(prompt, name) for name in expected for prompt in prompts]
            found = server.many(requests, NEW_TOKENS)
    except ServerFailed:
        return Outcome(architecture, model_type, modules, f"SGLang: {_cause((folder / 'log').read_text())}")
    except Exception as error:
        return Outcome(architecture, model_type, modules, f"SGLang: {_short(error)}")
    wrong = {name for (_, name), tokens, right in zip(requests, found, _flat(expected), strict=True) if tokens != right}
    if None in wrong:
        return Outcome(architecture, model_type, modules, "its base model differs")
    if any(expected[name] == expected[None] for name in adapters):
        return Outcome(architecture, model_type, modules, "an adapter that changes nothing: not shown")
    return Outcome(architecture, model_type, modules, f"wrong under {sorted(wrong)}" if wrong else "equal")


def _flat(expected: dict[str | None, list[list[int]]]) -> Iterator[list[int]]:
    for tokens in expected.values():
        yield from tokens


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def _cause(log: str) -> str:
    """The last exception of a server's log."""
    lines = [line for line in log.splitlines() if re.match(r"^(\[.*\] )?[\w.]*(Error|Exception)\b", line)]
    return lines[-1][:200] if lines else "no reason in its log"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="default: all that both have")
    parser.add_argument("--tp", type=int, default=2)
    options = parser.parse_args()
    from sglang.srt.models.registry import ModelRegistry  # not before warm_imports

    known = {kind: name for kind, name in model_types().items() if name in ModelRegistry.models}
    if unknown := set(options.model_types) - known.keys():
        sys.exit(f"not of transformers' and SGLang's causal models: {', '.join(sorted(unknown))}")
    print("| architecture | model type | adapted | found |\n|---|---|---|---|", flush=True)
    for kind in options.model_types or sorted(known, key=lambda kind: (known[kind], kind)):
        with tempfile.TemporaryDirectory() as folder:
            one = try_one(kind, known[kind], options.tp, Path(folder))
        print(f"| {one.architecture} | {one.model_type} | {', '.join(one.modules)} | {one.found} |", flush=True)


if __name__ == "__main__":
    main()
