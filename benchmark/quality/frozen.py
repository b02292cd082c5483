"""Training at a fraction of the time: layers below the adapted ones are frozen, so their output is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmark.quality import names

CHUNK = 64  # examples at once through the frozen layers


@dataclass(frozen=True)
class Examples:
    """What the adapted layers read, ``[examples, length, hidden size]``; labels and mask, ``[examples, length]``."""

    hidden: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor

    def chosen(self, which: torch.Tensor) -> Examples:
        """Those rows, cut to their longest."""
        length = int(self.mask[which].sum(1).max())
        return Examples(self.hidden[which, :length], self.labels[which, :length], self.mask[which, :length])


def cut(model: Any, layers: int, encoded: list[tuple[torch.Tensor, ...]]) -> list[Examples]:
    """Keep the last ``layers`` of ``model`` in it; return what the removed ones make of each encoded set."""
    body, norm = model.model, model.model.norm
    below, above = body.layers[:-layers], body.layers[-layers:]
    body.layers, body.norm = below, torch.nn.Identity()
    examples = []
    with torch.no_grad():
        for ids, labels, mask in encoded:
            lengths = mask.sum(1)
            hidden = torch.zeros(*ids.shape, model.config.hidden_size)
            for which in lengths.argsort().split(CHUNK):
                part = slice(int(lengths[which].max()))
                body_of = body(input_ids=ids[which, part], attention_mask=mask[which, part], use_cache=False)
                hidden[which, part] = body_of.last_hidden_state
            examples.append(Examples(hidden, labels, mask))
    body.layers, body.norm = above, norm
    return examples


def loss_of(model: Any, examples: Examples) -> torch.Tensor:
    """Mean cross entropy of the answer tokens; the vocabulary projection runs at their positions only."""
    causal = model.get_base_model()
    body = causal.model(inputs_embeds=examples.hidden, attention_mask=examples.mask, use_cache=False)
    wanted = examples.labels[:, 1:]
    at = wanted != names.IGNORED
    return torch.nn.functional.cross_entropy(causal.lm_head(body.last_hidden_state[:, :-1][at]), wanted[at])


def eval_loss(model: Any, examples: Examples) -> float:
    """``loss_of`` all of them."""
    with torch.inference_mode():
        return loss_of(model, examples.chosen(torch.arange(len(examples.mask)))).item()
