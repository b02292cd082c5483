"""SGLang's frontend language with an adapter per call: ``from sglang_blocklora import frontend as sgl``.

Everything of ``sglang`` is found here, and ``gen``, ``gen_int``, ``gen_string``, ``select``, ``run`` and ``run_batch``
take ``adapter=``. Importing this module gives ``sglang`` itself the same, so ``import sglang as sgl`` works too (on a
machine without an accelerator import this module first: it puts SGLang's missing parts in place). Only the language is
touched: no server hook is installed, and programs that name no adapter run as before. See docs/frontend.md.
"""

from __future__ import annotations

from typing import Any

from sglang_blocklora import cpu_only
from sglang_blocklora.adapter_choice import AdaptersNotSupported, AdapterUnavailable, UnknownAdapter, adapter

if cpu_only.is_cpu_only():
    cpu_only.install_shims()

from blocklora_patches import lang  # imports SGLang, so only after the stand-ins above

lang.activate()

__all__ = ["AdapterUnavailable", "AdaptersNotSupported", "UnknownAdapter", "adapter"]


def __getattr__(name: str) -> Any:
    return getattr(lang.sglang, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(lang.sglang)})
