"""Speculative decoding by n-grams with adapters: tokens are PEFT's, whoever's answers the drafts were taken from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from blocklora_testing.server import Server, running

NEW_TOKENS = 16
INVOCATION = [17, 42, 99]
CHOICES = {
    "plain": AdapterChoice(rank=8),
    "n2": AdapterChoice(2, rank=8),
    "n4": AdapterChoice(4, rank=16),
    "judge": AdapterChoice(rank=8, invocation=tuple(INVOCATION)),
}
LAUNCHER = ("-m", "blocklora_testing.ngram_launcher")


class Asked(NamedTuple):
    """A prompt for an adapter (None: the base model), and PEFT's answer."""

    prompt: list[int]
    adapter: str | None
    answer: list[int]


def check(server: Server, asked: list[Asked]) -> tuple[int, int]:
    """Everybody gets PEFT's tokens, all at once; how many tokens were proposed as drafts, and how many were right."""

    def ask(one: Asked) -> tuple[int, int]:
        sampling = {"temperature": 0, "max_new_tokens": len(one.answer), "ignore_eos": True}
        body = {"input_ids": one.prompt, "lora_path": one.adapter, "sampling_params": sampling}
        status, found = server.call("/generate", body)
        assert status == 200, found
        assert found["output_ids"] == one.answer, one.adapter
        return found["meta_info"]["spec_num_proposed_drafts"], found["meta_info"]["spec_num_correct_drafts"]

    with ThreadPoolExecutor(len(asked)) as threads:
        proposed, right = zip(*threads.map(ask, asked), strict=True)
    return sum(proposed), sum(right)


@pytest.mark.matrix
@pytest.mark.parametrize("flags", [("--tp", "2", "--max-total-tokens", "2048"), ("--adapter-memory", "static")])
def test_drafts_taken_from_any_answer_change_no_token(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Drafts come from all answers so far: right ones from the same adapter's, wrong ones from the others'."""
    model = build_model(tmp_path / "model", "llama")
    adapters = build_adapters(model, tmp_path / "adapters", CHOICES)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(100, VOCAB, (count,), generator=generator).tolist() for count in (5, 40)]
    prompts = [prompt + INVOCATION + [3] for prompt in prompts]
    expected = peft_tokens(model, adapters, prompts, NEW_TOKENS)
    asked = [Asked(prompts[i], name, expected[name][i]) for i in range(len(prompts)) for name in expected]
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
    speculate = ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6"]
    environment = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}
    log = tmp_path / "log"
    with running(model, *speculate, *flags, *paths, log=log, environment=environment, module=LAUNCHER) as server:
        check(server, asked)
        proposed, right = check(server, asked)
        assert 0 < right < proposed, "drafts of both kinds were verified"
        # What is cached of an answer is the KV of its tokens, not that of drafts which were wrong.
        check(server, [Asked(one.prompt + one.answer[:7], one.adapter, one.answer[7:]) for one in asked])
