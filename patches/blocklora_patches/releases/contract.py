"""Upstream symbols that the extension hooks, subclasses or calls, and how each must look in the pinned release."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from importlib.metadata import version

from sglang_blocklora import SGLANG_VERSION

_TREE_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"

# Dotted path -> parameter names (None: a class or value of which only the existence matters).
SYMBOLS: dict[str, tuple[str, ...] | None] = {
    "sglang.srt.lora.lora_manager.LoRAManager.__init__": (
        "self",
        "base_model",
        "base_hf_config",
        "max_loras_per_batch",
        "load_config",
        "dtype",
        "server_args",
        "lora_backend",
        "tp_size",
        "tp_rank",
        "max_lora_rank",
        "target_modules",
        "lora_paths",
    ),
    "sglang.srt.lora.lora_manager.LoRAManager.create_lora_update_result": ("self", "success", "error_message"),
    "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter_from_tensors": (
        "self",
        "lora_ref",
        "tensors",
        "config_dict",
        "added_tokens_config",
    ),
    "sglang.srt.lora.lora_manager.LoRAManager.unload_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager._unload_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager.validate_lora_batch": ("self", "lora_ids"),
    "sglang.srt.lora.lora_manager.LoRAManager.fetch_new_loras": ("self", "new_loras", "running_loras"),
    "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch": ("self", "forward_batch"),
    "sglang.srt.lora.lora_manager.LoRAManager.reset_lora_batch": ("self",),
    "sglang.srt.lora.lora_manager.LoRAManager.init_cuda_graph_batch_info": (
        "self",
        "max_bs_in_cuda_graph",
        "num_tokens_per_req",
    ),
    "sglang.srt.lora.lora_manager.LoRAManager.init_cuda_graph_moe_buffers": (
        "self",
        "max_bs",
        "max_loras",
        "compute_dtype",
        "moe_layer",
    ),
    "sglang.srt.lora.lora_manager.LoRAManager.can_use_prefill_cuda_graph": ("self", "forward_batch"),
    "sglang.srt.lora.lora_manager.LoRAManager.supports_prefill_cuda_graph": None,
    "sglang.srt.lora.lora_registry.LoRARef": None,
    "sglang.srt.layers.linear.QKVParallelLinear": None,
    "sglang.srt.layers.linear.MergedColumnParallelLinear": None,
    "sglang.srt.layers.linear.RowParallelLinear.forward": (
        "self",
        "input_",
        "skip_all_reduce",
        "forward_batch",
        "output_tensor",
    ),
    "sglang.srt.layers.quantization.base_config.LinearMethodBase.apply": ("self", "layer", "x", "bias"),
    "sglang.srt.layers.quantization.base_config.QuantizeMethodBase.process_weights_after_loading": ("self", "layer"),
    "sglang.srt.layers.utils.get_layer_id": ("weight_name",),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._resolve_lora_path": (
        "self",
        "request_model",
        "explicit_lora_path",
    ),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request": ("self", "request", "raw_request"),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response": (
        "self",
        "message",
        "err_type",
        "status_code",
        "param",
    ),
    "sglang.srt.entrypoints.openai.serving_classify.OpenAIServingClassify": None,
    "sglang.srt.entrypoints.openai.serving_decisions.OpenAIServingDecisions": None,
    "sglang.srt.entrypoints.openai.serving_score.OpenAIServingScore": None,
    "sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription.create_transcription": (
        "self",
        "audio_data",
        "model",
        "language",
        "response_format",
        "temperature",
        "stream",
        "raw_request",
        "timestamp_granularities",
    ),
    "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages": ("self", "request", "raw_request"),
    "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_count_tokens": (
        "self",
        "request",
        "raw_request",
    ),
    "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._error_response": (
        "self",
        "status_code",
        "error_type",
        "message",
        "exception_name",
    ),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat": ("self", "request", "raw_request"),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_generate": ("self", "request", "raw_request"),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._generate_chat_response": (
        "self",
        "gen_request",
        "raw_request",
        "model_name",
    ),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._stream_chat_response": (
        "self",
        "gen_request",
        "raw_request",
        "model_name",
    ),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._generate_generate_response": (
        "self",
        "gen_request",
        "raw_request",
        "model_name",
    ),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._stream_generate_response": (
        "self",
        "gen_request",
        "raw_request",
        "model_name",
    ),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing.get_tags": ("self",),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing.get_show": ("self", "model"),
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses": (
        "self",
        "request",
        "raw_request",
    ),
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._validate_model": ("self", "model"),
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._generate_with_builtin_tools": (
        "self",
        "request_id",
        "request_prompt",
        "adapted_request",
        "sampling_params",
        "context",
        "raw_request",
        "priority",
        "kwargs",
    ),
    "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments": ("self",),
    "sglang.srt.managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments": ("self",),
    "sglang.srt.managers.communicator.FanOutCommunicator.__call__": ("self", "obj"),
    "sglang.srt.managers.io_struct.SessionParams": None,
    "sglang.srt.managers.io_struct.msgpack_encode": ("obj",),
    "sglang.srt.managers.io_struct.msgpack_decode": ("data",),
    "sglang.srt.sampling.sampling_params.SamplingParams": None,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request": ("self", "rid", "abort_all"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state": ("self", "obj", "request"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request": ("self", "obj", "input_ids"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object": (
        "self",
        "obj",
        "input_text",
        "input_ids",
        "input_embeds",
        "mm_inputs",
        "token_type_ids",
    ),
    "sglang.srt.managers.tokenizer_manager_score_mixin.TokenizerManagerScoreMixin.score_request": None,
    "sglang.srt.entrypoints.openai.serving_tokenize.OpenAIServingDetokenize._convert_to_internal_request": (
        "self",
        "request",
        "raw_request",
    ),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.unload_lora_adapter": ("self", "obj", "_"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter": ("self", "obj", "_"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.collect_metrics": ("self", "state", "recv_obj", "i"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.get_internal_state": ("self",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.set_internal_state": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_lora": ("self",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._unload_lora_adapter_locked": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request": ("self", "tokenized_obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_batch_request": ("self", "tokenized_objs"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop": ("self",),
    "sglang.srt.managers.data_parallel_controller.DataParallelController.maybe_external_dp_rank_routing": (
        "self",
        "req",
    ),
    "sglang.srt.lora.lora_registry.LoRARegistry.register": ("self", "lora_ref"),
    "sglang.srt.lora.lora_registry.LoRARegistry.lru_lora_name": ("self", "exclude_pinned"),
    "sglang.srt.managers.io_struct.LoRAUpdateOutput": None,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._resolve_lora_path": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request": (
        "self",
        "obj",
        "request",
        "request_rids",
    ),
    "sglang.srt.lora.lora_registry.LoRARegistry.acquire": ("self", "lora_name"),
    "sglang.srt.lora.lora_registry.LoRARegistry.wait_for_unload": ("self", "lora_id"),
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state": ("self", "recv_req"),
    "sglang.srt.managers.scheduler.Scheduler.set_internal_state": ("self", "recv_req"),
    "sglang.srt.lora.lora_registry.LoRARegistry.get_all_adapters": ("self",),
    "sglang.srt.entrypoints.engine.Engine.generate": None,
    "sglang.srt.entrypoints.engine.Engine.async_generate": None,
    "sglang.srt.entrypoints.http_server.app": None,
    "sglang.srt.entrypoints.http_server.get_global_state": (),
    "sglang.srt.entrypoints.http_server.server_info": (),
    "sglang.srt.entrypoints.http_server.available_models": (),
    "sglang.srt.entrypoints.http_server.retrieve_model": ("model",),
    "sglang.srt.entrypoints.openai.protocol.ModelCard": None,
    "sglang.srt.entrypoints.http_server._setup_and_run_http_server": (
        "server_args",
        "tokenizer_manager",
        "template_manager",
        "port_args",
        "scheduler_infos",
        "subprocess_watchdog",
        "execute_warmup_func",
        "launch_callback",
    ),
    "sglang.srt.utils.common.add_prometheus_middleware": ("app",),
    "sglang.srt.utils.auth.auth_level": ("level",),
    "sglang.srt.entrypoints.openai.protocol.DEFAULT_MODEL_NAME": None,
    "sglang.srt.model_executor.runner.get_is_capture_mode": (),
    "sglang.srt.model_executor.model_runner.ModelRunner.load_model": ("self",),
    "sglang.srt.mem_cache.kv_cache_builder.uses_ssm_state": ("model_config",),
    "sglang.srt.configs.model_config.AttentionArch": None,
    "sglang.srt.configs.model_config.ModelConfig.get_num_kv_heads": ("self", "tensor_parallel_size", "dcp_size"),
    "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool": ("self", "memory_pool_config"),
    "sglang.srt.managers.scheduler.Scheduler.on_idle": ("self",),
    "sglang.srt.managers.scheduler.Scheduler.is_fully_idle": ("self", "for_health_check", "ignore_waiting"),
    "sglang.srt.environ.envs": None,
    "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.session_held_tokens": (
        "self",
    ),
    "sglang.srt.managers.scheduler.Scheduler.init_schedule_policy": ("self",),
    "sglang.srt.managers.schedule_batch.Req.__init__": None,
    "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule": ("self", "req"),
    "sglang.srt.managers.schedule_policy.CLIP_MAX_NEW_TOKENS": None,
    "sglang.srt.managers.schedule_policy.CacheAwarePolicy.LPM": None,
    "sglang.srt.managers.schedule_policy.SchedulePolicy.__init__": (
        "self",
        "policy",
        "tree_cache",
        "enable_hierarchical_cache",
        "enable_priority_scheduling",
        "schedule_low_priority_values_first",
    ),
    "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority": (
        "self",
        "waiting_queue",
        "running_batch",
        "processed_tokens",
    ),
    "sglang.srt.managers.schedule_policy.SchedulePolicy._compute_prefix_matches": ("self", "waiting_queue", "policy"),
    "sglang.srt.runtime_context.get_disagg": (),
    "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue": ("self", "req", "is_retracted"),
    "sglang.srt.managers.scheduler.Scheduler.load_lora_adapter": ("self", "recv_req"),
    "sglang.srt.managers.scheduler.Scheduler.unload_lora_adapter": ("self", "recv_req"),
    "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens": ("self", "req"),
    "sglang.srt.managers.scheduler.Scheduler.can_schedule_lora_req": ("self", "req", "running_loras"),
    "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw": (
        "self",
        "prefill_delayer_single_pass",
        "running_batch",
    ),
    "sglang.srt.managers.schedule_policy.AddReqResult": None,
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req": (
        "self",
        "req",
        "has_chunked_req",
        "truncation_align_size",
    ),
    "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill": ("self", "running_batch"),
    "sglang.srt.managers.scheduler.Scheduler.retire_unadmitted_request": ("self", "req"),
    "sglang.srt.managers.schedule_batch.Req.set_finish_with_abort": ("self", "error_msg", "status_code", "err_type"),
    "sglang.srt.mem_cache.registry.register_radix_cache_backend": ("name", "factory"),
    "sglang.srt.mem_cache.registry.create_unified_radix_cache": ("ctx", "cache_class"),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool": None,
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.__init__": ("self", "params"),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.reset": ("self",),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.match_prefix": ("self", "params"),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.insert": ("self", "params"),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.root_node_handle": ("self", "extra_key"),
    "sglang.srt.mem_cache.base_prefix_cache.InsertResult": (
        "prefix_len",
        "total_len",
        "last_device_node",
        "mamba_exist",
        "swa_branch_inserted",
        "rotation_tail_declined",
        "inserted_host_node",
        "host_insert_dropped",
        "adopted_ranges",
        "cache_actions",
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.evict": ("self", "params"),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.evict_for_alloc": ("self", "params"),
    f"{_TREE_CORE}.match_full_device_prefix": ("self", "key"),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.all_values_flatten": ("self",),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.sanity_check": ("self",),
    f"{_TREE_CORE}.inc_full_pin": ("self", "node_id"),
    f"{_TREE_CORE}.dec_full_pin": ("self", "node_id"),
    f"{_TREE_CORE}.is_full_device_evicted": ("self", "node_id"),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.take_events": ("self",),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache._drain_device_frees": ("self", "device_frees"),
    "sglang.srt.mem_cache.events.KVCacheEventRecorder.enqueue": ("self", "event"),
    "sglang.srt.mem_cache.events.KVCacheEventRecorder.take": ("self",),
    "sglang.srt.disaggregation.kv_events.BlockStored": None,
    "sglang.srt.disaggregation.kv_events.BlockRemoved": None,
    "sglang.srt.disaggregation.kv_events.AllBlocksCleared": None,
    "sglang.srt.mem_cache.base_prefix_cache.zero_match_result": ("tree_cache", "match_result", "extra_key"),
    "sglang.srt.mem_cache.radix_cache.RadixKey.__init__": (
        "self",
        "token_ids",
        "extra_key",
        "is_bigram",
        "limit",
        "cache_salt",
    ),
    "sglang.srt.runtime_context.get_parallel": (),
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather": (
        "self",
        "input_",
        "dim",
        "output_tensor_list",
    ),
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce": ("self", "input_"),
    "sglang.srt.server_args.prepare_server_args": ("argv",),
    "sglang.srt.arg_groups.arg_utils.record_fields": ("cls",),
    "sglang.lang.backend.runtime_endpoint.Runtime.__init__": (
        "self",
        "log_level",
        "launch_timeout",
        "args",
        "kwargs",
    ),
    "sglang.launch_server.run_server": ("server_args",),
    "sglang.srt.plugins.load_plugins": (),
    "sglang.srt.plugins.load_plugins_by_group": ("group", "excluded_dists"),
    "sglang.srt.plugins._get_excluded_dists": (),
    "sglang.srt.plugins.hook_registry.HookSource": None,
    "sglang.srt.plugins.hook_registry.HookRegistry._hooks": None,
    "sglang.srt.plugins.hook_registry.HookRegistry._patched": None,
    "sglang.srt.plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type", "source"),
    "sglang.srt.plugins.hook_registry.HookRegistry._apply_target": ("target", "hooks"),
    "sglang.srt.entrypoints.engine.Engine._launch_subprocesses": (
        "server_args",
        "init_tokenizer_manager_func",
        "run_scheduler_process_func",
        "run_detokenizer_process_func",
        "port_args",
        "placement_group",
    ),
    "sglang.srt.utils.kill_process_tree": ("parent_pid", "include_parent", "skip_pid", "wait_timeout"),
}


# The same for the frontend language, which is checked in a user's own process.
FRONTEND_SYMBOLS: dict[str, tuple[str, ...] | None] = {
    "sglang.lang.api.gen": None,
    "sglang.lang.api.gen_int": None,
    "sglang.lang.api.gen_string": None,
    "sglang.lang.api.select": ("name", "choices", "temperature", "choices_method"),
    "sglang.lang.ir.SglFunction.run": None,
    "sglang.lang.ir.SglFunction.run_batch": None,
    "sglang.lang.ir.SglExprList.__init__": ("self", "expr_list"),
    "sglang.lang.interpreter.StreamExecutor.submit": ("self", "expr"),
    "sglang.lang.interpreter.StreamExecutor._thread_worker_func": ("self",),
    "sglang.lang.interpreter.StreamExecutor.get_var": ("self", "name"),
    "sglang.lang.interpreter.StreamExecutor._resolve_sampling_params": ("self", "sampling_params"),
    "sglang.lang.interpreter.StreamExecutor._execute_gen": ("self", "expr"),
    "sglang.lang.interpreter.StreamExecutor._execute_select": ("self", "expr"),
    "sglang.lang.interpreter.ProgramState.text_iter": ("self", "var_name"),
    "sglang.lang.interpreter.ProgramState.text_async_iter": ("self", "var_name", "return_meta_data"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._add_images": ("self", "s", "data"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._assert_success": ("self", "res"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._generate_http_request": ("self", "s", "data"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.cache_prefix": ("self", "prefix_str"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.__init__": (
        "self",
        "base_url",
        "api_key",
        "verify",
        "chat_template_name",
    ),
    "sglang.lang.global_config.global_config": None,
    "sglang.utils.http_request": ("url", "json", "stream", "api_key", "verify", "method"),
}


def check(symbols: Mapping[str, tuple[str, ...] | None]) -> None:
    """``SystemExit`` unless the installed SGLang is our release and every one of ``symbols`` is as expected there."""
    installed = version("sglang")
    if installed != SGLANG_VERSION:
        raise SystemExit(
            f"sglang-blocklora works with sglang=={SGLANG_VERSION} only, found {installed}. "
            f"Install that release (pip install sglang=={SGLANG_VERSION}), or start stock SGLang."
        )
    wrong = mismatches(symbols)
    if wrong:
        raise SystemExit(
            f"sglang-blocklora does not fit the installed SGLang {installed} although its version is right (was it "
            "edited?):\n  "
            + "\n  ".join(wrong)
            + f"\nInstall it again (pip install --force-reinstall --no-deps sglang=={SGLANG_VERSION}), or start stock "
            "SGLang."
        )


def mismatches(symbols: Mapping[str, tuple[str, ...] | None]) -> list[str]:
    """One line for each upstream symbol that is not as expected."""
    found = (_mismatch(path, expected) for path, expected in symbols.items())
    return [line for line in found if line]


def _mismatch(path: str, expected: tuple[str, ...] | None) -> str | None:
    try:
        symbol = _resolve(path)
    except (ImportError, AttributeError) as error:
        return f"{path}: expected, and not found ({error})"
    if expected is None:
        return None
    if not callable(symbol):
        return f"{path}: expected parameters {expected}, found {type(symbol).__name__} that cannot be called"
    parameters = tuple(inspect.signature(symbol).parameters)
    return None if parameters == expected else f"{path}: expected parameters {expected}, found {parameters}"


def _resolve(path: str) -> object:
    module = path.rpartition(".")[0]
    while True:
        try:
            return pkgutil.resolve_name(f"{importlib.import_module(module).__name__}:{path[len(module) + 1 :]}")
        except ModuleNotFoundError:
            module = module.rpartition(".")[0]
            if not module:
                raise
