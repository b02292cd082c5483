"""What SGLang's graph runners ask of our manager while they capture and replay, with upstream's own flags and modes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_blocklora.batch.triton_adder import TritonAdder
from sglang_blocklora.requests.activation import ActivatedId

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model import graphs, runner
    from blocklora_patches.model.lora_manager import BlockLoRAManager
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
    from sglang.srt.model_executor.runner_utils import capture_mode
    from sglang.srt.runtime_context import get_flags
    from sglang.srt.speculative.eagle_info import EagleVerifyInput
    from sglang.srt.speculative.ngram_info import NgramVerifyInput


class Step:
    """Notes what the manager makes of a batch."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def manager() -> Any:
    own = object.__new__(BlockLoRAManager)
    own._step, own._first_pass, own._prefill_graph_tokens = Step(), None, 0
    own.device = torch.device("cpu")
    return own


def batch(mode: ForwardMode, ids: list[str | None], counts: list[int] | None = None, drafts: Any = None) -> Any:
    return SimpleNamespace(
        spec_info=drafts,
        forward_mode=mode,
        lora_ids=ids,
        extend_prefix_lens_cpu=counts and [0] * len(counts),
        extend_seq_lens_cpu=counts,
        extend_num_tokens=counts and sum(counts),
    )


def test_an_adapter_on_what_no_graph_has_is_refused(manager: Any) -> None:
    """Its deltas would be left out in silence by every replay."""
    manager._step = object.__new__(TritonAdder)
    manager._step._captured = frozenset({"layer"})
    manager.lora_refs = {}
    local = SimpleNamespace(shard=SimpleNamespace(parts=frozenset({"layer", "expert"})))
    ref, agreed = SimpleNamespace(lora_name="late", pinned=False), SimpleNamespace(error=None, slots=1)
    answer = manager._take(ref, agreed, local)
    assert not answer.success
    assert "'late': found weights on expert; expected none, since CUDA graphs" in answer.error_message


def test_decode_graphs_are_recorded_without_adapters_too():
    runner = object.__new__(DecodeCudaGraphRunner)
    assert graphs._init(runner, SimpleNamespace(lora_manager=None)) is None
    model_runner = SimpleNamespace(lora_manager=object())
    arguments, options = graphs._init(runner, model_runner, attn_backend=1)
    assert (arguments, options) == ((runner, model_runner), {"attn_backend": 1, "record_nolora_graph": True})
    runner.record_nolora_graph = options["record_nolora_graph"]
    for ids, graph in (([None, None], "nolora"), (["a", None], "lora")):
        assert runner._resolve_lora_variant(batch(ForwardMode.DECODE, ids)) == graph


@pytest.mark.parametrize("variant", [None, "lora", "nolora"])
def test_capture_of_a_decode_graph(manager: Any, monkeypatch: pytest.MonkeyPatch, variant: str | None):
    monkeypatch.setattr(capture_mode, "is_capture_mode", True)
    monkeypatch.setattr(capture_mode, "_capture_lora_variant", variant)
    manager.prepare_lora_batch(batch(ForwardMode.DECODE, [None] * 8))
    assert manager._step.calls == [("reset",) if variant == "nolora" else ("prepare_capture", "decode", 8)]


@pytest.mark.parametrize("kind", [NgramVerifyInput, EagleVerifyInput])
def test_each_draft_of_a_request_is_a_token_of_its_adapter(
    manager: Any, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    drafts = object.__new__(kind)
    drafts.draft_token_num = 3
    verified = batch(ForwardMode.TARGET_VERIFY, ["a", None, ActivatedId("b", 7)], drafts=drafts)
    manager.prepare_lora_batch(verified)
    monkeypatch.setattr(capture_mode, "is_capture_mode", True)
    manager.prepare_lora_batch(verified)
    assert manager._step.calls == [
        ("prepare", ["a", "a", "a", None, None, None, "b", "b", "b"], None),
        ("prepare_capture", "decode", 9),
    ]


def test_a_draft_model_is_not_the_adapters_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "check", lambda: None)
    monkeypatch.setattr(runner, "get_lora", lambda: SimpleNamespace(enable_lora=True))
    runner._load_model(SimpleNamespace(is_draft_worker=True))
    with pytest.raises(RuntimeError, match="without its settings"):
        runner._load_model(SimpleNamespace(is_draft_worker=False))


def test_capture_of_a_prefill_graph(manager: Any, monkeypatch: pytest.MonkeyPatch):
    manager.init_prefill_cuda_graph_batch_info(max_num_tokens=512, max_num_requests=64)
    monkeypatch.setattr(get_flags().dp, "capturing_prefill_graph", True)
    captured = batch(ForwardMode.EXTEND, [None], [256])
    assert manager.can_use_prefill_cuda_graph(captured), "upstream captures no other batch"
    manager.prepare_lora_batch(captured)
    assert manager._step.calls == [("init_graphs", "prefill", 512), ("prepare_capture", "prefill", 256)]


def test_a_prefill_that_warms_up_a_decode_capture_is_a_batch(manager: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture_mode, "is_capture_mode", True)
    manager.prepare_lora_batch(batch(ForwardMode.EXTEND, [None], [8192]))
    assert manager._step.calls == [("prepare", [None], [8192])]


def test_which_prefill_may_replay_a_graph(manager: Any):
    assert manager.prefill_cuda_graph_max_bs is None
    assert not manager.can_use_prefill_cuda_graph(batch(ForwardMode.EXTEND, ["a"], [1])), "none was captured"
    manager.init_prefill_cuda_graph_batch_info(max_num_tokens=512)
    assert manager.can_use_prefill_cuda_graph(batch(ForwardMode.EXTEND, ["a"], [512]))
    assert manager.can_use_prefill_cuda_graph(batch(ForwardMode.MIXED, ["a", None], [5, 1]))
    assert not manager.can_use_prefill_cuda_graph(batch(ForwardMode.EXTEND, ["a"], [513]))
    assert not manager.can_use_prefill_cuda_graph(batch(ForwardMode.DECODE, ["a"]))
    assert not manager.can_use_prefill_cuda_graph(batch(ForwardMode.TARGET_VERIFY, ["a"], [4]))
