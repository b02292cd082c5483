"""Adapters that came as tensors, as folders: whole or not there, bounded, and gone with their process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sglang_blocklora.adapters.content_hash import content_hash
from sglang_blocklora.adapters.spool import Spool, SpoolFull
from sglang_blocklora.adapters.spooled import PREFIX, spooled_hash
from sglang_blocklora.settings import Settings

CONFIG = {"r": 4}


def put(spool: Spool, *pieces: bytes, config: dict | None = None) -> Path:
    with spool.receive() as incoming:
        for piece in pieces:
            incoming.write([piece])
            incoming.hash([piece])
        return incoming.finish(config or CONFIG)


def test_a_folder_is_named_by_the_hash_that_a_load_of_it_finds(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    folder = put(spool, b"abc", b"", b"def")
    assert (folder / "adapter_model.safetensors").read_bytes() == b"abcdef"
    assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG
    assert folder.name == content_hash(folder) == spooled_hash(folder)
    assert str(folder) in spool
    assert put(spool, b"abcd", b"ef") == folder
    assert put(spool, b"abcdef", config={"r": 5}) != folder


def test_the_same_keys_in_another_order_are_the_same_adapter(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    assert put(spool, b"x", config={"a": 1, "b": 2}) == put(spool, b"x", config={"b": 2, "a": 1})


def test_what_is_not_finished_is_gone_and_nothing_counts(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    with spool.receive() as incoming:
        incoming.write([b"abc"])
    incoming.write([b"late"])  # a thread that had begun
    with pytest.raises(OSError, match="has gone"):
        incoming.finish(CONFIG)
    (root,) = tmp_path.iterdir()
    assert list(root.iterdir()) == []
    assert spool.used_bytes == 0


def test_it_is_bounded_by_all_that_is_in_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 100)
    folder = put(spool, b"x" * 60)
    with pytest.raises(SpoolFull, match="--adapter-spool-gb"):
        put(spool, b"y" * 60)
    spool.release(str(folder))
    assert spool.keep_only({str(folder)}) == []
    (gone,) = spool.keep_only(())
    assert not folder.exists()
    assert gone.is_dir(), "the caller removes it, in a thread"
    assert spool.used_bytes == 0
    put(spool, b"y" * 60)


def test_what_is_held_stays(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    folder = put(spool, b"x")
    assert put(spool, b"x") == folder
    assert spool.keep_only(()) == []
    spool.release(str(folder))
    assert spool.keep_only(()) == []
    spool.release(str(folder))
    assert len(spool.keep_only(())) == 1


def test_only_folders_that_this_user_alone_may_write_are_trusted_for_their_names(tmp_path: Path) -> None:
    name = "a" * 64
    spool = tmp_path / f"{PREFIX}1"
    (spool / name).mkdir(parents=True)
    spool.chmod(0o755)
    assert spooled_hash(spool / name) is None
    spool.chmod(0o700)
    assert spooled_hash(spool / name) == name
    assert spooled_hash(spool / "short") is None
    link = tmp_path / f"{PREFIX}2"
    link.symlink_to(spool)
    assert spooled_hash(link / name) is None
    assert spooled_hash(tmp_path / "gone" / name) is None
    assert Settings(adapter_roots=("/elsewhere",)).root_of(str(spool / name)) == str(spool)
    assert Settings(adapter_roots=("/elsewhere",)).root_of(str(link / name)) == "/elsewhere"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_with_its_process_however_that_ends(tmp_path: Path, end: signal.Signals) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from sglang_blocklora.adapters.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 1000)\n"
        "with spool.receive() as incoming:\n"
        "    incoming.finish({})\n"
        "print('there', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(end)
    process.wait()
    process.stdout.close()
    limit = time.monotonic() + 30
    while os.listdir(tmp_path):
        assert time.monotonic() < limit
        time.sleep(0.01)
