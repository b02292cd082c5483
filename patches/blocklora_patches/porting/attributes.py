"""Tells the generator of a contract which attributes of SGLang's objects we use where no type is declared."""

from __future__ import annotations

_MANAGERS = "sglang.srt.managers"

# Class -> attributes and methods that its objects must have, in the processes of a server ...
SERVER: dict[str, tuple[str, ...]] = {
    # The HTTP process.
    f"{_MANAGERS}.tokenizer_manager.TokenizerManager": (
        "auto_create_handle_loop",
        "context_len",
        "get_internal_state",
        "lora_ref_cache",
        "lora_registry",
        "model_config",
        "rid_to_state",
        "served_model_name",
        "set_internal_state",
        "tokenizer",
    ),
    f"{_MANAGERS}.tokenizer_manager.ReqState": ("finished", "obj", "time_stats", "ttft_observed"),
    f"{_MANAGERS}.io_struct.GenerateReqInput": (
        "batch_size",
        "contains_mm_input",
        "input_embeds",
        "input_ids",
        "is_single",
        "logprob_start_len",
        "lora_id",
        "lora_path",
        "parallel_sample_num",
        "rid",
        "sampling_params",
        "session_params",
        "top_logprobs_num",
    ),
    f"{_MANAGERS}.io_struct.TokenizedGenerateReqInput": ("rid", "routed_dp_rank", "sampling_params"),
    f"{_MANAGERS}.io_struct.BatchStrOutput": ("cached_tokens", "completion_tokens", "prompt_tokens", "rids"),
    f"{_MANAGERS}.io_struct.LoadLoRAAdapterReqInput": ("lora_id", "lora_name", "lora_path", "pinned"),
    f"{_MANAGERS}.io_struct.UnloadLoRAAdapterReqInput": ("lora_id", "lora_name"),
    f"{_MANAGERS}.io_struct.LoRAUpdateOutput": ("error_message", "success"),
    f"{_MANAGERS}.io_struct.GetInternalStateReqOutput": ("internal_state",),
    f"{_MANAGERS}.io_struct.SetInternalStateReq": ("server_args",),
    "sglang.srt.lora.lora_registry.LoRARef": ("lora_id", "lora_name", "lora_path", "pinned"),
    "sglang.srt.lora.lora_registry.LoRARegistry": (
        "_counters",
        "_registry",
        "register",
    ),
    "sglang.srt.server_args.ServerArgs": (
        "check_server_args",
        "encoder_only",
        "grpc_mode",
        "grpc_port",
        "resolve_once",
        "smg_grpc_mode",
        "tokenizer_worker_num",
        "use_ray",
        # Read from the runtime context, whose namespaces have the names of flags.
        "attn_cp_size",
        "disable_radix_cache",
        "disaggregation_mode",
        "dp_size",
        "enable_flexkv",
        "enable_hierarchical_cache",
        "enable_layernorm_sp",
        "enable_lmcache",
        "enable_lora",
        "enable_lora_overlap_loading",
        "enable_page_major_kv_layout",
        "enable_pdmux",
        "enable_session_radix_cache",
        "enable_streaming_session",
        "enable_torch_compile",
        "enable_two_batch_overlap",
        "enable_unified_cache_external_linker",
        "kv_cache_dtype",
        "max_loaded_loras",
        "pp_size",
        "prefill_only_disable_kv_cache",
        "radix_cache_backend",
        "speculative_algorithm",
        "tp_size",
    ),
    "sglang.srt.runtime_context.ParallelContext": ("attn_dcp_size", "tp_group"),
    f"{_MANAGERS}.data_parallel_controller.DataParallelController": ("maybe_external_dp_rank_routing",),
    # The scheduler.
    f"{_MANAGERS}.scheduler.Scheduler": (
        "chunked_prefill_size",
        "enable_hierarchical_cache",
        "lora_drainer",
        "max_prefill_tokens",
        "page_size",
        "policy",
        "schedule_low_priority_values_first",
    ),
    f"{_MANAGERS}.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver": ("session_held_tokens",),
    f"{_MANAGERS}.tp_worker.TpModelWorker": ("model_runner",),
    f"{_MANAGERS}.schedule_batch.Req": (
        "cache_salt",
        "extra_key",
        "finished",
        "last_node",
        "lora_id",
        "num_matched_prefix_tokens",
        "origin_input_ids",
        "output_ids",
        "priority",
        "rid",
        "sampling_params",
        "set_finish_with_abort",
    ),
    f"{_MANAGERS}.schedule_batch.ScheduleBatch": ("batch_is_full", "is_empty", "reqs"),
    f"{_MANAGERS}.schedule_policy.SchedulePolicy": ("enable_priority_scheduling", "priority_sign"),
    "sglang.srt.sampling.sampling_params.SamplingParams": ("max_new_tokens",),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": ("extend_seq_lens_cpu", "forward_mode", "lora_ids"),
    # The model.
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool": ("k_buffer", "store_dtype", "v_buffer"),
    "sglang.srt.configs.model_config.ModelConfig": (
        "attention_arch",
        "dtype",
        "get_num_kv_heads",
        "head_dim",
        "hf_config",
        "is_hybrid_swa",
        "v_head_dim",
        "vocab_size",
    ),
    "sglang.srt.distributed.parallel_state.GroupCoordinator": ("all_gather_object",),
    "sglang.srt.layers.quantization.base_config.QuantizeMethodBase": ("process_weights_after_loading",),
    "sglang.srt.layers.linear.LinearBase": ("input_size", "output_size", "quant_method"),
    "sglang.srt.layers.linear.ColumnParallelLinear": ("output_partition_sizes",),
    "sglang.srt.layers.linear.RowParallelLinear": ("forward", "input_size_per_partition"),
    "sglang.srt.layers.linear.QKVParallelLinear": (
        "head_size",
        "kv_proj_shard_size",
        "num_kv_head_replicas",
        "q_proj_shard_size",
    ),
    # The radix cache.
    "sglang.srt.mem_cache.radix_cache.RadixKey": ("cache_salt", "extra_key", "raw_token_ids"),
    "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface": (
        "dec_full_pin",
        "inc_full_pin",
        "is_full_device_evicted",
        "match_full_device_prefix",
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator": ("alloc", "available_size", "device", "size"),
    "sglang.srt.mem_cache.events.KVCacheEventRecorder": ("enqueue", "take"),
    "sglang.srt.mem_cache.cache_init_params.CacheInitParams": ("enable_kv_cache_events", "page_size"),
    "sglang.srt.mem_cache.base_prefix_cache.InsertParams": ("key", "prev_prefix_len", "session_id", "value"),
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams": ("key",),
    "sglang.srt.mem_cache.base_prefix_cache.EvictParams": ("num_tokens",),
    "sglang.srt.mem_cache.base_prefix_cache.EvictResult": ("num_tokens_evicted",),
    "sglang.srt.mem_cache.base_prefix_cache.InsertResult": ("last_device_node", "prefix_len", "total_len"),
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult": ("full_kv_hit_length",),
}

# ... and where the frontend language runs.
FRONTEND: dict[str, tuple[str, ...]] = {
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint": (
        "_add_images",
        "_assert_success",
        "_generate_http_request",
        "api_key",
        "base_url",
        "cache_prefix",
        "verify",
    ),
    "sglang.lang.interpreter.StreamExecutor": ("_resolve_sampling_params", "num_api_spec_tokens", "stream"),
    "sglang.lang.ir.SglExprList": ("expr_list",),
    "sglang.lang.ir.SglSamplingParams": ("n",),
    "sglang.lang.global_config.GlobalConfig": ("default_backend",),
}

# What hooks use of a ``self`` that its class does not have, and why.
ELSEWHERE = frozenset(
    {
        f"{_MANAGERS}.io_struct.EmbeddingReqInput.session_params",  # looked for first
        f"{_MANAGERS}.tokenizer_manager_score_mixin.TokenizerManagerScoreMixin.model_config",  # TokenizerManager has it
    }
)
