"""Lists all hooks of a server and puts them in place."""

from __future__ import annotations

from blocklora_patches.cache import registry as cache_registry
from blocklora_patches.hooks.apply import apply
from blocklora_patches.http import (
    aborts,
    door,
    facts,
    load_on_use,
    loading,
    metrics,
    model_names,
    registry,
    replicas,
    routes,
    updates,
)
from blocklora_patches.language import offline_engine
from blocklora_patches.model import linear, lora_manager, runner
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
    *aborts.HOOKS,
    *door.HOOKS,
    *facts.HOOKS,
    *replicas.HOOKS,
    *lora_manager.HOOKS,
    *linear.HOOKS,
    *registry.HOOKS,
    *load_on_use.HOOKS,
    *runner.HOOKS,
    *request.HOOKS,
    *sessions.HOOKS,
    *prefill_adder.HOOKS,
    *admission.HOOKS,
    *control.HOOKS,
    *adapter_updates.HOOKS,
    *model_names.HOOKS,
    *loading.HOOKS,
    *updates.HOOKS,
    *metrics.HOOKS,
    *routes.HOOKS,
    *offline_engine.HOOKS,
)


def install() -> None:
    """Apply ``HOOKS`` and register the cache. ``SystemExit`` where another plugin has hooked one of their targets."""
    apply(HOOKS)
    cache_registry.register()
