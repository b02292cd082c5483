"""Registering every hook, and making sure that each one took."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookRegistry

from blocklora_patches import lora_manager, serving_base, serving_responses, tokenizer_manager
from blocklora_patches.contract import mismatches

HOOKS = (*lora_manager.HOOKS, *serving_base.HOOKS, *serving_responses.HOOKS, *tokenizer_manager.HOOKS)


def install() -> None:
    """Apply ``HOOKS``. ``SystemExit`` listing every upstream symbol that does not fit or hook that did not take."""
    wrong = mismatches()
    if not wrong:
        for hook in HOOKS:
            HookRegistry.register(hook.target, hook.handler, hook.kind)
        HookRegistry.apply_hooks()
        # The registry logs a hook that fails and goes on; a server half patched would answer wrongly.
        wrong = [
            f"{hook.target}: the hook was not applied" for hook in HOOKS if hook.target not in HookRegistry._patched
        ]
    if wrong:
        raise SystemExit(
            "sglang-blocklora does not fit the installed SGLang although its version is right (was it edited?):\n  "
            + "\n  ".join(wrong)
        )
