"""Activating the frontend language in a user's own process: the language's hooks and nothing else."""

from __future__ import annotations

import sglang
from sglang_blocklora.adapter_choice import adapter

from blocklora_patches import lang_api, lang_interpreter, lang_ir, lang_utils
from blocklora_patches.apply import apply
from blocklora_patches.contract import FRONTEND_SYMBOLS, check_version

HOOKS = (*lang_api.HOOKS, *lang_ir.HOOKS, *lang_interpreter.HOOKS, *lang_utils.HOOKS)


def activate() -> None:
    """Let ``sglang``'s language choose adapters. ``SystemExit`` where the installed SGLang does not fit."""
    check_version()
    apply(HOOKS, FRONTEND_SYMBOLS)
    sglang.adapter = adapter
