"""Every key of adapter_config.json has a fate, and what is applied is applied as PEFT does."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from sglang_blocklora.adapters.config import parse_config
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.patterns import Pattern
from sglang_blocklora.adapters.peft_keys import KEYS, Refused, Unused
from sglang_blocklora.adapters.targets import Targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import BdLoraConfig, LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

OLDER_KEYS = {"merge_weights", "enable_lora"}  # PEFT 0.2
NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def test_every_key_of_pefts_config_has_a_fate() -> None:
    """A field that a newer PEFT adds fails here, before an adapter that uses it is served as if it did not."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} | OLDER_KEYS == set(KEYS)
    assert {field.name for field in dataclasses.fields(BdLoraConfig)} == {
        "target_modules_bd_a",
        "target_modules_bd_b",
        "nblocks",
        "match_strict",
    }


def test_what_peft_writes_by_default_is_applied_and_nothing_is_told(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = parse_config("a", json.loads((tmp_path / "adapter_config.json").read_text()))
    assert (config.rank, config.alpha, config.unused) == (4, 6.0, [])


@pytest.mark.parametrize("key", [key for key, fate in KEYS.items() if isinstance(fate, Refused)])
def test_what_changes_the_function_is_refused_by_its_key(key: str) -> None:
    parse_config("a", {"peft_type": "LORA", "r": 4, key: None})
    with pytest.raises(AdapterError, match=rf"found {key} = .*expected no {key}"):
        parse_config("a", {"peft_type": "LORA", "r": 4, key: [1]})


@pytest.mark.parametrize("key", [key for key, fate in KEYS.items() if isinstance(fate, Unused)])
def test_what_changes_nothing_is_told(key: str) -> None:
    (told,) = parse_config("a", {"peft_type": "LORA", "r": 4, key: True}).unused
    assert f"{key} = True" in told


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_key_that_is_off_is_no_reason(value: object) -> None:
    assert parse_config("a", {"peft_type": "LORA", "r": 4, "of_a_later_peft": value, "use_dora": value}).unused == []


def test_peft_itself_ignores_fan_in_fan_out_on_linear_layers() -> None:
    """The same factors, the same delta: what is stored needs no other reading."""
    deltas = []
    for fan_in_fan_out in (False, True):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(5, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it ignores it
            model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=fan_in_fan_out))
        layer = model.base_model.model[0]
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        assert layer.lora_A["default"].weight.shape == (2, 5)
        deltas.append(layer.get_delta_weight("default"))
    assert torch.equal(*deltas)


def names(alphabet: str) -> st.SearchStrategy[Any]:
    words = st.sampled_from(["q_proj", "o_proj", "self_attn.q_proj", "up_proj", "1.mlp.up_proj", "proj", NAMES[0], "x"])
    expressions = st.sampled_from(
        [r".*\.[qo]_proj", r"model\.layers\.(0|11)\..*", r".*(self_attn|mlp)\.(?!o_)\w+", NAMES[1], alphabet]
    )
    return st.one_of(st.lists(words, max_size=3), expressions)


@settings(deadline=None, max_examples=300)
@given(
    target_modules=names(".*"),
    exclude_modules=st.one_of(st.none(), names(r".*\.1\..*")),
    layers=st.one_of(st.none(), st.just([]), st.integers(0, 2), st.lists(st.integers(0, 11), max_size=3)),
    pattern=st.sampled_from([None, "layers", ["layers"], ["h", "layers"], "model.layers", "h", []]),
)
def test_modules_are_selected_as_peft_does(target_modules, exclude_modules, layers, pattern) -> None:
    if isinstance(target_modules, str):
        layers = pattern = None  # PEFT refuses them together
    if pattern and layers is None:
        pattern = None
    raw = {
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    config = LoraConfig(**raw)
    targets = Targets.read("a", raw)
    for name in NAMES:
        if target_modules == []:  # PEFT selects nothing, and cannot be saved so; here it is no choice
            continue
        expected = check_target_module_exists(config, name)
        assert targets.selects(name) == bool(expected and type(expected).__name__ != "_ExcludedModule"), name


EXPRESSIONS = st.recursive(
    st.sampled_from(
        [*"apq_.", r"\.", r"\d", r"\W", r"\s", "[a-m]", "[^.]", r"[\d_]", "q_proj", "^", "$", r"\b", r"\B"]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda one: f"({one})"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=500)
@given(text=EXPRESSIONS, name=st.one_of(st.sampled_from(NAMES), st.text("ap._q0", min_size=1, max_size=8)))
def test_expressions_match_what_re_matches(text: str, name: str) -> None:
    try:
        pattern, tail = Pattern(text), Pattern(text, tail=True)
    except ValueError:
        reject()  # repetition in repetition
    assert pattern.matches(name) == bool(re.fullmatch(text, name))
    assert tail.matches(name) == (get_pattern_key([text], name) == text)


# Expression -> a piece of the reason.
NOT_TAKEN = {
    "(": "unterminated",
    "*": "nothing to repeat",
    "[b-a]": "bad character range",
    "(" * 1000: "recursion",
    "a{99999999999}": "too large",
    "a" * 3000: "longer than",
    "(?i)a": "not supported",
    "(?i:a)": "not supported",
    r"(a)\1": "not supported",
    "(?<=a)b": "not supported",
    "a++": "not supported",
    "(?>a)": "not supported",
    "(a*)*": "not supported",
    "(a|b*){2,}": "not supported",
}


@pytest.mark.parametrize("text", NOT_TAKEN)
def test_expressions_that_are_none_or_not_supported_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=NOT_TAKEN[text]):
        Pattern(text)


def test_no_expression_takes_long() -> None:
    """Each would keep ``re`` busy beyond any patience; here the steps are few, so that it returns at all."""
    name = "model.layers.0.self_attn." + "a" * 60 + "!"
    for text in (".*a" * 300, "(a|a)" * 60 + "b", "a?" * 60 + "a" * 60, "(.*)(a|b|ab|ba)*c"):
        assert not Pattern(text).matches(name + name)


def test_patterns_are_those_of_peft_in_their_order() -> None:
    rank_pattern = {"^model.layers.0.self_attn.q_proj": 3, r"layers\.[01]\.mlp\..*": 10, "o_proj|down_proj": 6}
    config = parse_config("a", {"peft_type": "LORA", "r": 4, "rank_pattern": rank_pattern, "use_bdlora": None})
    assert [config.rank_of(name) for name in NAMES] == [
        rank_pattern.get(get_pattern_key(rank_pattern, name), 4) for name in NAMES
    ]
