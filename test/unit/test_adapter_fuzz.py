"""Whatever an adapter's files hold, reading them ends in an adapter or an ``AdapterError``, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from blocklora_testing.toy import ToyModel, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_blocklora.adapters.checkpoint import Checkpoint
from sglang_blocklora.adapters.config import parse_config, read_config
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.peft_keys import KEYS
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.adapters.tensor_names import Places, parse_name, why_not
from sglang_blocklora.adapters.tokenizer_files import chat_template, check_tokens
from sglang_blocklora.adapters.weights_file import MAX_HEADER_BYTES

MODEL = ToyModel()
SPEC = MODEL.spec(0, 2)
MODULE = "model.layers.0.self_attn.q_proj"
NUMBERS = st.one_of(
    st.integers(-2, 9), st.floats(), st.integers(), st.sampled_from([2**31, 2**63, 10**400, 1e308, True])
)
WORDS = st.one_of(
    st.text(max_size=6), st.sampled_from(["q_proj", "all-linear", ".*", "(", "gaussian", "pissa", "(a*)*", "none"])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)
CONFIGS = st.dictionaries(
    st.one_of(st.sampled_from(["r", "lora_alpha", *KEYS]), WORDS),
    st.one_of(JSON, st.dictionaries(st.sampled_from(["nblocks", "match_strict", "target_modules_bd_a"]), JSON)),
    max_size=6,
)


def accepts(call: Callable[[], object]) -> bool:
    """Whether ``call`` returns; any other end than an ``AdapterError`` with a short message fails the test."""
    message = ""
    try:
        call()
    except AdapterError as error:
        message = str(error)
    assert len(message) < 2000
    return not message


@settings(deadline=None, max_examples=300)
@given(raw=CONFIGS, sound=st.booleans())
def test_any_config(raw: dict, sound: bool) -> None:
    raw = {"peft_type": "LORA", "r": 8} | raw if sound else raw

    def use() -> None:
        config = parse_config("a", raw)
        config.structure_of("a", MODULE)
        assert config.rank_of(MODULE) >= 1
        assert config.targets.selects(MODULE) in (True, False)

    accepts(use)


@settings(deadline=None, max_examples=100)
@given(text=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_text_as_a_small_file(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (folder / name).write_bytes(text)
    accepts(lambda: read_config("a", folder))
    accepts(lambda: check_tokens("a", folder, 5))
    accepts(lambda: chat_template("a", folder))


TOKENS = st.fixed_dictionaries(
    {},
    optional={
        "added_tokens": st.lists(st.fixed_dictionaries({"id": NUMBERS, "content": WORDS}), max_size=3) | JSON,
        "added_tokens_decoder": st.dictionaries(st.integers().map(str) | WORDS, st.just({"content": "x"}) | JSON),
        "model": st.fixed_dictionaries({"vocab": st.dictionaries(WORDS, NUMBERS) | JSON}) | JSON,
        "chat_template": JSON,
    },
)


@settings(deadline=None, max_examples=100)
@given(tokens=TOKENS)
def test_any_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokens: dict) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (folder / name).write_text(json.dumps(tokens))
    accepts(lambda: check_tokens("a", folder, 5))
    accepts(lambda: chat_template("a", folder))


def entries(sound: bool) -> st.SearchStrategy[object]:
    """An entry of a header; a sound one is a matrix of the module's size, in bytes that may not be its own."""
    if not sound:
        return JSON
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "?"]),
            "shape": st.lists(st.integers(0, 4), max_size=4) | st.lists(NUMBERS, max_size=9),
            "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2).map(sorted) | JSON,
        }
    )


TENSORS = st.one_of(
    st.sampled_from([f"base_model.model.{MODULE}.lora_{factor}.weight" for factor in "AB"]),
    st.text("lora_AB.weightmdqpj0", max_size=12),
    WORDS,
)


@settings(deadline=None, max_examples=300)
@given(header=st.dictionaries(TENSORS, entries(True) | entries(False), max_size=4), data=st.binary(max_size=64))
def test_any_header(tmp_path_factory: pytest.TempPathFactory, header: dict, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_adapter(folder, MODEL, targets=("q_proj",))
    text = json.dumps(header).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = read_config("a", folder)

    def check() -> None:
        with Checkpoint("a", folder, config):
            pass

    if accepts(check):
        with safetensors.safe_open(path, "pt") as file:  # what we take, safetensors takes
            assert set(file.keys()) == set(header)
    accepts(lambda: load_shard("a", folder, SPEC, 64))


@settings(deadline=None, max_examples=200)
@given(start=st.integers(0, 400), junk=st.binary(max_size=30), cut=st.none() | st.integers(0, 4000))
def test_any_damage_to_a_right_file(tmp_path_factory, start: int, junk: bytes, cut: int | None) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_adapter(folder, MODEL, targets=("q_proj",))
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()[:cut]
    path.write_bytes(data[:start] + junk + data[start + len(junk) :])
    accepts(lambda: load_shard("a", folder, SPEC, 64))


@settings(deadline=None, max_examples=300)
@given(tensor=st.text() | st.text("lora_AB.weightmdeb_[]", max_size=40))
def test_any_tensor_name(tensor: str) -> None:
    for text in (tensor, f"{tensor}.{MODULE}.lora_A.weight", f"{MODULE}{tensor}.lora_B.x.weight"):
        name = parse_name(text)
        assert why_not(text)
        if name is not None:
            assert Places([MODULE]).find(name.module) in (None, MODULE)


@pytest.mark.parametrize(
    "claim",
    [2**63, MAX_HEADER_BYTES + 1, 2**40 - 8],
    ids=["more than a file", "more than the limit", "all of a huge file"],
)
def test_a_huge_claim_takes_no_memory(tmp_path: Path, claim: int) -> None:
    """The file is a hole of 1 TiB that says its header is as large."""
    write_adapter(tmp_path, MODEL)
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.write(claim.to_bytes(8, "little"))
        file.truncate(2**40)
    (tmp_path / "tokenizer.json").touch()
    config = read_config("a", tmp_path)
    with (tmp_path / "adapter_config.json").open("r+b") as file:
        file.truncate(2**40)
    tracemalloc.start()
    try:
        assert not accepts(lambda: read_config("a", tmp_path))
        assert not accepts(lambda: Checkpoint("a", tmp_path, config))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
