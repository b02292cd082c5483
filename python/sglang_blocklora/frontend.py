"""SGLang's frontend language with an adapter per call: ``from sglang_blocklora import frontend as sgl``.

Everything of ``sglang`` is found here, and ``gen``, ``gen_int``, ``gen_string``, ``select``, ``run`` and ``run_batch``
take ``adapter=``. Importing this module gives ``sglang`` itself the same, so ``import sglang as sgl`` works too (on a
machine without an accelerator import this module first: it puts SGLang's missing parts in place). Only the language is
touched: no server hook is installed, and programs that name no adapter run as before. See docs/frontend.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_blocklora import cpu_only, launch_server
from sglang_blocklora.naming.choice import (
    AdaptersNotSupported,
    AdapterUnavailable,
    InvocationUnknown,
    SeveralAnswersInStream,
    UnknownAdapter,
    adapter,
)
from sglang_blocklora.settings import Settings

cpu_only.prepare_import()

from blocklora_patches.language import activate as lang  # noqa: E402  # imports SGLang, so only after the preparation above

lang.activate()

__all__ = [
    "AdapterUnavailable",
    "AdaptersNotSupported",
    "InvocationUnknown",
    "SeveralAnswersInStream",
    "UnknownAdapter",
    "adapter",
    "engine",
    "runtime",
]


def engine(**options: Any) -> Any:
    """An ``sgl.Engine`` in this process with block-diagonal LoRA.

    options  the launcher's flags with underscores: ``model_path=..., tp=2, lora_paths=["sql=/adapters/sql"],
             adapter_memory="static"``; True for a flag without value
    Its ``generate`` takes ``adapter=``. As with ``sgl.Engine`` the script is guarded by
    ``if __name__ == "__main__"``, and it imports this module before SGLang.
    """
    settings, argv = _launcher_options(options)
    from blocklora_patches.launch import make_engine

    with settings.exported():
        return make_engine(argv)


def runtime(**options: Any) -> Any:
    """An ``sgl.Runtime`` with block-diagonal LoRA: a server of this script's own, and a backend for programs.

    options  as for ``engine``; the script is guarded as for it
    """
    settings, argv = _launcher_options(options)
    from blocklora_patches.launch import make_runtime

    with settings.exported():
        return make_runtime(argv)


def _launcher_options(options: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Our settings among ``options``, and SGLang's command line for the others."""
    argv = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    cpu_flags = cpu_only.prepare(launch_server.rank_count(argv))
    settings, sglang_argv = launch_server.parse(argv)
    return settings, launch_server.with_defaults(sglang_argv, {**cpu_flags, "--log-level": ["error"]})


def __getattr__(name: str) -> Any:
    return getattr(lang.sglang, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(lang.sglang)})
