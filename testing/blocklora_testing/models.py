"""Tiny Hugging Face models with random weights, PEFT adapters on them, and what PEFT itself generates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sglang_blocklora import cpu_only

cpu_only.install_shims()  # transformers imports torchvision where it is installed

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners.lora import BdLoraConfig  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
PHI3_COLUMN = ["qkv_proj", "gate_up_proj"]
LATENT_COLUMN = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"]
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "phi3": Phi3Config,
}
VOCAB = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter to make: nblocks None for plain LoRA; targets None for all seven linears.

    invocation  tokens from which on it is active
    """

    nblocks: int | None = None
    rank: int = 8
    targets: tuple[str, ...] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    invocation: tuple[int, ...] = ()


def family_config(
    family: str,
    *,
    heads: int = 12,
    kv_heads: int = 2,
    head_dim: int = 24,  # a multiple of 8, so that one KV head makes a row that unified memory can use
    layers: int = 2,
    hidden_size: int = 288,  # heads times head_dim: SGLang's Qwen2 does not read head_dim
    intermediate_size: int = 192,
) -> PreTrainedConfig:
    """The config of a tiny model.

    The default widths divide by 1, 2, 3, 4 and 8, the TP sizes and block counts of the tests.
    """
    extra: dict = {"tie_word_embeddings": False} | {
        "phi3": {"pad_token_id": 0},
        # hidden_act and tied embeddings as in real checkpoints; a cap so high that it does nothing, because SGLang's
        # torch_native attention ignores it (the base model's tokens differ from Hugging Face's too).
        "gemma2": {
            "hidden_act": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1e4,
            "tie_word_embeddings": True,
        },
    }.get(family, {})
    return CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,  # a token of random bytes becomes up to three when an answer is sent again
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
        **extra,
    )


def build_model(folder: Path, family: str, *, seed: int = 0, **sizes: int) -> Path:
    """Save a random float32 model with a byte-level tokenizer.

    family  of ``CONFIGS``, with ``sizes`` as for ``family_config``; or any of transformers' model types, with KV heads
    """
    from blocklora_testing.architectures.tiny import config_of  # which needs this module

    config = family_config(family, **sizes) if family in CONFIGS else config_of(family, **sizes)
    return build(folder, config, family, seed)


def build(folder: Path, config: PreTrainedConfig, family: str, seed: int = 0) -> Path:
    """Save a random float32 model of ``config`` with a byte-level tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, which would hide a bias that is lost
                parameter.normal_(std=0.3)
            if family in ("gemma2", "gemma3_text") and name.endswith(
                ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
            ):
                parameter.fill_(5.0)  # tied random embeddings would otherwise repeat one token for ever
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 256 tokens with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def build_adapters(model_folder: Path, folder: Path, choices: Mapping[str, AdapterChoice]) -> dict[str, Path]:
    """Make random adapters with PEFT itself and save them as PEFT does; returns name -> folder."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    column = PHI3_COLUMN if base.config.model_type == "phi3" else COLUMN
    peft_model, previous = None, None
    # Only PEFT's model for this task looks for invocations.
    task = "CAUSAL_LM" if any(choice.invocation for choice in choices.values()) else None
    for seed, (name, choice) in enumerate(choices.items()):
        targets = list(choice.targets or (*column, *ROW))
        bd = choice.nblocks and BdLoraConfig(
            target_modules_bd_a=[t for t in ROW if t in targets],
            target_modules_bd_b=[t for t in targets if t not in ROW],
            nblocks=choice.nblocks,
        )
        config = LoraConfig(
            r=choice.rank,
            lora_alpha=2 * choice.rank,
            target_modules=targets,
            use_bdlora=bd or None,
            use_rslora=choice.use_rslora,
            rank_pattern=dict(choice.rank_pattern or {}),
            task_type=task,
            alora_invocation_tokens=list(choice.invocation) if choice.invocation and not choice.nblocks else None,
        )
        if peft_model is None:
            peft_model = get_peft_model(base, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
        torch.manual_seed(seed + 100)
        with torch.no_grad():
            for parameter_name, parameter in peft_model.named_parameters():
                if f".{name}." in parameter_name:
                    parameter.normal_(std=0.12)
        peft_model.save_pretrained(folder, selected_adapters=[name])
        if previous is not None:
            peft_model.set_adapter(name)
            peft_model.delete_adapter(previous)  # hundreds in one model take time that grows with their square
        previous = name
    for name, choice in choices.items():
        if choice.invocation and choice.nblocks:  # which PEFT cannot run together
            changed = read_config(folder / name) | {"alora_invocation_tokens": list(choice.invocation)}
            (folder / name / "adapter_config.json").write_text(json.dumps(changed))
    return {name: folder / name for name in choices}


def random_adapter(model_folder: Path, folder: Path, **config: Any) -> Path:
    """A random adapter that PEFT makes of ``LoraConfig``'s arguments, and saves."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(lora_alpha=8, **config))
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.15, generator=generator)
    made.save_pretrained(folder)
    return folder


def dense_twin(adapter: Path, folder: Path) -> Path:
    """A block-diagonal adapter as the plain one that computes the same: PEFT can run that with an invocation."""
    config = read_config(adapter)
    blocks = config.pop("use_bdlora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, factor in tensors.items():
        packed = blocks["target_modules_bd_a" if ".lora_A." in name else "target_modules_bd_b"]
        if any(pattern in name for pattern in packed):
            tensors[name] = torch.block_diag(*factor.chunk(blocks["nblocks"])).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_tokens(
    model_folder: Path, adapters: Mapping[str, Path], prompts: Sequence[Sequence[int]], new_tokens: int
) -> dict[str | None, list[list[int]]]:
    """Greedy tokens of PEFT's own ``generate`` for the base model (key None) and every adapter, prompt by prompt."""

    def answers(model: Any) -> list[list[int]]:
        return [
            model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2**30,  # no token is: answers have their full length
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]

    return answers_by_adapter(model_folder, adapters, answers)


def answers_by_adapter(
    model_folder: Path, adapters: Mapping[str, Path], answers: Callable[[Any], list[list[int]]]
) -> dict[str | None, list[list[int]]]:
    """What ``answers`` makes of PEFT's model (float32) with each adapter in turn, and of the base model (key None)."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    first, *others = adapters
    model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
    for name in others:
        model.load_adapter(adapters[name], adapter_name=name)
    model.eval()
    expected: dict[str | None, list[list[int]]] = {}
    with torch.inference_mode():
        for name in adapters:
            model.set_adapter(name)
            expected[name] = answers(model)
        with model.disable_adapter():
            expected[None] = answers(model)
    return expected


def read_config(path: Path) -> dict:
    """``adapter_config.json`` of an adapter folder."""
    return json.loads((path / "adapter_config.json").read_text())
