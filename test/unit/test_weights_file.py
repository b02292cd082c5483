"""Our reading of safetensors files, against safetensors itself, and of files that are broken or break meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from blocklora_testing.toy import ToyModel, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sglang_blocklora.adapters import weights_file
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.loading import read_adapter
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.adapters.weights_file import DTYPES, WeightsFile

MODEL = ToyModel()


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from(sorted(DTYPES)), height=st.integers(0, 5), width=st.integers(1, 2000))
def test_every_part_is_what_safetensors_stored(tmp_path_factory, data, dtype: str, height: int, width: int) -> None:
    path = tmp_path_factory.mktemp("parts") / "file"
    matrix = torch.randn(height, width).to(DTYPES[dtype])
    save_file({"other": torch.ones(3, 3), "matrix": matrix}, path)

    def part(length: int) -> slice | None:
        ends = st.lists(st.integers(0, length), min_size=2, max_size=2).map(sorted)
        return data.draw(st.none() | ends.map(lambda both: slice(*both)))

    rows, columns = part(height), part(width)
    file = WeightsFile(path)
    assert torch.equal(file.read("matrix", rows, columns), matrix[rows or slice(None), columns or slice(None)])
    file.close()


def entry(**changed) -> dict:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changed


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'{"a": 1}',
        b"\xff{}",
        json.dumps({"a": entry(shape=[2, 3])}).encode(),
        json.dumps({"a": entry(shape=[-2, -2])}).encode(),
        json.dumps({"a": entry(data_offsets=[16, 0])}).encode(),
        json.dumps({"a": entry(data_offsets=[8, 24])}).encode(),
        json.dumps({"a": {"dtype": "F32"}}).encode(),
    ],
)
def test_a_header_that_is_wrong_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=r"header|JSON|Expecting|decode|byte"):
        WeightsFile(path)


@pytest.mark.parametrize("size", [0, 5, 8, 20])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.ones(3, 3)}, path)
    os.truncate(path, size)
    with pytest.raises((OSError, ValueError)):
        WeightsFile(path)


def cut_short_after(monkeypatch: pytest.MonkeyPatch, folder: Path, reads: int) -> None:
    """The file loses its second half once ``reads`` parts were read."""
    count = [0]
    inner = WeightsFile.read

    def read(self, *args):
        count[0] += 1
        if count[0] == reads:
            path = folder / "adapter_model.safetensors"
            os.truncate(path, path.stat().st_size // 2)
        return inner(self, *args)

    monkeypatch.setattr(WeightsFile, "read", read)


def test_a_file_that_is_cut_short_while_it_is_read_is_refused_and_the_process_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a memory map this ends the process with SIGBUS."""
    write_adapter(tmp_path, MODEL)
    load_shard("mine", tmp_path, MODEL.spec(0, 2), 64)
    cut_short_after(monkeypatch, tmp_path, reads=3)
    with pytest.raises(AdapterError, match="bytes early"):
        load_shard("mine", tmp_path, MODEL.spec(0, 2), 64)
    monkeypatch.undo()
    error = read_adapter("mine", str(tmp_path), MODEL.spec(1, 2), 64, None)[0].error
    assert error is not None
    assert "adapter_model.safetensors" in error
    assert "'mine'" in error


def test_rows_shorter_than_a_page_are_read_whole_and_longer_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"short": torch.ones(8, 16), "long": torch.ones(8, 4096)}, tmp_path / "file")
    file = WeightsFile(tmp_path / "file")
    counts: list[int] = []
    inner = WeightsFile._fill
    monkeypatch.setattr(
        WeightsFile, "_fill", lambda self, data, start: (counts.append(len(data)), inner(self, data, start))
    )
    assert file.read("short", None, slice(0, 4)).shape == (8, 4)
    assert file.read("long", None, slice(0, 1024)).shape == (8, 1024)
    assert counts == [8 * 16 * 4] + [1024 * 4] * 8
    assert weights_file.PAGE_BYTES == 4096
    file.close()
