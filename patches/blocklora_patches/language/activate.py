"""Puts the frontend language's hooks in place, in a user's own process, and nothing else."""

from __future__ import annotations

import sglang
from sglang_blocklora.naming.choice import adapter

from blocklora_patches.hooks.hook import Hook
from blocklora_patches.releases.contract import check
from blocklora_patches.releases.fail_closed import fail_closed


def activate() -> None:
    """Let ``sglang``'s language choose adapters. ``SystemExit`` where the installed SGLang does not fit."""
    with fail_closed():
        check("frontend", accept_unknown=True)  # before anything that imports what it lists; servers check themselves
        from blocklora_patches.hooks.apply import apply

        apply(hooks())
        sglang.adapter = adapter


def hooks() -> tuple[Hook, ...]:
    """The hooks of the language."""
    from blocklora_patches.language import api, interpreter, ir, utils  # these import what ``activate`` checks

    return (*api.HOOKS, *ir.HOOKS, *interpreter.HOOKS, *utils.HOOKS)
