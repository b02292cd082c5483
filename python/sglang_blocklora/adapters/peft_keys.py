"""Says what becomes of each key of PEFT's ``adapter_config.json``: served, unused with a note, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sglang_blocklora.adapters.errors import AdapterError, brief, listed


class Refused(NamedTuple):
    """A key that changes what the adapter computes, in a way that is not served."""

    why: str
    advice: str


class Unused(NamedTuple):
    """A key that changes nothing here, which the user is told once."""

    why: str


APPLIED = "applied"
SILENT = "silent"  # about training, or where the adapter came from: nothing to apply and nothing to tell

# A key that is off (null, false, 0 or empty) is never refused and never told.
KEYS: Mapping[str, str | Unused | Refused] = {
    "peft_type": APPLIED,
    "r": APPLIED,
    "lora_alpha": APPLIED,
    "rank_pattern": APPLIED,
    "alpha_pattern": APPLIED,
    "use_rslora": APPLIED,
    "use_bdlora": APPLIED,
    "target_modules": APPLIED,
    "target_parameters": APPLIED,
    "exclude_modules": APPLIED,
    "layers_to_transform": APPLIED,
    "layers_pattern": APPLIED,
    "bias": APPLIED,
    "init_lora_weights": APPLIED,
    "alora_invocation_tokens": APPLIED,
    "task_type": SILENT,
    "auto_mapping": SILENT,
    "peft_version": SILENT,
    "base_model_name_or_path": SILENT,
    "revision": SILENT,
    "inference_mode": SILENT,
    "lora_dropout": SILENT,
    "megatron_core": SILENT,  # where to import Megatron from; megatron_config says whether it is used
    "qalora_group_size": SILENT,  # read with use_qalora only
    "ensure_weight_tying": APPLIED,
    "loftq_config": SILENT,  # these four are arguments of initialisations: init_lora_weights says which one was used
    "eva_config": SILENT,
    "corda_config": SILENT,
    "lora_ga_config": SILENT,
    "merge_weights": SILENT,  # of PEFT 0.2: whether eval() merged
    "fan_in_fan_out": Unused("the served layers are Linear, on which PEFT ignores it too"),
    "runtime_config": Unused("PEFT ignores it in a file too"),
    "use_dora": Refused("DoRA is not served", "Train without use_dora, or merge the adapter into the base model."),
    "lora_bias": Refused(
        "lora_bias is not served (and PEFT drops it on block-diagonal modules)", "Train without lora_bias."
    ),
    "modules_to_save": Refused("fully trained modules are not served", "Train without modules_to_save, or merge."),
    "trainable_token_indices": Refused(
        "trained token embeddings are not served", "Train without trainable_token_indices."
    ),
    "layer_replication": Refused("replicated layers are not served", "Train without layer_replication."),
    "megatron_config": Refused("Megatron layers are not served", "Convert the adapter to plain PEFT linears."),
    "use_qalora": Refused("QALoRA is not served", "Train without use_qalora."),
    "arrow_config": Refused("Arrow routing is not served", "Serve the routed adapters one by one."),
    "monteclora_config": Refused("MonteCLoRA is not served", "Train without monteclora_config."),
    "velora_config": Refused("VeLoRA is not served", "Train without velora_config."),
    "kasa_config": Refused("KaSA is not served", "Train without kasa_config."),
    "enable_lora": Refused("parts of a fused layer (PEFT 0.2) are not served", "Train with a current PEFT."),
}
# Initialisations that leave the base weights as they are. All others change them, and an adapter of theirs is only
# right on that changed base model.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def check_keys(adapter: str, raw: Mapping[str, Any]) -> list[str]:
    """Refuse what is not served and what is not known; the keys that are not used, each with the reason.

    Raises ``AdapterError``.
    """
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(adapter, f"peft_type {brief(peft_type)}", "'LORA'", "Only LoRA adapters are served.")
    unused = []
    unknown = []
    for key, value in raw.items():
        fate = KEYS.get(key)
        if not value or fate in (APPLIED, SILENT):
            continue
        if isinstance(fate, Refused):
            raise AdapterError(adapter, f"{key} = {brief(value)}", f"no {key}: {fate.why}", fate.advice)
        if isinstance(fate, Unused):
            unused.append(f"{key} = {brief(value)} ({fate.why})")
        else:
            unknown.append(f"{brief(key)} = {brief(value)}")
    if unknown:
        raise AdapterError(
            adapter,
            f"{listed(unknown)} in adapter_config.json",
            "keys of PEFT's LoraConfig that this version knows, since another may change what the adapter computes",
            "Delete the key if it changes nothing, or serve the adapter with a version that knows it.",
        )
    _check_bias_and_init(adapter, raw)
    return unused


def _check_bias_and_init(adapter: str, raw: Mapping[str, Any]) -> None:
    bias = raw.get("bias") or "none"
    if bias != "none":
        raise AdapterError(adapter, f"bias = {brief(bias)}", "'none'", "Trained base biases are not served.")
    init = raw.get("init_lora_weights")
    known = init.lower() if isinstance(init, str) else init
    if not any(known is one or known == one for one in HARMLESS_INITS):
        raise AdapterError(
            adapter,
            f"init_lora_weights = {brief(init)}",
            "an initialisation that leaves the base weights as they are (true, false, "
            f"{', '.join(one for one in HARMLESS_INITS if isinstance(one, str))})",
            "Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter.",
        )
