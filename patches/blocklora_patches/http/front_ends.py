"""Refuses, by name, ways of SGLang to take requests past our hooks. Runs in the launching process."""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs

# What, whether it is on, why it cannot be.
Table = tuple[tuple[str, bool, str], ...]


def refuse_other_front_ends(arguments: Any) -> None:
    """``SystemExit`` naming everything in the command line ``arguments`` (SGLang's) or the environment that is on."""
    wrong = [f"{what} ({why})" for what, on, why in _table(arguments) if on]
    if wrong:
        raise SystemExit(
            f"sglang-blocklora does not support {', '.join(wrong)}. Drop it, or start stock SGLang "
            "(python -m sglang.launch_server)."
        )


def _table(arguments: Any) -> Table:
    another = "another server takes the requests, and knows none of our adapters"
    return (
        (
            f"--tokenizer-worker-num {arguments.tokenizer_worker_num}",
            arguments.tokenizer_worker_num > 1,
            "each worker would have a list of adapters of its own, and a load would reach one of them",
        ),
        ("--smg-grpc-mode", arguments.smg_grpc_mode, another),
        ("--grpc-mode", arguments.grpc_mode, another),
        (
            "--grpc-port or SGLANG_GRPC_PORT",
            arguments.grpc_port is not None or envs.SGLANG_GRPC_PORT.get() is not None,
            "its requests were never tried with adapters",
        ),
        ("SGLANG_RUST_SERVER", envs.SGLANG_RUST_SERVER.get(), another),
        ("--encoder-only", arguments.encoder_only, another),
        ("--use-ray", arguments.use_ray, "its actors do not load plugins and would serve stock LoRA"),
    )
