"""What makes two adapters the same: the bytes of their config and weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME


def content_hash(folder: Path) -> str:
    """sha256 (hex) over the lengths and bytes of config and weights; reads both files in pieces. Raises ``OSError``."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = folder / name
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def file_versions(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Inode, size and time of the last write of config and weights, where they exist: others once one is written."""
    paths = [folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
    found = [path.stat() for path in paths if path.exists()]
    return tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in found)
