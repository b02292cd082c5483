"""Looks at, sizes, converts and checks adapters without a server: ``python -m sglang_blocklora.tools``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.settings import DEFAULTS
from sglang_blocklora.sharding.architectures import SPLIT_MODULES
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.convert import convert
from sglang_blocklora.tools.inspect_adapter import inspect_adapter
from sglang_blocklora.tools.match_rank import match_rank, plain_parameters
from sglang_blocklora.tools.opened import open_adapter
from sglang_blocklora.tools.sizing import GIB, Sizing, bytes_beside_weights, size
from sglang_blocklora.tools.text import (
    conversion_text,
    inspection_text,
    match_text,
    sizing_text,
    verification_text,
)
from sglang_blocklora.tools.verify import TOLERANCE, verify

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EXIT_CODES = """exit codes:
  0  done, and for verify: every TP size recombines
  1  the adapter was refused, a conversion would lose too much, or a check failed; nothing was written
  2  wrong command line"""


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sglang_blocklora.tools",
        description="Look at, size, convert and check adapters without a server.",
        epilog=EXIT_CODES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    def command(name: str, help_text: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_text,
            description=description,
            epilog=EXIT_CODES,
            formatter_class=formatter,
            parents=[common],
        )

    one = command(
        "inspect",
        "structure, ranks, parameters and bytes per TP rank",
        "What the adapter is, and how many bytes of it each TP rank holds.",
    )
    one.add_argument("path", type=Path, help="PEFT adapter folder")
    one.add_argument(
        "--base-model", type=Path, help="folder of the base model (its config.json): exact KV heads, slots"
    )
    one.add_argument("--tp", type=positive, nargs="+", default=[1, 2, 4, 8], help="TP sizes (default: 1 2 4 8)")
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="served dtype (default: %(default)s)")

    one = command(
        "match-rank",
        "block-diagonal rank for a parameter budget",
        "The largest block-diagonal rank with no more parameters than a plain adapter, which is how the two are\n"
        "compared fairly: at the same rank a block-diagonal adapter is smaller and weaker.",
    )
    _add_match_rank_arguments(one)

    one = command(
        "convert",
        "plain -> block-diagonal by a truncated SVD of each block",
        "Writes a block-diagonal copy and reports the relative error of every module. Without --rank the copy has\n"
        "n times the rank and loses nothing; with a smaller --rank say with --max-error how much may be lost.\n"
        "An activated adapter stays one. No other can be made one: it has learnt to read prompts whose KV is its own,\n"
        "so it must be trained again, with PEFT's LoraConfig(alora_invocation_tokens=...), from a base model's KV.",
    )
    one.add_argument("path", type=Path, help="PEFT adapter folder")
    one.add_argument("output", type=Path, help="folder to write; must not exist")
    one.add_argument("--nblocks", type=positive, required=True, help="number of blocks, best the TP size")
    one.add_argument("--rank", type=positive, help="rank of the copy, a multiple of nblocks (default: lossless)")
    one.add_argument(
        "--max-error", type=float, default=1e-5, help="largest relative error of a module (default: %(default)s)"
    )

    one = command(
        "size",
        "how many adapters fit on GPUs and in host memory",
        "For adapters of one rank on all linears but experts'. Slots are told by a server (--slots: `slots.total` of\n"
        "GET /adapters; with unified memory the tokens of KV that it logs), or estimated from the size of a GPU.",
    )
    one.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    one.add_argument("--tp", type=positive, default=1, help="TP size (default: %(default)s)")
    one.add_argument("--rank", type=positive, default=16, help="LoRA rank (default: %(default)s)")
    one.add_argument("--nblocks", type=positive, default=1, help="blocks (default: plain LoRA)")
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="served dtype (default: %(default)s)")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--slots", type=positive, help="slots of each TP rank, as a server tells them")
    source.add_argument("--gpu-memory-gb", type=float, help="GiB of each GPU")
    one.add_argument("--mem-fraction-static", type=float, default=0.85, help="as for the server (default: %(default)s)")
    one.add_argument("--kv-tokens", type=int, default=0, help="tokens of KV to keep room for (default: %(default)s)")
    one.add_argument(
        "--adapter-host-memory-gb",
        type=float,
        default=DEFAULTS.adapter_host_memory_gb,
        help="as for the server (default: %(default)s)",
    )

    one = command(
        "verify",
        "whether the TP ranks' parts recombine to PEFT's delta",
        f"Cuts the adapter for every TP rank as a server does, in float64; passes below {TOLERANCE:g}.",
    )
    one.add_argument("path", type=Path, help="PEFT adapter folder")
    one.add_argument("--base-model", type=Path, help="folder of the base model (its config.json): KV heads as served")
    one.add_argument("--tp", type=positive, nargs="+", default=[1, 2, 4, 8], help="TP sizes (default: 1 2 4 8)")
    return parser


def _add_match_rank_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("path", type=Path, nargs="?", help="adapter whose modules and parameters are the measure")
    one.add_argument("--nblocks", type=positive, required=True, help="number of blocks, best the TP size")
    one.add_argument("--base-model", type=Path, help="instead of PATH: folder of the base model (its config.json)")
    one.add_argument("--rank", type=positive, help="with --base-model: rank of the plain adapter")
    one.add_argument(
        "--targets",
        nargs="+",
        help="with --base-model: adapted modules (default: all linears)",
    )
    one.add_argument("--parameters", type=positive, help="budget, instead of the plain adapter's parameters")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], str, bool]:
    """What a command found: as data, as text, and whether it passed."""
    base = BaseSizes.read(arguments.base_model) if getattr(arguments, "base_model", None) else None
    if arguments.command == "inspect":
        found = inspect_adapter(arguments.path, base, arguments.tp, DTYPES[arguments.dtype], arguments.base_model)
        return dataclasses.asdict(found), inspection_text(found), True
    if arguments.command == "match-rank":
        modules, budget = _measure(arguments, base, parser)
        matched = match_rank(modules, arguments.nblocks, arguments.parameters or budget)
        return dataclasses.asdict(matched), match_text(matched), True
    if arguments.command == "convert":
        made = convert(arguments.path, arguments.output, arguments.nblocks, arguments.rank, arguments.max_error)
        return dataclasses.asdict(made), conversion_text(made), True
    if arguments.command == "size":
        sizing = _size(arguments, BaseSizes.read(arguments.base_model))
        return dataclasses.asdict(sizing), sizing_text(sizing), True
    checks = verify(arguments.path, base, arguments.tp)
    data = {"tp": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks]}
    return data, verification_text(checks), all(check.passed for check in checks)


def _size(arguments: argparse.Namespace, base: BaseSizes) -> Sizing:
    free_bytes = 0
    if arguments.slots is None:
        gpu_bytes = int(arguments.gpu_memory_gb * GIB)
        free_bytes = bytes_beside_weights(arguments.base_model, arguments.tp, gpu_bytes, arguments.mem_fraction_static)
    return size(
        base,
        arguments.rank,
        arguments.nblocks,
        arguments.tp,
        DTYPES[arguments.dtype],
        slots=arguments.slots,
        free_bytes=free_bytes,
        kv_tokens=arguments.kv_tokens,
        host_bytes=int(arguments.adapter_host_memory_gb * GIB),
    )


def _measure(
    arguments: argparse.Namespace, base: BaseSizes | None, parser: argparse.ArgumentParser
) -> tuple[list[tuple[str, int, int]], int]:
    """Modules (name, in, out) and the parameters of the plain adapter that is the measure."""
    if arguments.path is not None:
        with open_adapter(arguments.path, base) as adapter:
            modules = [(module, *sizes) for module, sizes in adapter.features.items()]
            return modules, adapter.parameters
    if base is None or not (arguments.rank or arguments.parameters):
        parser.error("match-rank needs PATH, or --base-model with --rank or --parameters")
    features = base.features()
    targets = arguments.targets or [module for module in SPLIT_MODULES if module in features]
    unknown = sorted(set(targets) - set(features))
    if unknown:
        parser.error(f"--targets {' '.join(unknown)}: not among {', '.join(features)}")
    modules = [(target, *features[target]) for target in targets] * base.layers
    return modules, plain_parameters(modules, arguments.rank or 0)


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        data, text, passed = run(arguments, parser)
    except (AdapterError, ValueError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(data, indent=2) if arguments.json else text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
