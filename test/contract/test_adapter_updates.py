"""Loads and unloads as the schedulers of two TP ranks see them: read beside the steps, taken in one step, answered."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocklora_testing.ranks import Ranks
from blocklora_testing.toy import ToyModel, host_only_images, write_adapter
from sglang_blocklora.adapters.loading import read_adapter
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import LRU
from sglang_blocklora.memory.reads import Decision
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model.lora_manager import BlockLoRAManager
    from blocklora_patches.scheduler import adapter_updates
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput

MODEL = ToyModel()


class Rank:
    """One TP rank's scheduler, as far as adapters go; ``answers`` went to the HTTP process."""

    def __init__(self, tp_rank: int, reads: Any) -> None:
        spec = MODEL.spec(tp_rank, 2, torch.float32)
        arena = StaticArena(MODEL.layers, 400, spec.row_width, spec.dtype, torch.device("cpu"))
        self.pool = StaticPool(arena, 4, host_only_images(), DecisionLog(None, 0), LRU())
        manager = object.__new__(BlockLoRAManager)
        manager.pool, manager.reads, manager.lora_refs = self.pool, reads, {}
        manager._loading, manager._unloaded = {}, set()
        manager._read = lambda name, path: read_adapter(name, path, spec, 64, None)
        self.answers: list[tuple[Any, Any]] = []
        self.polled: list[tuple[int, int]] = []
        self.scheduler = SimpleNamespace(
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
            idle_sleeper=None,
            ipc_channels=SimpleNamespace(
                send_to_tokenizer=SimpleNamespace(send_output=lambda output, to: self.answers.append((output, to)))
            ),
        )
        self.manager = manager

    def load(self, request: LoadLoRAAdapterReqInput) -> None:
        assert adapter_updates._load_lora_adapter(None, self.scheduler, request) is None, "it waited for the files"

    def step(self, received: list[Any]) -> list[Any]:
        """What upstream is left to process."""
        changed = adapter_updates._process_input_requests(self.scheduler, received)
        return received if changed is None else changed[0][1]


@pytest.fixture
def ranks() -> Ranks[Rank]:
    return Ranks(Rank)


def request(folder: Path, rid: str = "r", lora_id: str = "1") -> LoadLoRAAdapterReqInput:
    return LoadLoRAAdapterReqInput(lora_name="mine", lora_path=str(folder), lora_id=lora_id, rid=rid)


def test_a_load_is_taken_when_all_ranks_have_read_and_answered_by_its_id(ranks: Ranks[Rank], tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL)
    for rank in ranks.objects:
        rank.load(request(tmp_path))
    assert ranks.call(lambda rank: (rank.answers, rank.step(["other"]), list(rank.pool.loaded))) == ([], ["other"], [])
    decision = ranks.decide(1)
    assert ranks.call(lambda rank: rank.step(["before", decision, "behind"])) == ["before", "behind"]
    for rank in ranks.objects:
        assert rank.pool.loaded["1"].name == "mine"
        assert rank.pool.bring_in(["1"])
        ((output, to),) = rank.answers
        assert (output.success, output.rid, to.rid) == (True, "r", "r")


def test_a_folder_that_is_refused_leaves_nothing(ranks: Ranks[Rank], tmp_path: Path) -> None:
    for rank in ranks.objects:
        rank.load(request(tmp_path / "nowhere"))
    decision = ranks.decide(1)
    for rank in ranks.objects:
        rank.step([decision])
        ((output, _),) = rank.answers
        assert (output.success, output.rid, rank.pool.loaded, rank.manager.lora_refs) == (False, "r", {}, {})
        assert "'mine': found no folder" in output.error_message


def test_what_is_unloaded_while_it_is_read_is_not_taken(ranks: Ranks[Rank], tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL)
    unload = UnloadLoRAAdapterReqInput(lora_name="mine", lora_id="1", rid="u")
    for rank in ranks.objects:
        rank.load(request(tmp_path))
        assert rank.manager._unload_lora_adapter(unload.to_ref()).success
        rank.load(request(tmp_path, "again", "2"))
    decisions: list[Decision] = [ranks.decide(2), ranks.decide(1)]
    for rank in ranks.objects:
        rank.step(list(decisions))
        assert [(output.rid, output.success) for output, _ in rank.answers] == [("again", True), ("r", False)]
        assert "unloaded while it was read" in rank.answers[1][0].error_message
        assert list(rank.pool.loaded) == ["2"]
        assert rank.manager._loading == {}
        assert rank.manager._unloaded == set()


def test_rank_0_adds_its_decisions_to_what_upstream_broadcasts(ranks: Ranks[Rank]) -> None:
    first = ranks.objects[0]
    first.manager.reads = SimpleNamespace(decisions=lambda: ["decided"])
    assert adapter_updates._poll_timeout_aborts(["abort"], first.scheduler) == ["abort", "decided"]
    first.scheduler.tp_worker.model_runner.lora_manager = None
    assert adapter_updates._poll_timeout_aborts(["abort"], first.scheduler) == ["abort"]
