"""New tokens beside an adapter are found in whatever file transformers writes them to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from blocklora_testing.models import VOCAB, build_model, save_tokenizer
from peft import LoraConfig, get_peft_model
from sglang_blocklora.adapters.checkpoint import Checkpoint
from sglang_blocklora.adapters.config import read_config
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.tokenizer_files import chat_template, check_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer as the installed transformers saves it: 256 tokens and 2 new ones."""
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.add_tokens(["</tool>"])
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_what_the_installed_transformers_writes(folder: Path) -> None:
    assert not (folder / "added_tokens.json").exists()  # as transformers 4 did: the tokens are elsewhere now
    with pytest.raises(AdapterError, match=r"'<tool>' = 256, '</tool>' = 257.*vocabulary of 256"):
        check_tokens("a", folder, VOCAB)
    with pytest.raises(AdapterError, match=r"found 1 new tokens in .*'</tool>' = 257"):
        check_tokens("a", folder, VOCAB + 1)


def test_ids_below_the_base_models_size_are_no_reason(folder: Path) -> None:
    """A base model's embeddings are often padded: a token in the padding has a row of the base model's own."""
    check_tokens("a", folder, VOCAB + 2)


def test_resized_embeddings_are_named_as_such(tmp_path: Path) -> None:
    """PEFT saves the whole embeddings beside the adapter once the vocabulary has grown."""
    model_folder = build_model(tmp_path / "model", "llama", layers=1)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    base.resize_token_embeddings(VOCAB + 2)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it does
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"lm_head.weight'; expected only .*vocabulary was resized"):
        Checkpoint("a", tmp_path / "adapter", read_config("a", tmp_path / "adapter"))


# What transformers 4 and tokenizers write, each alone in the folder; the token <new> has the id 300.
FILES = {
    "added_tokens.json of transformers 4": ("added_tokens.json", {"<new>": 300}),
    "added_tokens.json as a list": ("added_tokens.json", [{"id": 300, "content": "<new>", "special": True}]),
    "added_tokens_decoder": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"5": {"content": "<s>"}, "300": {"content": "<new>", "lstrip": False}}},
    ),
    "added_tokens of tokenizer.json": (
        "tokenizer.json",
        {"added_tokens": [{"id": 300, "content": "<new>"}], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    ),
    "a BPE vocabulary": ("tokenizer.json", {"added_tokens": [], "model": {"vocab": {"a": 0, "<new>": 300}}}),
    "a Unigram vocabulary": (
        "tokenizer.json",
        {"model": {"type": "Unigram", "vocab": [[f"t{i}", -1.0] for i in range(300)] + [["<new>", -2.5]]}},
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_place_of_tokens(tmp_path: Path, kind: str) -> None:
    name, contents = FILES[kind]
    (tmp_path / name).write_text(json.dumps(contents))
    check_tokens("a", tmp_path, 301)
    with pytest.raises(AdapterError, match=rf"^adapter 'a': found 1 new tokens in {name} \('<new>' = 300\)"):
        check_tokens("a", tmp_path, 300)


@pytest.mark.parametrize("contents", ["{}", '{"added_tokens": null, "model": null}', '{"model": {"vocab": null}}'])
def test_files_without_tokens_are_no_reason(tmp_path: Path, contents: str) -> None:
    (tmp_path / "tokenizer.json").write_text(contents)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    (tmp_path / "added_tokens.json").write_text("{}")
    check_tokens("a", tmp_path, 10)


def test_where_a_chat_template_is_found(tmp_path: Path, folder: Path) -> None:
    assert chat_template("a", folder) == "chat_template.jinja"  # written by the installed transformers
    empty = tmp_path / "empty"
    empty.mkdir()
    assert chat_template("a", empty) is None
    (empty / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    assert chat_template("a", empty) == "chat_template of tokenizer_config.json"
    (empty / "chat_template.json").write_text('{"chat_template": "{{ x }}"}')
    assert chat_template("a", empty) == "chat_template.json"
