"""The hooks of a server."""

from __future__ import annotations

from blocklora_patches import lora_manager, serving_base, serving_responses, tokenizer_manager
from blocklora_patches.apply import apply
from blocklora_patches.contract import SYMBOLS

HOOKS = (*lora_manager.HOOKS, *serving_base.HOOKS, *serving_responses.HOOKS, *tokenizer_manager.HOOKS)


def install() -> None:
    """Apply ``HOOKS``. ``SystemExit`` listing every upstream symbol that does not fit or hook that did not take."""
    apply(HOOKS, SYMBOLS)
