"""One base model with an adapter for each variant, trained by the policy gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blocklora_testing import smollm2
from safetensors.torch import save

LAYERS = range(20, 30)  # the upper third: gradients end there
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
LEARNING_RATE = 1e-3
MAX_NORM = 1.0


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt and of one answer to it, the answer's text, and what each of its tokens is worth."""

    prompt: Sequence[int]
    answer: Sequence[int]
    text: str
    worth: Sequence[float]


class Policies:
    """The adapters of all variants over one model, each with an optimizer."""

    def __init__(self, names: Sequence[str]) -> None:
        folder = smollm2.build()
        transformers = smollm2.import_transformers()
        from peft import LoraConfig, get_peft_model  # imports transformers, so only after that

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, layers_to_transform=list(LAYERS), task_type="CAUSAL_LM"
        )
        first, *others = names
        self._model: Any = get_peft_model(base, config, adapter_name=first)
        for name in others:
            self._model.add_adapter(name, config)
        self._optimizers = {}
        for name in names:
            self._model.set_adapter(name)
            parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            self._optimizers[name] = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def tokens(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; empty for the one that ends an answer."""
        return [self._tokenizer.decode([token], skip_special_tokens=True) for token in tokens]

    def weights(self, name: str) -> bytes:
        """A variant's adapter as one safetensors file, whose metadata hold its config."""
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(self._model, adapter_name=name)
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        config = self._model.peft_config[name].to_dict() | {"base_model_name_or_path": Path(smollm2.MODEL_NAME).name}
        return save(tensors, {"adapter_config": json.dumps(config, default=sorted)})

    def improve(self, name: str, samples: Sequence[Sample]) -> None:
        """One step up the gradient of what tokens are worth: each against the mean of all, over their deviation."""
        self._model.set_adapter(name)
        worth = torch.tensor([one for sample in samples for one in sample.worth])
        advantages = (worth - worth.mean()) / (worth.std() + 1e-4)
        loss = -(advantages * self._log_likelihood(samples)).mean()
        optimizer = self._optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    def _log_likelihood(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Log probabilities [tokens] of all answers, one after another.

        The vocabulary projection runs at their positions only.
        """
        width = max(len(sample.prompt) + len(sample.answer) for sample in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        mask, answers = torch.zeros_like(ids), torch.zeros(len(samples), width, dtype=torch.bool)
        for row, sample in enumerate(samples):
            both = [*sample.prompt, *sample.answer]
            ids[row, : len(both)] = torch.tensor(both)
            mask[row, : len(both)] = 1
            answers[row, len(sample.prompt) : len(both)] = True
        causal = self._model.get_base_model()
        hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        chosen = answers[:, 1:]
        logits = causal.lm_head(hidden[chosen])
        return -torch.nn.functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
