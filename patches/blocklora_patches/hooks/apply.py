"""Putting hooks in place, and making sure that each one took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang.srt.plugins.hook_registry import HookRegistry

from blocklora_patches.hooks.hook import Hook
from blocklora_patches.releases.contract import mismatches


def apply(hooks: Iterable[Hook], symbols: Mapping[str, tuple[str, ...] | None]) -> None:
    """Register ``hooks`` and put them in place; those that are there already stay.

    ``SystemExit`` listing every one of ``symbols`` that does not fit, or every hook that did not take.
    """
    wrong = mismatches(symbols)
    if not wrong:
        new = [hook for hook in hooks if hook.target not in HookRegistry._patched]
        for hook in new:
            HookRegistry.register(hook.target, hook.handler, hook.kind)
        HookRegistry.apply_hooks()
        # The registry logs a hook that fails and goes on; a server half patched would answer wrongly.
        wrong = [f"{hook.target}: the hook was not applied" for hook in new if hook.target not in HookRegistry._patched]
    if wrong:
        raise SystemExit(
            "sglang-blocklora does not fit the installed SGLang although its version is right (was it edited?):\n  "
            + "\n  ".join(wrong)
        )
