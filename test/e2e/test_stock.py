"""The base model of a server with adapters answers as stock SGLang does, to the last bit of every log probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.latent_attention import FAMILIES, change_for
from blocklora_testing.server import Server, running

from benchmark.serving import stock_server

COMPARED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gemma", "granite", "olmo2", "glm4", "stablelm")
COMPARED += ("cohere", "cohere2", "gemma3_text", "ministral3", "arcee", "apertus", "qwen3_moe", "mixtral")
# 40 seconds each, so ``make test-all`` runs them.
MATRIX = [pytest.param(one, marks=pytest.mark.matrix) for one in (*COMPARED, *FAMILIES)]


def answers(server: Server, case: Case) -> list[Any]:
    """Tokens and log probabilities of prompts and answers, one request after another, cold and from the cache."""
    found = []
    for prompt in (*case.prompts, *case.prompts):
        status, answer = server.call(
            "/generate",
            {
                "input_ids": prompt,
                "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 5,
            },
        )
        assert status == 200, answer
        meta = answer["meta_info"]
        kept = ("input_token_logprobs", "output_token_logprobs", "input_top_logprobs", "output_top_logprobs")
        found.append((answer["output_ids"], *(meta[name] for name in kept)))
    return found


@pytest.mark.parametrize("family", MATRIX)
def test_the_base_model_is_stock_to_the_last_bit(case: Any, tmp_path: Path, family: str) -> None:
    chosen = case(family, 2)
    module, change = (stock_server.__file__,), change_for(family)
    variables = {stock_server.CHANGE_VARIABLE: f"{change.__module__}:{change.__name__}"} if change else {}
    with running(chosen.model, "--tp", "2", log=tmp_path / "stock", module=module, environment=variables) as server:
        expected = answers(server, chosen)
    flags = ("--tp", "2", *chosen.lora_paths)
    with running(chosen.model, *flags, log=tmp_path / "log", warm=True, change=change) as server:
        assert answers(server, chosen) == expected
        server.many(chosen.requests(), NEW_TOKENS)  # adapters come and go in between
        assert answers(server, chosen) == expected
