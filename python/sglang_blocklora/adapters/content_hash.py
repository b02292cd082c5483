"""Tells whether two adapters are the same: they are when the bytes of config and weights are."""

from __future__ import annotations

import hashlib
from contextlib import suppress
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
    """Inode, size and time of the last write of config and weights, where they are seen: others once one is written."""
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with suppress(OSError):  # missing or not readable: whoever reads the file says so
            one = (folder / name).stat()
            found.append((one.st_ino, one.st_size, one.st_mtime_ns))
    return tuple(found)
