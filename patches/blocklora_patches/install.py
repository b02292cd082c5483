"""The hooks of a server."""

from __future__ import annotations

from blocklora_patches import (
    affinity_policy,
    data_parallel,
    engine,
    http_server,
    load_on_use,
    look_ahead,
    lora_manager,
    lora_registry,
    mem_cache_registry,
    model_runner,
    schedule_batch,
    schedule_policy,
    scheduler,
    scheduler_state,
    serving_base,
    serving_responses,
    tokenizer_manager,
    tokenizer_metrics,
)
from blocklora_patches.apply import apply
from blocklora_patches.contract import SYMBOLS

HOOKS = (
    *affinity_policy.HOOKS,
    *data_parallel.HOOKS,
    *lora_manager.HOOKS,
    *lora_registry.HOOKS,
    *load_on_use.HOOKS,
    *model_runner.HOOKS,
    *schedule_batch.HOOKS,
    *schedule_policy.HOOKS,
    *scheduler.HOOKS,
    *look_ahead.HOOKS,  # behind the scheduler's, which refuse requests whose adapter could not be read
    *scheduler_state.HOOKS,
    *serving_base.HOOKS,
    *serving_responses.HOOKS,
    *tokenizer_manager.HOOKS,
    *tokenizer_metrics.HOOKS,
    *http_server.HOOKS,
    *engine.HOOKS,
)


def install() -> None:
    """Apply ``HOOKS``. ``SystemExit`` listing every upstream symbol that does not fit or hook that did not take."""
    apply(HOOKS, SYMBOLS)
    mem_cache_registry.register()
