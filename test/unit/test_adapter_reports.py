"""What each TP rank tells of an adapter that it read: a refusal, never an exception, and the same for all ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from blocklora_testing.toy import ToyModel, write_adapter
from safetensors.torch import load_file, save_file
from sglang_blocklora.adapters.loading import Report, merge, read_adapter
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.adapters.spooled import PREFIX
from sglang_blocklora.sharding.linears import ModelSpec

MODEL = ToyModel()
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def read(name: str, folder: Path, spec: ModelSpec, root: str | None = None) -> Report:
    """What a TP rank tells of an adapter."""
    return read_adapter(name, str(folder), spec, 64, root)[0]


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything: be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", ".", ".."])
def test_what_may_not_be_read_is_told_so(name: str, rooted: bool, caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        Path(place).chmod(0o755)
        folder = Path(place) / "all" / "adapter"
        write_adapter(folder, MODEL)
        (folder / "tokenizer.json").write_text("{}")
        (folder / name).chmod(0)
        with without_rights():
            outcome = read("mine", folder, MODEL.spec(0, 1), place if rooted else None)
        assert outcome.error is not None
        assert "that is not readable (Permission denied)" in outcome.error
        assert not caplog.records  # a refusal, not a crash of the loader
        (folder / name).chmod(0o700)


def test_root_keeps_paths_and_links_in(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    write_adapter(root / "inside", MODEL)
    write_adapter(outside, MODEL)
    (root / "link").symlink_to(outside)
    write_adapter(root / "linked-file", MODEL)
    (root / "linked-file" / "adapter_model.safetensors").unlink()
    (root / "linked-file" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    spec = MODEL.spec(0, 1)
    assert read("a", root / "inside", spec, str(root)).error is None
    for path in (outside, root / "link", root / ".." / "outside", root / "linked-file"):
        error = read("a", path, spec, str(root)).error
        assert error is not None
        assert f"files below {root}" in error or f"a folder below --adapter-root {root}" in error
        assert read("a", path, spec).error is None


def test_a_refusal_on_one_rank_is_a_refusal_on_all(tmp_path: Path) -> None:
    """NaN in the last rows of q's B: only the last TP rank reads them."""
    write_adapter(tmp_path, MODEL, nblocks=2)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[Q_B][-1, 0] = float("nan")
    save_file(tensors, path)
    outcomes = [read("mine", tmp_path, MODEL.spec(rank, 4)) for rank in range(4)]
    assert [outcome.error is None for outcome in outcomes] == [True, True, True, False]
    assert "NaN" in (merge("mine", "there", outcomes).error or "")


def test_finite_weights_whose_sum_is_not_are_served(tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL, dtype=torch.float16)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[Q_B].fill_(60_000)
    assert tensors[Q_B].sum().isinf()
    save_file(tensors, path)
    assert read("mine", tmp_path, MODEL.spec(0, 1)).error is None


def test_ranks_agree_on_the_largest_size(tmp_path: Path) -> None:
    """n = 3 over 2 ranks: each touches two blocks, but the row layouts need not be equal."""
    write_adapter(tmp_path, MODEL, nblocks=3)
    outcomes = [read("mine", tmp_path, MODEL.spec(rank, 2)) for rank in range(2)]
    assert merge("mine", "there", outcomes).slots == max(outcome.slots for outcome in outcomes)


def test_what_is_missing_is_named_by_a_load_too(tmp_path: Path) -> None:
    write_adapter(tmp_path, MODEL)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in (read("mine", tmp_path, MODEL.spec(0, 2)).error or "")


@pytest.mark.parametrize("rooted", [False, True])
def test_a_rank_of_a_node_without_the_spool_says_which_folder_all_nodes_need(tmp_path: Path, rooted: bool) -> None:
    spool = tmp_path / f"{PREFIX}x"
    there, elsewhere = spool / ("a" * 64), spool / ("b" * 64)
    write_adapter(there, MODEL)
    root = str(tmp_path / "root") if rooted else None
    reports = [read("mine", folder, MODEL.spec(i, 2), root) for i, folder in enumerate((there, elsewhere))]
    assert (reports[0].error is None) is not rooted
    error = merge("mine", "there", reports[::-1]).error
    assert error is not None
    assert "adapter 'mine': found no folder" in error
    assert "--adapter-spool-dir" in error


def test_files_that_change_between_two_ranks_reads_are_refused(tmp_path: Path) -> None:
    """Both ranks read a whole adapter, but not the same one."""
    spec = [MODEL.spec(rank, 2) for rank in range(2)]
    write_adapter(tmp_path, MODEL, seed=1)
    first = read("mine", tmp_path, spec[0])
    assert merge("mine", "there", [first, read("mine", tmp_path, spec[1])]).error is None
    write_adapter(tmp_path, MODEL, seed=2)
    second = read("mine", tmp_path, spec[1])
    assert second.error is None
    error = merge("mine", "there", [first, second]).error
    assert error is not None
    assert "'mine'" in error
    assert "files in there that changed while they were read" in error


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_change_while_a_rank_reads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def load_and_change(*arguments, **options):
        loaded = load_shard(*arguments, **options)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b" ")
        return loaded

    monkeypatch.setattr("sglang_blocklora.adapters.loading.load_shard", load_and_change)
    write_adapter(tmp_path, MODEL)
    error = read("mine", tmp_path, MODEL.spec(0, 1)).error
    assert error is not None
    assert "changed while they were read" in error


def test_an_unforeseen_error_becomes_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that raised would leave the others waiting."""

    def broken(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr("sglang_blocklora.adapters.loading.load_shard", broken)
    write_adapter(tmp_path, MODEL)
    error = read("mine", tmp_path, MODEL.spec(1, 2)).error
    assert error is not None
    assert "MemoryError" in error
    assert "TP rank 1" in error


def test_a_folder_that_goes_away_while_a_rank_reads_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found by the soak: a traceback in the log, and a message about this server's own code."""

    def load_and_go(*arguments, **options):
        loaded = load_shard(*arguments, **options)
        (tmp_path / "adapter_config.json").unlink()
        return loaded

    monkeypatch.setattr("sglang_blocklora.adapters.loading.load_shard", load_and_go)
    write_adapter(tmp_path, MODEL)
    error = read("mine", tmp_path, MODEL.spec(0, 1)).error
    assert error is not None
    assert f"{tmp_path} that went away while it was read" in error
    assert not caplog.records
