"""Adapters on embeddings and ``lm_head``: parts recombine, in as few rows as may be; what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocklora_testing.models import build, family_config
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.sharding.cut import ModuleShape
from sglang_blocklora.sharding.linears import Interval
from sglang_blocklora.sharding.vocabulary import Vocabulary, cut_vocabulary
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.convert import convert
from sglang_blocklora.tools.inspect_adapter import cost_per_rank
from sglang_blocklora.tools.opened import open_adapter
from sglang_blocklora.tools.verify import verify
from transformers import AutoModelForCausalLM

VOCAB, LAYERS = 300, 3  # no multiple of 64: the last TP rank has padding
EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"

# It warns that it saves the base model's embeddings too.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = family_config("llama", layers=LAYERS)
    config.vocab_size = VOCAB
    return build(tmp_path_factory.mktemp("vocabulary") / "model", config, "llama")


def adapter(model: Path, folder: Path, *targets: str) -> Path:
    """A random adapter that PEFT saved, with the base model's embeddings and head beside it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
    with torch.no_grad():
        for name, one in made.named_parameters():
            if ".lora_" in name:
                one.normal_()
    made.save_pretrained(folder)
    return folder


@given(st.integers(0, 5), st.integers(0, 700), st.integers(1, 9))
def test_parts_follow_one_another(rank: int, length: int, layers: int) -> None:
    ids = Interval(rank * length, (rank + 1) * length, 4 * length)
    parts = cut_vocabulary(Vocabulary("model.embed_tokens", "lm_head", ids), layers, Interval(0, 8, 8))
    assert len(parts) == layers
    edges = [(embedding.inputs.start, embedding.inputs.stop) for embedding, _ in parts]
    assert [head.outputs[0] for _, head in parts] == [embedding.inputs for embedding, _ in parts]
    assert edges[0][0] == ids.start
    assert edges[-1][1] == ids.stop
    assert all(one[1] == next_one[0] for one, next_one in itertools.pairwise(edges))
    assert max(stop - start for start, stop in edges) <= -(-length // layers) + 7


@pytest.mark.parametrize("known", [True, False], ids=["base model", "adapter alone"])
def test_the_ranks_parts_recombine(model: Path, tmp_path: Path, known: bool) -> None:
    folder = adapter(model, tmp_path / "a", "embed_tokens", "lm_head", "o_proj")
    for found in verify(folder, BaseSizes.read(model) if known else None, [1, 2, 3, 4, 8]):
        assert found.passed, found
        assert found.modules == 2 + LAYERS


def test_what_is_large_is_dealt_out_over_the_layers() -> None:
    """A head's adapter of rank 16 on Llama-3.1-8B takes 64 slots: A, 16 rows of 4096, and beside it its share of B."""
    llama = BaseSizes(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, layers=32, vocab=128256)
    _, slots, _ = cost_per_rank(llama, {"lm_head": ModuleShape(16, 1, "plain")}, 1, torch.bfloat16)
    assert slots == 16 * 4096 // 1024  # in one layer alone it would be 1066


def test_delta_is_pefts(model: Path, tmp_path: Path) -> None:
    """Scaling and both factors, as ``get_delta_weight`` of PEFT's embedding has them."""
    folder = adapter(model, tmp_path / "a", "embed_tokens")
    stored = load_file(folder / WEIGHTS_NAME)
    expected = 2.0 * (stored[f"{EMBEDDING}.lora_embedding_B"] @ stored[f"{EMBEDDING}.lora_embedding_A"]).t()
    with open_adapter(folder, BaseSizes.read(model)) as opened:
        a, b = opened.dense_factors("model.embed_tokens")
        delta = opened.modules["model.embed_tokens"].scaling * (b @ a).t()
    torch.testing.assert_close(delta, expected.double(), rtol=1e-5, atol=1e-5)


def config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return edit


def grown(tensors: dict[str, torch.Tensor]) -> None:
    """As after ``resize_token_embeddings``, with an adapter on both."""
    tensors[f"{EMBEDDING}.lora_embedding_A"] = torch.zeros(4, VOCAB + 2)
    tensors[f"{HEAD}.lora_B.weight"] = torch.zeros(VOCAB + 2, 4)
    for name in (EMBEDDING, HEAD):
        tensors[f"{name}.base_layer.weight"] = torch.zeros(VOCAB + 2, 288)


BLOCKS = {"target_modules_bd_a": ["embed_tokens"], "nblocks": 2}
REFUSED = {
    "more tokens": (weights(grown), "trained on this base model"),
    "other embeddings beside": (
        weights(lambda t: t.update({f"{EMBEDDING}.base_layer.weight": torch.zeros(VOCAB + 2, 288)})),
        "new tokens are not served",
    ),
    "whole embeddings, and no adapter on them": (
        weights(lambda t: [t.pop(name) for name in list(t) if "lora" in name and "q_proj" not in name]),
        "whole embeddings",
    ),
    "blocks on embeddings": (config(use_bdlora=BLOCKS | {"match_strict": False}), "use_bdlora on embeddings"),
    "an invocation on embeddings": (config(alora_invocation_tokens=[5]), "alora_invocation_tokens on embeddings"),
    "factors of a linear on embeddings": (
        weights(lambda t: t.update({f"{EMBEDDING}.lora_{one}.weight": torch.zeros(4, 4) for one in "AB"})),
        "embed_tokens.lora_A.weight",
    ),
    "other embeddings": (
        weights(lambda t: t.update({f"{EMBEDDING}_2.lora_embedding_{one}": torch.zeros(4, 4) for one in "AB"})),
        "only embed_tokens can have an adapter",
    ),
    "not selected": (config(target_modules=["q_proj", "embed_tokens"]), "does not select"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(model: Path, tmp_path: Path, kind: str) -> None:
    folder = adapter(model, tmp_path / "mine", "embed_tokens", "lm_head", "q_proj")
    edit, message = REFUSED[kind]
    edit(folder)
    with pytest.raises(AdapterError) as error:
        load_shard("mine", folder, BaseSizes.read(model).spec(torch.float32, 0, 2), 64)
    assert message in str(error.value)


def test_tied_weights_select_both(model: Path, tmp_path: Path) -> None:
    """PEFT then saves factors of the head that ``target_modules`` does not name."""
    folder = adapter(model, tmp_path / "a", "embed_tokens", "lm_head")
    config(target_modules=["embed_tokens"], ensure_weight_tying=True)(folder)
    assert "head" in load_shard("a", folder, BaseSizes.read(model).spec(torch.float32, 0, 2), 64)[0].parts


def test_embeddings_are_not_converted(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeddings have no block-diagonal form"):
        convert(adapter(model, tmp_path / "a", "embed_tokens"), tmp_path / "b", 2, None, 0.1)
