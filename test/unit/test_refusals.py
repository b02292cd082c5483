"""What is wrong with an adapter is refused with one message: adapter, module, found, expected, what to do."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from blocklora_testing.toy import ToyModel, write_adapter
from safetensors.torch import load_file, save_file
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.shard import load_shard

MODEL = ToyModel()


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def bd(**changes):
    def edit(folder: Path) -> None:
        raw = json.loads((folder / "adapter_config.json").read_text())
        config(use_bdlora=raw["use_bdlora"] | changes)(folder)

    return edit


def weights(change):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def put(name: str, tensor: torch.Tensor):
    return weights(lambda tensors: tensors.__setitem__(name, tensor))


def set_value(name: str, value: float):
    return weights(lambda tensors: tensors[name].__setitem__((0, 0), value))


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def to_pipe(name: str):
    """A named pipe, which nothing ever writes to: reading it waits for ever."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return edit


def to_folder(name: str):
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def drop(name: str):
    return weights(lambda tensors: tensors.pop(name))


PREFIX = "base_model.model.model.layers.0"
REST = ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# kind: (how to break a right block-diagonal adapter with n = 2 and r = 6, a piece of the message)
CASES = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "adapter_config.json; expected a PEFT adapter folder",
    ),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
    "JSON, not an object": (lambda f: (f / "adapter_config.json").write_text("[]"), "a JSON object"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickle": (to_pickle, "unpickling"),
    "truncated": (truncate, "cannot be read"),
    "another tensor alone": (
        weights(lambda t: [t.clear(), t.update(x=torch.zeros(2))]),
        "tensor 'x'",
    ),
    "empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "cannot be read"),
    "not LoRA": (config(peft_type="IA3"), "'IA3'"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "lora_bias": (config(lora_bias=True), "lora_bias"),
    "bias": (config(bias="all"), "base biases"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "rank of 0": (config(r=0), "positive integer"),
    "rank of true": (config(r=True), "positive integer"),
    "alpha not a number": (config(lora_alpha="16"), "finite number"),
    "bad pattern": (config(rank_pattern={"(": 4}), "regular expression"),
    "nblocks of 0": (bd(nblocks=0), "positive integer"),
    "in both lists": (bd(target_modules_bd_a=["proj"]), "both target_modules_bd_a"),
    "in no list": (bd(target_modules_bd_b=["q_proj"]), "match_strict"),
    "r % n": (bd(nblocks=4), "multiples of 4"),
    "out % n": (bd(nblocks=5), "multiples of 5"),
    "wrong rank in config": (config(r=8), "lora_A [6, 24]"),
    "wrong shape": (put(Q_B, torch.zeros(10, 3)), "lora_B [10, 3]"),
    "base model of other sizes": (
        weights(lambda t: t.update({n: torch.cat([v, v], 1) for n, v in t.items() if "lora_A" in n})),
        "trained on this base model",
    ),
    "rank above the limit": (config(r=128), "--max-lora-rank"),
    "embeddings": (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(2, 2)), "no lora_B"),
    "lm_head": (
        weights(lambda t: t.update({f"base_model.model.lm_head.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"})),
        "lm_head",
    ),
    "experts": (
        weights(
            lambda t: t.update({f"{PREFIX}.mlp.experts.3.up_proj.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"})
        ),
        "It has no such expert",
    ),
    "layer beyond the last": (
        weights(
            lambda t: t.update(
                {f"base_model.model.model.layers.9.mlp.up_proj.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"}
            )
        ),
        "cannot be adapted",
    ),
    "DoRA tensors": (put(f"{PREFIX}.self_attn.q_proj.lora_magnitude_vector", torch.zeros(2)), "DoRA"),
    "bias tensors": (put(f"{PREFIX}.self_attn.q_proj.lora_B.bias", torch.zeros(2)), "biases"),
    "one factor missing": (drop(Q_B), "no lora_B"),
    "NaN": (set_value(Q_A, float("nan")), "NaN or Inf in lora_A"),
    "Inf": (set_value(Q_B, float("inf")), "NaN or Inf in lora_B"),
    "Inf of both signs": (
        weights(lambda t: t[Q_B].__setitem__((0, slice(2)), torch.tensor([math.inf, -math.inf]))),
        "NaN or Inf in lora_B",
    ),
    "integers": (put(Q_A, torch.zeros(6, 24, dtype=torch.int64)), "type I64"),
    "added tokens": (
        lambda f: (f / "added_tokens.json").write_text(json.dumps({"<new>": 1000})),
        "1 new tokens in added_tokens.json ('<new>' = 1000)",
    ),
    "added tokens, not JSON": (write("added_tokens.json", "?"), "not JSON"),
    "a key that is not known": (config(some_future_option={"a": 1}), "'some_future_option' = {'a': 1}"),
    "a key of use_bdlora that is not known": (bd(overlap=2), "no 'overlap'"),
    "use_bdlora of true": (config(use_bdlora=True), "an object or null"),
    "a flag that is no flag": (config(use_rslora="false"), "true or false"),
    "an initialisation that is not known": (config(init_lora_weights="lora_ga"), "init_lora_weights = 'lora_ga'"),
    "rank of 7.5": (config(r=7.5), "positive integer"),
    "rank of Infinity": (config(r=float("inf")), "positive integer"),
    "alpha of 400 digits": (config(lora_alpha=10**400), "finite number"),
    "rank_pattern, not an object": (config(rank_pattern=["q_proj"]), "rank_pattern = ['q_proj']; expected an object"),
    "pattern that takes for ever": (config(rank_pattern={"([a-z._]+)+!": 4}), "nested repetition"),
    "patterns that are too many": (
        config(rank_pattern={".*q_proj" * 20 + str(i): 4 for i in range(20)}),
        "at most 1024 characters together",
    ),
    "config that is too large": (config(base_model_name_or_path="x" * 2**18), "of more than 262144 bytes"),
    "config nested too deep": (write("adapter_config.json", "[" * 100_000), "not JSON"),
    "config that is a named pipe": (to_pipe("adapter_config.json"), "not a regular file"),
    "weights that are a named pipe": (to_pipe("adapter_model.safetensors"), "not a regular file"),
    "weights that are a folder": (to_folder("adapter_model.safetensors"), "not a regular file"),
    "weights in parts": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model-00001-of-00001.safetensors"),
        "the weights in one file",
    ),
    "a module that the config does not select": (config(target_modules=["q_proj"]), "does not select"),
    "a module that the config excludes": (config(exclude_modules=["k_proj"]), "does not select"),
    "a layer that the config does not select": (
        config(target_modules=["q_proj"], layers_to_transform=[0]),
        "does not select",
    ),
    "target_modules of numbers": (config(target_modules=[1]), "a list of module names"),
    "one factor twice": (
        put(Q_A.replace(".weight", ".default.weight"), torch.zeros(6, 24)),
        "which are the same lora_A",
    ),
    "one module under two names": (
        weights(
            lambda t: t.update(
                {
                    n.replace("model.layers", "model.language_model.layers"): v.clone()
                    for n, v in t.items()
                    if "q_proj" in n
                }
            )
        ),
        "the same layer of the base model",
    ),
    "a vision tower": (
        weights(
            lambda t: t.update(
                {n.replace("model.layers", "vision_tower.layers"): v.clone() for n, v in t.items() if "q_proj" in n}
            )
        ),
        "other towers",
    ),
    "a factor of one axis": (put(Q_A, torch.zeros(6)), "a matrix"),
    "tokenizer.json, not JSON": (write("tokenizer.json", "?"), "not JSON"),
    "tokenizer.json of another form": (write("tokenizer.json", '{"added_tokens": 3}'), "of a form that is not known"),
    "added tokens without ids": (write("added_tokens.json", '["<new>"]'), "of a form that is not known"),
    "tokenizer_config.json of another form": (
        write("tokenizer_config.json", '{"added_tokens_decoder": {"many": 1}}'),
        "of a form that is not known",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_refused_with_a_message_that_names_the_adapter(tmp_path: Path, kind: str) -> None:
    break_it, message = CASES[kind]
    write_adapter(tmp_path, MODEL, rank=6, nblocks=2)
    load_shard("mine", tmp_path, MODEL.spec(0, 2), max_rank=64)  # right before it was broken
    break_it(tmp_path)
    with pytest.raises(AdapterError) as error:
        load_shard("mine", tmp_path, MODEL.spec(0, 2), max_rank=64)
    text = str(error.value)
    assert text.startswith("adapter 'mine'")
    assert "found" in text
    assert "expected" in text
    assert message in text


def image_of(folder: Path, rank: int = 0, size: int = 2) -> torch.Tensor:
    _, image = load_shard("mine", folder, MODEL.spec(rank, size), max_rank=64)
    return image


# How tools name what PEFT saves as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.
NAMES = {
    "adapter's name inside": lambda n: n.replace(".weight", ".default.weight"),
    "no prefix": lambda n: n.removeprefix("base_model.model."),
    "FSDP": lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "FSDP around all": lambda n: f"_fsdp_wrapped_module.{n}",
    "torch.compile": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "activation checkpointing": lambda n: n.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "vision-language model": lambda n: n.replace("model.layers", "model.language_model.layers"),
    "older vision-language model": lambda n: n.replace("model.model.layers", "model.language_model.model.layers"),
    "model without a head": lambda n: n.replace("base_model.model.model.", "base_model.model."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_have_one_meaning_are_taken(tmp_path: Path, kind: str) -> None:
    """The same adapter under another tool's names: the same bytes in the arena."""
    write_adapter(tmp_path, MODEL, rank=6, nblocks=2, rank_pattern={"down_proj": 4}, target_modules=["q_proj", *REST])
    expected = image_of(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    renamed = {NAMES[kind](name): tensor for name, tensor in load_file(path).items()}
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed, path)
    assert torch.equal(image_of(tmp_path), expected)


def test_patterns_and_targets_are_about_the_names_of_the_model_that_was_trained(tmp_path: Path) -> None:
    """A vision-language model's own path in rank_pattern, and an expression in target_modules."""
    write_adapter(tmp_path, MODEL, rank=6, rank_pattern={"q_proj": 4})
    expected = image_of(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({NAMES["vision-language model"](name): tensor for name, tensor in load_file(path).items()}, path)
    expression = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    config(rank_pattern={"^model.language_model.layers.*.q_proj": 4}, target_modules=expression)(tmp_path)
    assert torch.equal(image_of(tmp_path), expected)


def test_whole_numbers_may_be_written_as_fractions(tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL, rank=6, nblocks=2, rank_pattern={"down_proj": 4})
    expected, shard = image_of(tmp_path), load_shard("mine", tmp_path, MODEL.spec(0, 2), 64)[0]
    config(r=6.0, lora_alpha=16.0, rank_pattern={"down_proj": 4.0})(tmp_path)
    bd(nblocks=2.0)(tmp_path)
    assert torch.equal(image_of(tmp_path), expected)
    assert load_shard("mine", tmp_path, MODEL.spec(0, 2), 64)[0] == shard


def test_a_module_that_the_server_leaves_out_is_told_so(tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL)
    whole = MODEL.spec(0, 1)
    layers = tuple(
        tuple(dataclasses.replace(linear, sources={}) if "down" in linear.name else linear for linear in layer)
        for layer in whole.layers
    )
    left_out = frozenset(f"model.layers.{layer}.mlp.down_proj" for layer in range(MODEL.layers))
    with pytest.raises(AdapterError, match=r"down_proj.*--lora-target-modules leaves out"):
        load_shard("mine", tmp_path, dataclasses.replace(whole, layers=layers, left_out=left_out), max_rank=64)


def test_what_is_not_used_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On TP rank 0, at the first load: not again when its bytes are read again."""
    write_adapter(tmp_path, MODEL, fan_in_fan_out=True, target_modules=["q_proj", "lm_head", *REST])
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for rank in range(2):
        load_shard("mine", tmp_path, MODEL.spec(rank, 2), 64)
    load_shard("mine", tmp_path, MODEL.spec(0, 2), 64, known=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    unused, missing, template = (record.getMessage() for record in caplog.records)
    assert "fan_in_fan_out = True" in unused
    assert "lm_head, without weights" in missing
    assert "chat_template.jinja in the adapter's folder is not used" in template


@pytest.mark.parametrize("template", ["{{ x }}", [{"name": "default", "template": "{{ x }}"}], None])
def test_a_chat_template_in_the_tokenizers_config_is_told_too(tmp_path: Path, caplog, template: object) -> None:
    write_adapter(tmp_path, MODEL)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    load_shard("mine", tmp_path, MODEL.spec(0, 2), 64)
    assert ["chat_template of tokenizer_config.json" in record.getMessage() for record in caplog.records] == [
        True for _ in [template] if template
    ]


def test_known_added_tokens_are_no_reason(tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": 999}))
    load_shard("mine", tmp_path, MODEL.spec(0, 2), max_rank=64)


def test_match_strict_false_leaves_the_rest_plain(tmp_path: Path) -> None:
    """o_proj and down_proj match no list and have plain shapes."""
    deltas = write_adapter(tmp_path, MODEL, rank=6, nblocks=2)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer in range(MODEL.layers):
        for module, (inputs, _) in MODEL.shapes(layer).items():
            if module.endswith(("o_proj", "down_proj")):
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(6, inputs, dtype=torch.float64)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    bd(target_modules_bd_a=None, match_strict=False)(tmp_path)
    shard, _ = load_shard("mine", tmp_path, MODEL.spec(0, 2), max_rank=64)
    assert deltas
    assert shard.nblocks == 2
    down = shard.descriptors[0][3]
    assert (down.h_width, down.a_rows, down.blocks.count) == (6, 6, 1)


def test_two_modules_for_one_slice_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, ToyModel(fused=True), rank=6)
    split = ToyModel()
    fused_spec, split_spec = ToyModel(fused=True).spec(0, 1), split.spec(0, 1)
    both = [
        [
            dataclasses.replace(s, sources={**s.sources, **f.sources})
            for s, f in zip(split_layer, fused_layer, strict=True)
        ]
        for split_layer, fused_layer in zip(split_spec.layers, fused_spec.layers, strict=True)
    ]
    spec = dataclasses.replace(split_spec, layers=tuple(map(tuple, both)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[Q_A], tensors[Q_B] = torch.zeros(6, 24), torch.zeros(48, 6)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="the same layer"):
        load_shard("mine", tmp_path, spec, max_rank=64)
