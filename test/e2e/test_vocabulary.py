"""Adapters on embeddings and ``lm_head``: PEFT's tokens and log probabilities, over HTTP at TP 1, 2 and 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from blocklora_testing.architectures.tiny import config_of
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.models import (
    COLUMN,
    CONFIGS,
    ROW,
    answers_by_adapter,
    build,
    family_config,
    peft_tokens,
    random_adapter,
)
from blocklora_testing.server import Server, running
from peft.tuners.lora import BdLoraConfig

VOCAB = 300  # no multiple of 64: the last TP rank has padding
T = TypeVar("T")
LOGPROB_CHUNK = 4  # tokens whose logits are computed at once: prompts are cut within an adapter's rows


def choices(tied: bool) -> dict[str, dict]:
    """Arguments of PEFT's ``LoraConfig``."""
    blocks = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=[*COLUMN, "lm_head"], nblocks=2)
    made = {
        "head": {"r": 4, "target_modules": ["lm_head"]},
        "embedding": {"r": 6, "target_modules": ["embed_tokens"]},
        "all": {"r": 8, "target_modules": ["embed_tokens", "lm_head", *COLUMN, *ROW], "use_rslora": True},
        "blocks": {"r": 4, "target_modules": ["lm_head", *COLUMN, *ROW], "use_bdlora": blocks},
        "attention": {"r": 4, "target_modules": ["q_proj"]},
    }
    if tied:  # PEFT then has one pair of factors for both, and saves them for each
        made["tied"] = {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    return made


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """A model of a family whose embeddings are tied or not, adapters on them, and PEFT's tokens."""
    family, tied = request.param
    config = family_config(family, layers=3) if family in CONFIGS else config_of(family)
    config.vocab_size, config.tie_word_embeddings = VOCAB, tied
    model = build(tmp_path / "model", config, family)
    adapters = {
        name: random_adapter(model, tmp_path / "adapters" / name, **arguments)
        for name, arguments in choices(tied).items()
    }
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 23)]
    expected = alone(adapters, lambda some: peft_tokens(model, some, prompts, NEW_TOKENS))
    assert len({str(tokens) for tokens in expected.values()}) == len(expected), "an adapter that changes nothing"
    return Case(model, adapters, prompts, expected)


def alone(adapters: dict[str, Path], answers: Callable[[dict[str, Path]], dict[str | None, T]]) -> dict[str | None, T]:
    """``answers`` of all; PEFT ties factors of a model's first adapter only, so a tied one has a model of its own."""
    tied = {name: path for name, path in adapters.items() if name == "tied"}
    others = answers({name: path for name, path in adapters.items() if name not in tied})
    return others | (answers(tied) if tied else {})


def logprobs(server: Server, prompt: list[int], adapter: str | None) -> tuple[list[float], dict[int, float]]:
    """Of each token of the prompt but the first, and of the likeliest first tokens of the answer."""
    body = {"input_ids": prompt, "lora_path": adapter, "return_logprob": True, "logprob_start_len": 0}
    body |= {"top_logprobs_num": 8, "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}
    status, answer = server.call("/generate", body)
    assert status == 200, answer
    told = answer["meta_info"]
    inputs = [value for value, *_ in told["input_token_logprobs"][1:]]
    return inputs, {token: value for value, token, *_ in told["output_top_logprobs"][0]}


def check_logprobs(server: Server, made: Case) -> None:
    prompt = made.prompts[1]

    def logits(model: torch.nn.Module) -> list[list[float]]:
        return model(torch.tensor([prompt])).logits[0].log_softmax(-1).tolist()

    for name, expected in alone(made.adapters, lambda some: answers_by_adapter(made.model, some, logits)).items():
        inputs, first = logprobs(server, prompt, name)
        wanted = [expected[i][token] for i, token in enumerate(prompt[1:])]
        assert inputs == pytest.approx(wanted, abs=2e-3), name
        assert first == pytest.approx({token: expected[-1][token] for token in first}, abs=2e-3), name
        assert max(expected[-1]) == pytest.approx(max(first.values()), abs=2e-3), name


# Llama's; and a family that scales embeddings and caps logits.
CASES = [
    *(("llama", tied, tp) for tied in (True, False) for tp in (1, 2, 4)),
    ("gemma2", True, 2),
]
MATRIX = [
    pytest.param(
        (family, tied),
        tp,
        marks=() if (family, tied, tp) == ("llama", True, 2) else pytest.mark.matrix,
        id=f"{family}-{'un' * (not tied)}tied-{tp}",
    )
    for family, tied, tp in CASES
]


@pytest.mark.parametrize(("made", "tp"), MATRIX, indirect=["made"])
# PEFT warns of the embeddings that it saves, and of tied ones that get an adapter.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_tokens_and_logprobs_equal_peft(made: Case, tp: int, tmp_path: Path) -> None:
    chunks = {
        "SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK": "1",
        "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE": str(LOGPROB_CHUNK),
    }
    flags = ["--tp", str(tp), *made.lora_paths]
    with running(made.model, *flags, log=tmp_path / "log", environment=chunks, warm=True) as server:
        for warmth in ("cold", "warm prefix cache"):
            assert server.many(made.requests(), NEW_TOKENS) == made.answers(), warmth
        check_logprobs(server, made)
