"""Activating the frontend language in a user's own process: the language's hooks and nothing else."""

from __future__ import annotations

import sglang
from sglang_blocklora.naming.choice import adapter

from blocklora_patches.hooks.apply import apply
from blocklora_patches.language import api, interpreter, ir, utils
from blocklora_patches.releases.contract import FRONTEND_SYMBOLS, check_version

HOOKS = (*api.HOOKS, *ir.HOOKS, *interpreter.HOOKS, *utils.HOOKS)


def activate() -> None:
    """Let ``sglang``'s language choose adapters. ``SystemExit`` where the installed SGLang does not fit."""
    check_version()
    apply(HOOKS, FRONTEND_SYMBOLS)
    sglang.adapter = adapter
