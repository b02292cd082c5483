"""Each TP rank reads its own bytes of the checkpoint: counted at the safetensors slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sglang_blocklora.adapters import checkpoint
from sglang_blocklora.adapters.shard import load_shard
from support.toy import ToyModel, write_adapter

MODEL = ToyModel()


class CountingFile:
    """safe_open, counting the bytes of every slice that is taken."""

    taken_bytes = 0

    def __init__(self, *args, **kwargs) -> None:
        self._file = safe_open(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def get_slice(self, name: str):
        return CountingSlice(self._file.get_slice(name))


class CountingSlice:
    def __init__(self, inner) -> None:
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __getitem__(self, index) -> torch.Tensor:
        tensor = self._inner[index]
        CountingFile.taken_bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "safe_open", CountingFile)

    def read(folder: Path, size: int) -> list[int]:
        counts = []
        for rank in range(size):
            CountingFile.taken_bytes = 0
            load_shard("a", folder, MODEL.spec(rank, size), 64)
            counts.append(CountingFile.taken_bytes)
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
