"""The entry point SGLang calls in every process. Off means off: nothing below is imported then."""

from __future__ import annotations

from sglang_blocklora.settings import Settings


def activate() -> None:
    """Put the hooks in place where our launcher asked for them; do nothing otherwise.

    ``SystemExit`` where the installed SGLang does not fit: SGLang logs and swallows any other exception of a plugin.
    """
    if Settings.active() is None:
        return
    from blocklora_patches.releases.contract import check_version

    check_version()
    from blocklora_patches.hooks.install import install

    install()
