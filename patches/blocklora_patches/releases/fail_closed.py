"""Ends the process where the extension cannot be put in place: SGLang would go on without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from sglang_blocklora import SGLANG_VERSIONS


@contextmanager
def fail_closed() -> Iterator[None]:
    """Whatever goes wrong within it is a ``SystemExit`` that says so.

    SGLang logs any other exception of a plugin, goes on, and answers without it.
    """
    try:
        yield
    except Exception as error:
        raise SystemExit(
            f"sglang-blocklora {_installed('sglang-blocklora')} cannot be put in place in SGLang "
            f"{_installed('sglang')}: {type(error).__name__}: {error}\n"
            f"It is tested with SGLang {', '.join(SGLANG_VERSIONS)}. Install both again (pip install --force-reinstall "
            f"sglang-blocklora sglang=={SGLANG_VERSIONS[-1]}), or start stock SGLang (python -m sglang.launch_server)."
        ) from error


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"
