"""Refuses, by name, ways of SGLang to take requests past our hooks, or past keys. Runs in the launching process."""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs
from sglang_blocklora.settings import Settings
from sglang_blocklora.tenancy.file import read

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


def refuse_open_tenants(arguments: Any) -> None:
    """``SystemExit`` where ``--tenants`` would let in who has no key, or would make a tenant the operator."""
    path = Settings.required().tenants
    if path is None:
        return
    if not arguments.api_key:
        raise SystemExit(
            "--tenants needs --api-key, the operator's key: without one SGLang lets in whoever has none. Give both."
        )
    try:
        read(path).refuse_keys({"--api-key": arguments.api_key, "--admin-api-key": arguments.admin_api_key})
    except ValueError as error:
        raise SystemExit(f"--tenants {path} {error}") from None


def refuse_tenants_of_engine() -> None:
    """``SystemExit`` where ``--tenants`` is asked of an engine, to which no key is shown."""
    if Settings.required().tenants is not None:
        raise SystemExit("--tenants: keys come over HTTP, and an engine sees none. Start a server or a runtime.")


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
