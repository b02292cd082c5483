"""``python -m sglang_blocklora.launch_server``: SGLang's server with block-diagonal LoRA, all its flags plus ours."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from blocklora_patches.releases.fail_closed import fail_closed

from sglang_blocklora import cpu_only, flags
from sglang_blocklora.settings import SWITCH_VARIABLE, Settings

# Flags of SGLang whose defaults suit many adapters better: flag -> its values.
ADAPTER_DEFAULTS = {
    "--enable-lora": [],
    "--max-lora-rank": ["256"],
    "--lora-target-modules": ["all"],
}
ADAPTERS_PER_BATCH = 64


def rank_count(argv: Sequence[str]) -> int:
    """TP ranks of all data parallel replicas that SGLang's flags ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1, dest="tp")
    parser.add_argument("--data-parallel-size", "--dp-size", "--dp", type=int, default=1, dest="dp")
    found = parser.parse_known_args(argv)[0]
    return int(found.tp * found.dp)


def adapters_per_batch(argv: Sequence[str]) -> int:
    """Our default of ``--max-loras-per-batch``; SGLang refuses more than ``--max-loaded-loras`` can be loaded."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--max-loaded-loras", type=int, default=ADAPTERS_PER_BATCH)
    limit: int = parser.parse_known_args(argv)[0].max_loaded_loras
    return max(1, min(ADAPTERS_PER_BATCH, limit))


def with_defaults(argv: Sequence[str], defaults: Mapping[str, Sequence[str]]) -> list[str]:
    """``argv`` plus those of ``defaults`` whose flag the user did not give."""
    given = {argument.split("=", 1)[0] for argument in argv}
    extra = [item for flag, values in defaults.items() if flag not in given for item in (flag, *values)]
    return [*argv, *extra]


def parse(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """Split the command line into our settings and SGLang's flags, adapter defaults added."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_blocklora.launch_server",
        description="SGLang's server with block-diagonal LoRA. SGLang's own flags follow below.",
        allow_abbrev=False,
        add_help=False,
    )
    flags.add_arguments(parser.add_argument_group("sglang-blocklora"), Settings)
    own, rest = parser.parse_known_args(argv)
    if any(argument.split("=", 1)[0] == "--config" for argument in rest):
        raise SystemExit("--config: this launcher has defaults of its own and does not read the file. Give its flags.")
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print()
    chosen = flags.from_arguments(own, Settings)
    if not chosen.adapter_affinity:
        rest += ["--schedule-policy", chosen.schedule_policy]
    if not chosen.route_by_adapter:
        rest += ["--load-balance-method", chosen.load_balance_method]
    defaults = ADAPTER_DEFAULTS | {"--max-loras-per-batch": [str(adapters_per_batch(rest))]}
    if chosen.adapter_memory != "static":
        defaults |= {"--radix-cache-backend": ["blocklora"]}
    return chosen, with_defaults(rest, defaults)


def main(argv: Sequence[str]) -> None:
    """Run the server until it is stopped."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    cpu_flags = cpu_only.prepare(rank_count(argv))
    switched_off = os.environ.get(SWITCH_VARIABLE) == "0"
    own, sglang_argv = (None, list(argv)) if switched_off else parse(argv)

    with fail_closed():
        from blocklora_patches.launch import run_sglang  # imports SGLang, so only after the preparation above

    with own.exported() if own else contextlib.nullcontext():
        run_sglang(with_defaults(sglang_argv, cpu_flags))


if __name__ == "__main__":
    main(sys.argv[1:])
else:
    # A process that SGLang spawned imports this module as its main module before it imports SGLang.
    if __name__ == "__mp_main__":
        cpu_only.prepare(rank_count(sys.argv[1:]))
