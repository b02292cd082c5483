"""The entry point SGLang calls in every process. Off means off: nothing below is imported then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from sglang_blocklora import SGLANG_VERSION


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
            f"It is written for SGLang {SGLANG_VERSION}. Install both again (pip install --force-reinstall "
            f"sglang-blocklora sglang=={SGLANG_VERSION}), or start stock SGLang (python -m sglang.launch_server)."
        ) from error


def activate() -> None:
    """Put the hooks in place where our launcher asked for them; do nothing otherwise.

    ``SystemExit`` where that fails, and why: the installed SGLang does not fit, another plugin changes the same
    function, or settings that are not understood.
    """
    with fail_closed():
        from sglang_blocklora.settings import Settings

        settings = Settings.from_environment()
        if settings is None:
            return
        settings.keep()
        from blocklora_patches.releases.contract import SYMBOLS, check

        check(SYMBOLS)  # before anything that imports those names
        from blocklora_patches.install import install

        install()


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"
