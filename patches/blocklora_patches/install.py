"""Lists all hooks of a server and puts them in place."""

from __future__ import annotations

from blocklora_patches.cache import registry as cache_registry
from blocklora_patches.hooks.apply import apply
from blocklora_patches.http import activation, facts, model_names, routes, tenants, tokenizer_manager, versions
from blocklora_patches.model import cpu_sum, graphs, linear, lora_manager, runner, vocabulary
from blocklora_patches.scheduler import (
    adapter_updates,
    admission,
    control,
    prefill_adder,
    queue_order,
    request,
    sessions,
)

HOOKS = (
    *queue_order.HOOKS,
    *lora_manager.HOOKS,
    *linear.HOOKS,
    *vocabulary.HOOKS,
    *runner.HOOKS,
    *graphs.HOOKS,
    *cpu_sum.HOOKS,
    *request.HOOKS,
    *sessions.HOOKS,
    *prefill_adder.HOOKS,
    *admission.HOOKS,
    *control.HOOKS,
    *adapter_updates.HOOKS,
    *activation.HOOKS,
    *facts.HOOKS,
    *model_names.HOOKS,
    *versions.HOOKS,
    *tenants.HOOKS,
    *routes.HOOKS,
    *tokenizer_manager.HOOKS,
)


def install() -> None:
    """Apply ``HOOKS`` and register the cache. ``SystemExit`` where another plugin has hooked one of their targets."""
    apply(HOOKS, [tokenizer_manager.AdapterTokenizerManager])
    cache_registry.register()
