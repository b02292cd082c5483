"""The entry point that SGLang calls in every process. Off means off: nothing else of ours is imported then."""

from __future__ import annotations

from blocklora_patches.releases.fail_closed import fail_closed


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
        from blocklora_patches.releases.contract import check

        check("server", settings.accept_unknown_sglang)  # before anything that imports what it lists
        from blocklora_patches.install import install

        install()
