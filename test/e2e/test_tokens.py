"""Greedy tokens equal PEFT's own ``generate``: real server over HTTP, float32, mixed concurrent batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocklora_testing import latent_attention
from blocklora_testing.case import NEW_TOKENS
from blocklora_testing.latent_attention import change_for
from blocklora_testing.server import running

# (family, KV heads, TP size); 2 KV heads on 4 and 8 ranks make SGLang's CPU engine pad heads (Olmo2 and Mixtral then
# take another head dimension than the checkpoint's). ``make test`` runs the unmarked ones: Llama at TP 2 is in
# test_serving.py, at TP 1 in test_data_parallel.py.
REPRESENTATIVE = [("qwen2", 2, 4), ("qwen3", 6, 3), ("qwen3_moe", 2, 2), ("deepseek_v3", 2, 2)]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3")
OTHERS = ("gemma", "granite", "olmo2", "glm4", "stablelm", "cohere", "cohere2", "gemma3_text", "ministral3")
OTHERS += ("arcee", "apertus", "qwen3_moe", "mixtral", *latent_attention.FAMILIES)
REST = [
    *((family, 6 if tp == 3 else 2, tp) for family in FAMILIES for tp in (1, 2, 3, 4)),
    *((family, 4 if tp == 4 else 2, tp) for family in OTHERS for tp in (1, 2, 4)),
    ("llama", 2, 8),
]
MATRIX = REPRESENTATIVE + [
    pytest.param(*entry, marks=pytest.mark.matrix) for entry in REST if entry not in REPRESENTATIVE
]


@pytest.mark.parametrize(("family", "kv_heads", "tp"), MATRIX)
def test_tokens_equal_peft(case, tmp_path: Path, family: str, kv_heads: int, tp: int) -> None:
    chosen = case(family, kv_heads)
    flags = ("--tp", str(tp), *chosen.lora_paths)
    with running(chosen.model, *flags, log=tmp_path / "log", warm=True, change=change_for(family)) as server:
        for warmth in ("cold", "warm prefix cache"):
            found = server.many(chosen.requests(), NEW_TOKENS)
            assert found == chosen.answers(), warmth
