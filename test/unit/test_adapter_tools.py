"""``python -m sglang_blocklora.tools``: figures counted by hand or by PEFT, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocklora_testing import models  # noqa: F401  makes transformers importable
from blocklora_testing.toy import LLAMA_8B, ToyModel, write_adapter
from peft import BdLoraConfig, LoraConfig, get_peft_model  # noqa: F401  what is told names them
from safetensors.torch import load_file, save_file
from sglang_blocklora.adapters.content_hash import content_hash
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.tools.__main__ import main
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.match_rank import match_rank
from sglang_blocklora.tools.verify import verify
from transformers import LlamaConfig, LlamaForCausalLM

MODEL = ToyModel()
BASE = ToyModel(kv_heads=2)  # what ``config_json`` describes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP's spinning costs more than these small matrices, most of all where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """Exit code and decoded JSON of a command."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    """``config.json`` of a base model of ``MODEL``'s sizes but 2 KV heads."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "num_hidden_layers": 2,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return tmp_path


@pytest.mark.parametrize("nblocks", [None, 2, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_inspect_counts_what_a_server_would_hold(tmp_path: Path, capsys, nblocks: int | None, fused: bool) -> None:
    model = ToyModel(fused=fused)
    write_adapter(tmp_path, model, rank=8, nblocks=nblocks, dtype=torch.float32)
    code, found = run(capsys, "inspect", tmp_path, "--tp", 1, 2, 3, 4, 8, "--dtype", "float32")
    assert code == 0
    assert found["parameters"] == sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert (found["rank"], found["nblocks"], found["layers"]) == (8, nblocks or 1, 2)
    for cost in found["tp"]:
        size = cost["tp_size"]
        for rank, count in enumerate(cost["bytes_per_rank"]):
            shard, _ = load_shard("a", tmp_path, model.spec(rank, size, torch.float32), 64)
            own = 0
            for linears, descriptors in zip(model.spec(rank, size).layers, shard.descriptors, strict=True):
                for linear, d in zip(linears, descriptors, strict=True):
                    own += d.a_rows * linear.inputs.length
                    own += sum(s.block_rank * o.length for s, o in zip(d.slices, linear.outputs, strict=True))
            assert count == own * 4


def test_inspect_with_the_base_model_replicates_kv_heads(config_json: Path, tmp_path: Path, capsys) -> None:
    """k: 24 -> 4 wide, 2 heads of 2. At TP 4 each TP rank holds one whole head: 2 rows of B, 4 bytes each."""
    folder = tmp_path / "adapter"
    write_adapter(folder, ToyModel(kv_heads=2), rank=4, targets=("k_proj",), dtype=torch.float32)
    arguments = ("inspect", folder, "--tp", 4, "--dtype", "float32")
    _, known = run(capsys, *arguments, "--base-model", config_json)
    _, unknown = run(capsys, *arguments)
    layers, a_elements = 2, 4 * 24
    assert known["tp"][0]["bytes_per_rank"] == [layers * (a_elements + 2 * 4) * 4] * 4
    assert unknown["tp"][0]["bytes_per_rank"] == [layers * (a_elements + 1 * 4) * 4] * 4
    assert not known["warnings"]
    assert "--base-model" in unknown["warnings"][0]
    # One KV head of 2 a rank, rounded up to rows of 8 elements. A takes 12 of them, in one plane.
    assert known["tp"][0]["slots"] == a_elements // 8
    assert known["tp"][0]["arena_bytes"] == layers * 2 * (a_elements // 8) * 8 * 4


def test_inspect_warns_of_orientation_and_shared_blocks(tmp_path: Path, capsys) -> None:
    write_adapter(tmp_path, MODEL, rank=6, nblocks=3, orientation="wrong")
    code, found = run(capsys, "inspect", tmp_path)
    assert code == 0
    assert {group["orientation"] for group in found["modules"]} == {"wrong"}
    assert any("orientation" in warning for warning in found["warnings"])
    assert any("TP 2, 4, 8" in warning for warning in found["warnings"])


@pytest.mark.parametrize("command", ["inspect", "verify", "match-rank", "convert"])
def test_a_broken_adapter_is_exit_code_1_with_the_servers_message(tmp_path: Path, capsys, command: str) -> None:
    folder = tmp_path / "bad"
    write_adapter(folder, MODEL, use_dora=True)
    extra = {"match-rank": ["--nblocks", 2], "convert": [tmp_path / "new", "--nblocks", 2]}.get(command, [])
    code, found = run(capsys, command, folder, *extra)
    assert code == 1
    assert "'bad'" in found["error"]
    assert "DoRA" in found["error"]
    assert not (tmp_path / "new").exists()


def test_adapter_of_another_base_model_is_refused(config_json: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "adapter"
    write_adapter(folder, ToyModel(hidden=32))
    code, found = run(capsys, "inspect", folder, "--base-model", config_json)
    assert code == 1
    assert "trained on this base model" in found["error"]


def test_match_rank_is_the_published_figure_for_llama_8b(tmp_path: Path, capsys) -> None:
    """BDLORA.md: equal total parameters of Llama-3.1-8B need r'/r = 1.48, 1.95 and 2.32 for n = 2, 4 and 8."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    for n, ratio in ((2, 1.48), (4, 1.95), (8, 2.32)):
        code, found = run(capsys, "match-rank", "--base-model", tmp_path, "--rank", 1000, "--nblocks", n)
        assert code == 0
        assert found["rank"] / 1000 == pytest.approx(ratio, abs=0.005 + n / 1000)
        assert found["parameters"] <= found["budget"] == 1000 * 32 * (8192 + 5120 * 2 + 8192 + 18432 * 3)


def test_match_rank_takes_the_largest_multiple_that_fits(tmp_path: Path, capsys) -> None:
    write_adapter(tmp_path, MODEL, rank=6)
    code, found = run(capsys, "match-rank", tmp_path, "--nblocks", 4)
    assert code == 0
    one_more = found["parameters"] // found["rank"] * (found["rank"] + 4)
    assert found["rank"] % 4 == 0
    assert found["parameters"] <= found["budget"] < one_more


def test_match_rank_says_what_to_train_with(tmp_path: Path, capsys) -> None:
    """PEFT makes of it an adapter with as many parameters as were told."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    (tmp_path / "config.json").write_text(config.to_json_string())
    asked = ["match-rank", "--base-model", str(tmp_path), "--rank", "8", "--nblocks", "2"]
    assert main(asked) == 0
    chosen = eval("LoraConfig" + capsys.readouterr().out.partition("LoraConfig")[2])
    trained = get_peft_model(LlamaForCausalLM(config), chosen).get_nb_trainable_parameters()[0]
    assert trained == run(capsys, *asked)[1]["parameters"]


def test_match_rank_refuses_blocks_that_do_not_divide_and_budgets_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="no multiple of nblocks 5"):
        match_rank([("q_proj", 24, 48)], 5, 10**6)
    with pytest.raises(ValueError, match="too few"):
        match_rank([("q_proj", 24, 48)], 4, 10)


@pytest.mark.parametrize("options", [{}, {"nblocks": 2}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}])
@pytest.mark.parametrize("nblocks", [1, 2, 4])
def test_lossless_conversion_keeps_every_delta(tmp_path: Path, capsys, nblocks: int, options: dict) -> None:
    expected = write_adapter(tmp_path / "old", MODEL, rank=4, **({"rank_pattern": {"q_proj": 2}} | options))
    code, found = run(capsys, "convert", tmp_path / "old", tmp_path / "new", "--nblocks", nblocks)
    assert code == 0
    assert found["max_relative_error"] < 1e-6
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for module, delta in expected.items():
        name = f"base_model.model.{module}"
        a, b = (tensors[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        if module.endswith(("o_proj", "down_proj")):
            a = torch.block_diag(*a.chunk(nblocks))
        else:
            b = torch.block_diag(*b.chunk(nblocks))
        torch.testing.assert_close(b @ a, delta, rtol=1e-5, atol=1e-5)
    assert run(capsys, "verify", tmp_path / "new")[0] == 0


def test_lossy_conversion_is_refused_until_the_loss_is_allowed(tmp_path: Path, capsys) -> None:
    """The error is what a truncated SVD of each block must lose: the energy of the dropped singular values."""
    expected = write_adapter(tmp_path / "old", MODEL, rank=4, targets=("q_proj",))
    arguments = ("convert", tmp_path / "old", tmp_path / "new", "--nblocks", 2, "--rank", 4)
    code, found = run(capsys, *arguments)
    assert code == 1
    assert "Rank 8 loses nothing" in found["error"]
    assert not (tmp_path / "new").exists()
    code, found = run(capsys, *arguments, "--max-error", 1)
    assert code == 0
    for loss in found["modules"]:
        delta = expected[loss["module"]]
        dropped = torch.cat([torch.linalg.svdvals(block)[2:] for block in delta.chunk(2)])
        assert loss["relative_error"] == pytest.approx(float(dropped.norm() / delta.norm()), rel=1e-5)
    code, found = run(capsys, *arguments, "--max-error", 1)
    assert code == 1
    assert "exists" in found["error"]


def test_peft_itself_reads_a_converted_adapter_alike(tmp_path: Path, capsys) -> None:
    from blocklora_testing.models import AdapterChoice, build_adapters, build_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = build_model(tmp_path / "model", "llama")
    old = build_adapters(model, tmp_path / "adapters", {"plain": AdapterChoice(rank=4)})["plain"]
    assert run(capsys, "convert", old, tmp_path / "new", "--nblocks", 4)[0] == 0
    tokens = torch.arange(20)[None]
    logits = []
    for folder in (old, tmp_path / "new"):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.inference_mode():
            logits.append(PeftModel.from_pretrained(base, folder).eval()(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"nblocks": 2}, {"nblocks": 3}, {"nblocks": 4, "orientation": "wrong"}])
@pytest.mark.parametrize("fused", [False, True])
def test_verify_passes_for_every_structure(tmp_path: Path, capsys, options: dict, fused: bool) -> None:
    write_adapter(tmp_path, ToyModel(fused=fused), rank=12, **options)
    code, found = run(capsys, "verify", tmp_path, "--tp", 1, 2, 3, 8)
    assert code == 0
    assert [check["passed"] for check in found["tp"]] == [True] * 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: rename(f, "layers.1.", "layers.9."), "modules of 2 decoder layers among q_proj"),
        (lambda f: rename(f, "model.layers", "vision_tower.layers"), "other towers"),
        (lambda f: (f / "added_tokens.json").write_text('{"<new>": 100}'), "'<new>' = 100"),
        (lambda f: edit_config(f, some_future_option=1), "some_future_option"),
        (lambda f: edit_config(f, target_modules=["k_proj"]), "does not select"),
    ],
)
def test_inspect_refuses_what_a_server_refuses(tmp_path: Path, config_json: Path, capsys, break_it, message) -> None:
    """With the same words as a load by the server."""
    folder = tmp_path / "mine"
    write_adapter(folder, BASE, rank=4, dtype=torch.float32)
    break_it(folder)
    code, found = run(capsys, "inspect", folder, "--base-model", config_json)
    assert code == 1
    assert message in found["error"]
    spec = BaseSizes.read(config_json).spec(torch.float32, 0, 2)
    with pytest.raises(AdapterError) as error:
        load_shard("mine", folder, spec, 64)
    assert str(error.value) == found["error"]


