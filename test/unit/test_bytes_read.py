"""Each TP rank reads its own bytes of the checkpoint: counted where the file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocklora_testing.toy import ToyModel, write_adapter
from safetensors import safe_open
from sglang_blocklora.adapters import weights_file
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.adapters.weights_file import WeightsFile

MODEL = ToyModel()


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch):
    """Bytes of weights that each TP rank asks the file for, rows of a page or more not read whole."""
    taken = [0]
    inner = WeightsFile._fill

    def counting(self, data: memoryview, start: int) -> None:
        taken[0] += len(data) if hasattr(self, "tensors") else 0  # not the header
        inner(self, data, start)

    monkeypatch.setattr(WeightsFile, "_fill", counting)
    monkeypatch.setattr(weights_file, "PAGE_BYTES", 0)  # the toy's rows are shorter than a page

    def read(folder: Path, size: int) -> list[int]:
        counts = []
        for rank in range(size):
            taken[0] = 0
            load_shard("a", folder, MODEL.spec(rank, size), 64)
            counts.append(taken[0])
        return counts

    return read


def stored_bytes(folder: Path) -> dict[str, int]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_block_diagonal_adapter_with_n_equal_to_tp_is_read_once_over_all_ranks(
    tmp_path: Path, bytes_read, size: int
) -> None:
    """n = N: every byte is read by exactly one rank."""
    write_adapter(tmp_path, MODEL, rank=8, nblocks=size)
    counts = bytes_read(tmp_path, size)
    assert counts == [sum(stored_bytes(tmp_path).values()) // size] * size


def test_plain_adapter_reads_the_unsplit_factor_whole_and_its_share_of_the_other(tmp_path: Path, bytes_read) -> None:
    write_adapter(tmp_path, MODEL, rank=8)
    stored = stored_bytes(tmp_path)
    row = ("o_proj", "down_proj")
    whole = sum(size for name, size in stored.items() if ("lora_B" in name) == any(module in name for module in row))
    split = sum(stored.values()) - whole
    assert bytes_read(tmp_path, 4) == [whole + split // 4] * 4


def test_more_blocks_than_ranks_still_reads_each_byte_once(tmp_path: Path, bytes_read) -> None:
    write_adapter(tmp_path, MODEL, rank=8, nblocks=8)
    assert sum(bytes_read(tmp_path, 2)) == sum(stored_bytes(tmp_path).values())
