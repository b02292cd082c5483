"""A tiny config of any model type: transformers' defaults with small sizes where it has them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from blocklora_testing import models  # first: it makes transformers importable

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig  # isort: skip
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # isort: skip

LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": 288,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "head_dim": 24,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 192,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_shared_experts": 1,
}
# Multi-head latent attention: heads of 16 numbers and 8 with positions, values of 24. SGLang's CPU engine has positions
# of this kind alone; the factor makes them plain ones.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 12,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "head_dim": 8,
    "v_head_dim": 24,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 1.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
# What cannot be had from sizes. Logit caps so high that they do nothing: torch_native attention ignores them.
OWN: dict[str, dict[str, Any]] = {
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1e4,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"query_pre_attn_scalar": 24, "tie_word_embeddings": True, "sliding_window": 512},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "sliding_window": 512},
    # What SGLang reads and real checkpoints have, and transformers' defaults have not, or have as something else.
    "exaone4": {"sliding_window_pattern": None, "sliding_window": None, "layer_types": ["full_attention"] * LAYERS},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "deepseek_v2": LATENT | {"q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy"},
    "deepseek_v3": LATENT | {"q_lora_rank": 48, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm4_moe_lite": LATENT | {"q_lora_rank": 48, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def model_types() -> dict[str, str]:
    """Model type of transformers -> architecture; text models only."""
    return {
        kind: name
        for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if not name.endswith("ForConditionalGeneration")
    }


def config_of(model_type: str, kv_heads: int = 2) -> PreTrainedConfig:
    """A config with ``LAYERS`` layers; whatever transformers raises where its defaults do not go with the sizes."""
    config = CONFIG_MAPPING[model_type]()
    for name, value in (SIZES | {"num_key_value_heads": kv_heads} | OWN.get(model_type, {})).items():
        if hasattr(config, name) or name in OWN.get(model_type, {}):
            with contextlib.suppress(AttributeError, NotImplementedError):
                setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(kinds := getattr(config, name, None), list):
            setattr(config, name, kinds[:LAYERS])
    config.dtype = "float32"
    return config


def modules_of(model: Path) -> tuple[str, ...]:
    """Names of the linears that a model's folder has of those that we adapt, o and down last.

    No name that shared experts have too: PEFT would put adapters on both.
    """
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    parents: dict[str, set[str]] = {}
    for path, one in made.named_modules():
        if isinstance(one, torch.nn.Linear):
            parent, _, name = path.rpartition(".")
            parents.setdefault(name, set()).add(parent.rpartition(".")[2])
    found = {name for name, own in parents.items() if own <= {"self_attn", "mlp"}}
    return tuple(
        name for name in (*models.COLUMN, *models.PHI3_COLUMN, *models.LATENT_COLUMN, *models.ROW) if name in found
    )
