"""Starts SGLang's own server, engine or runtime with our hooks in place.

Where the settings are exported nothing starts unless the hooks are in place, here and in the processes that SGLang
starts, and every way to a request goes through them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sglang.launch_server import run_server
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, _get_excluded_dists, load_plugins, load_plugins_by_group
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.utils import kill_process_tree
from sglang_blocklora.settings import Settings

from blocklora_patches import plugin
from blocklora_patches.http.front_ends import refuse_open_tenants, refuse_other_front_ends, refuse_tenants_of_engine


def run_sglang(argv: Sequence[str]) -> None:
    """What ``python -m sglang.launch_server`` does with ``argv``; ends with every child process."""
    put_hooks_in_place()
    server_args = _server_args(argv)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def make_engine(argv: Sequence[str]) -> Any:
    """An ``Engine`` of this process with the server arguments ``argv``."""
    refuse_tenants_of_engine()
    put_hooks_in_place()
    from blocklora_patches.language.offline_engine import AdapterEngine

    return AdapterEngine(server_args=_server_args(argv))


def make_runtime(argv: Sequence[str]) -> Any:
    """A ``Runtime`` with the server arguments ``argv``; this process is left as it is."""
    from sglang.lang.backend.runtime_endpoint import Runtime

    arguments = _server_args(argv)
    return Runtime(**{field.name: getattr(arguments, field.name) for field in record_fields(type(arguments))})


def rehearse(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings of ``argv``; and what speaks against unified memory, where they leave the choice to the server.

    Nothing is started. It ends as ``run_sglang`` does where that refuses ``argv`` before weights are read, and leaves
    this process with the configuration that a scheduler would have.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.runtime_context import publish

    from blocklora_patches.model.unsupported import against_unified, refuse_unsupported

    put_hooks_in_place()
    arguments = _server_args(argv)
    arguments.resolve_once()
    arguments.check_server_args()
    publish(arguments, role="scheduler")
    settings, model_config = Settings.required(), ModelConfig.from_server_args(arguments)
    refuse_unsupported(model_config, settings)
    return settings, against_unified(model_config) if settings.adapter_memory == "auto" else []


def put_hooks_in_place() -> None:
    """What a launching process does first; does nothing else where the settings are not exported."""
    load_plugins()
    if Settings.from_environment() is not None:
        plugin.activate()  # SGLang calls plugins once: it may have done so before the settings were there
        from blocklora_patches.hooks.apply import check

        check()


def _server_args(argv: Sequence[str]) -> ServerArgs:
    arguments = prepare_server_args(list(argv))
    if Settings.from_environment() is not None:
        refuse_to_be_left_out()
        refuse_other_front_ends(arguments)
        refuse_open_tenants(arguments)
    return arguments


def refuse_to_be_left_out() -> None:
    """``SystemExit`` unless SGLang calls our plugin in the processes that it starts."""
    if "blocklora" in load_plugins_by_group(GENERAL_PLUGINS_GROUP, _get_excluded_dists()):
        return
    chosen = {name: os.environ[name] for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM") if name in os.environ}
    raise SystemExit(
        "SGLang would not call the plugin 'blocklora' in the processes that it starts, and these would serve without "
        f"sglang-blocklora. Found {chosen or 'no plugin of that name installed'}. "
        "Add blocklora to SGLANG_PLUGINS, or install sglang-blocklora into this Python (pip install sglang-blocklora)."
    )