@pytest.mark.parametrize("base", [True, False])
def test_inspect_tells_what_a_load_tells(tmp_path: Path, config_json: Path, capsys, caplog, base: bool) -> None:
    write_adapter(tmp_path, BASE, rank=4, dtype=torch.float32, fan_in_fan_out=True, nblocks=2, orientation="wrong")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    rename(tmp_path, "model.layers", "model.language_model.layers")
    code, found = run(capsys, "inspect", tmp_path, *(["--base-model", config_json] if base else []))
    assert code == 0
    assert found["layers"] == 2
    load_shard("mine", tmp_path, BaseSizes.read(config_json).spec(torch.float32, 0, 2), 64)
    told = [record.getMessage().removeprefix("adapter 'mine': ") for record in caplog.records]
    assert len(told) == 3
    assert found["warnings"][:3] == told


def test_inspect_names_files_that_it_cannot_check(tmp_path: Path, config_json: Path, capsys) -> None:
    write_adapter(tmp_path, BASE, rank=4)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 99, "content": "x"}]}')
    assert any("tokenizer.json" in warning for warning in run(capsys, "inspect", tmp_path)[1]["warnings"])
    with_base = run(capsys, "inspect", tmp_path, "--base-model", config_json)[1]["warnings"]
    assert not any("tokenizer.json" in warning for warning in with_base)


