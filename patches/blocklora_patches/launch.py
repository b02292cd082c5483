"""Running SGLang's own server, or an engine or a server of this process's own, from our launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sglang.launch_server import run_server
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils import kill_process_tree


def run_sglang(argv: Sequence[str]) -> None:
    """What ``python -m sglang.launch_server`` does with ``argv``; ends with every child process."""
    load_plugins()
    server_args = prepare_server_args(list(argv))
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def make_engine(argv: Sequence[str]) -> Any:
    """An ``Engine`` of this process with the server arguments ``argv``."""
    from sglang.srt.entrypoints.engine import Engine

    load_plugins()
    return Engine(server_args=prepare_server_args(list(argv)))


def make_runtime(argv: Sequence[str]) -> Any:
    """A ``Runtime`` with the server arguments ``argv``."""
    from sglang.lang.backend.runtime_endpoint import Runtime

    load_plugins()
    arguments = prepare_server_args(list(argv))
    return Runtime(**{field.name: getattr(arguments, field.name) for field in record_fields(type(arguments))})
