"""Adds adapters' deltas to a model's embeddings and logits, on each TP rank for the token ids that it has.

Embeddings are added to before they are reduced, logits before they are gathered: no collective is added.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_exec
from sglang_blocklora.batch.torch_adder import TorchAdder
from sglang_blocklora.batch.triton_adder import TritonAdder
from sglang_blocklora.sharding.linears import Interval
from sglang_blocklora.sharding.vocabulary import EMBEDDING, HEAD, Vocabulary

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.model.linears import Linears, is_compared, layer_path

STEP = "blocklora_step"  # of the two modules that adapters are on: what adds the deltas


def adaptable_vocabulary(model: torch.nn.Module, linears: Linears) -> tuple[Vocabulary | None, str | None]:
    """Embeddings and head that adapters can be on, as this TP rank has them; or None and the reason."""
    if get_exec().deterministic.enable_deterministic_inference:
        return None, "the head's tiles follow from the batch"
    if not is_compared(model):
        return None, "this architecture was not compared with PEFT"
    if get_exec().features.enable_mis:
        return None, "--enable-mis takes logits in another way"
    decoder = layer_path(linears[0]).rpartition("layers.")[0]
    path = f"{decoder}{EMBEDDING}"
    embedding = next((module for name, module in model.named_modules() if name == path), None)
    if not isinstance(embedding, VocabParallelEmbedding) or len(_logits(model)) != 1:
        return None, f"it has no {path} that is split over TP ranks, or not one place where logits are made"
    indices, size = embedding.shard_indices, embedding.org_vocab_size
    if embedding.num_added_embeddings:
        return None, "it has embeddings beside its vocabulary"
    start = indices.padded_org_vocab_start_index
    ids = Interval(start, start + embedding.num_embeddings_per_partition, size)
    return Vocabulary(path, HEAD, ids), None


def adapt_vocabulary(model: torch.nn.Module, vocabulary: Vocabulary, step: TorchAdder | TritonAdder) -> None:
    """Let ``step`` add to the embeddings and the logits of ``model``."""
    setattr(model.get_submodule(vocabulary.embedding), STEP, step)
    setattr(_logits(model)[0], STEP, step)


def _logits(model: torch.nn.Module) -> list[LogitsProcessor]:
    return [module for module in model.modules() if isinstance(module, LogitsProcessor)]


def _embed(original: Any, self: Any, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = original(self, ids)
    step = getattr(self, STEP, None)
    if step is not None:
        step.add_to_embeddings_(out, ids)
    return out


def _prune(original: Any, self: Any, hidden: torch.Tensor, before_norm: Any, others: Any, metadata: Any) -> Any:
    """Whose logits are computed is found by giving the tokens' numbers the same way as their hidden states."""
    pruned = original(self, hidden, before_norm, others, metadata)
    step = getattr(self, STEP, None)
    if step is None or not step.adapts_head:
        return pruned
    if pruned[0] is hidden:
        step.prepare_logits(None)
    else:
        numbers = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        step.prepare_logits(original(self, numbers, None, None, metadata)[0].squeeze(1))
    return pruned


def _head(original: Any, self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    logits: torch.Tensor = original(self, hidden, *args, **kwargs)
    step = getattr(self, STEP, None)
    if step is None or not step.adapts_head:
        return logits
    if logits.dtype == hidden.dtype:
        step.add_to_logits_(logits, hidden)
        return logits
    deltas = torch.zeros_like(logits, dtype=hidden.dtype)  # of a head that is computed in float32
    step.add_to_logits_(deltas, hidden)
    return logits + deltas


_LOGITS = "sglang.srt.layers.logits_processor.LogitsProcessor"
HOOKS = (
    Hook(
        "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding._embed_local_shard",
        _embed,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="Adapters on embeddings are added to a TP rank's part before it is reduced.",
        retire_when="upstream asks the quant method for embeddings on every path",
    ),
    Hook(
        f"{_LOGITS}._get_pruned_states",
        _prune,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="It alone knows of which tokens logits are computed, and those decide the adapter.",
        retire_when="upstream tells its LoRA manager the rows of the head",
    ),
    Hook(
        f"{_LOGITS}._compute_lm_head",
        _head,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="The head is computed from its weights, past its quant method; adapters are added before the gather.",
        retire_when="upstream asks the quant method of the head",
    ),
)