def test_a_base_model_that_is_not_served_is_told(tmp_path: Path, config_json: Path, capsys) -> None:
    write_adapter(tmp_path / "a", MODEL, rank=4)
    path = config_json / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kv_lora_rank": 512}))  # and no other of its sizes
    code, found = run(capsys, "inspect", tmp_path / "a", "--base-model", config_json)
    assert code == 1
    assert "is not the config of a decoder (KeyError('qk_rope_head_dim'))" in found["error"]


def test_a_converted_adapter_keeps_the_names_that_its_config_speaks_of(tmp_path: Path, capsys) -> None:
    expression = r"model\.language_model\..*_proj"
    write_adapter(tmp_path / "a", MODEL, rank=4, target_modules=expression)
    rename(tmp_path / "a", "model.layers", "model.language_model.layers")
    assert run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--nblocks", 2)[0] == 0
    assert run(capsys, "verify", tmp_path / "b", "--tp", 2)[0] == 0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == expression


def test_a_converted_activated_adapter_keeps_its_invocation(tmp_path: Path, capsys) -> None:
    write_adapter(tmp_path / "a", MODEL, rank=4, alora_invocation_tokens=[5, 6])
    assert run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--nblocks", 2)[0] == 0
    found = run(capsys, "inspect", tmp_path / "b")[1]
    assert (found["invocation"], found["nblocks"]) == ([5, 6], 2)
    assert run(capsys, "verify", tmp_path / "b", "--tp", 2)[0] == 0


def rename(folder: Path, old: str, new: str) -> None:
    """Another name in the tensors' names."""
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_with_nothing_but_padding_holds_nothing(config_json: Path, tmp_path: Path, dtype: str) -> None:
    """2 KV heads on 5 TP ranks: SGLang's CPU engine deals out two, and three ranks have none of attention."""
    folder, base = tmp_path / "adapter", BaseSizes.read(config_json)
    write_adapter(folder, BASE, rank=4, targets=("q_proj", "k_proj", "o_proj"))
    specs = [base.spec(getattr(torch, dtype), rank, 5) for rank in range(5)]
    assert [load_shard("a", folder, spec, max_rank=8)[0].slots > 0 for spec in specs] == [True] * 2 + [False] * 3
    assert [found.passed for found in verify(folder, base, [5])] == [True]


def test_verify_fails_when_a_rank_lost_its_part(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_blocklora.tools import verify as verification

    write_adapter(tmp_path, MODEL, rank=4, nblocks=2)

    def lose_the_second(name, folder, spec, max_rank, *, known):
        shard, image = load_shard(name, folder, spec, max_rank, known=known)
        if spec.tp_rank == 1:
            image.zero_()
        return shard, image

    monkeypatch.setattr(verification, "load_shard", lose_the_second)
    code, found = run(capsys, "verify", tmp_path, "--tp", 2)
    assert code == 1
    assert not found["tp"][0]["passed"]


def test_text_output_and_usage_errors(tmp_path: Path) -> None:
    """As a person runs it: text on stdout, errors on stderr, 2 for a wrong command line, help with exit codes."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sglang_blocklora.tools", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    write_adapter(tmp_path, MODEL, rank=4, nblocks=2)
    inspected = call("inspect", tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert "nblocks 2" in inspected.stdout
    assert call("match-rank", "--nblocks", 2).returncode == 2
    assert call("inspect").returncode == 2
    refused = call("inspect", tmp_path / "nowhere")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ")
    assert "exit codes" in call("convert", "--help").stdout


def test_content_hash_follows_config_and_weights_and_nothing_else(tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL, rank=4)
    first = content_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert content_hash(tmp_path) == first
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    config.write_text(text + " ")
    assert content_hash(tmp_path) != first
    config.write_text(text)
    assert content_hash(tmp_path) == first
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, weights)
    assert content_hash(tmp_path) != first


def test_inspect_shows_an_invocation_as_text(config_json: Path, tmp_path: Path, capsys) -> None:
    """The byte-level tokenizer's ids count from "!" on."""
    from blocklora_testing.models import save_tokenizer

    write_adapter(tmp_path / "judge", BASE, rank=8, alora_invocation_tokens=[39, 68, 79])
    for base, text in ((("--base-model", tmp_path), None), ((), None), (("--base-model", tmp_path), "Hep")):
        if text:
            save_tokenizer(tmp_path)
        code, found = run(capsys, "inspect", tmp_path / "judge", *base)
        assert (code, found["invocation"], found["invocation_text"]) == (0, [39, 68, 79], text)
