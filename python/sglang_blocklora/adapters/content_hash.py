"""Tells whether two adapters are the same: they are when the bytes of config and weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME

VERSION_DIGITS = 16


def content_hash(folder: Path) -> str:
    """sha256 (hex) over the lengths and bytes of config and weights; reads both files in pieces. Raises ``OSError``."""
    files = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = folder / name
        with path.open("rb") as file:
            files.append((path.stat().st_size, hashlib.file_digest(file, "sha256").digest()))
    return combined(files)


def combined(files: Iterable[tuple[int, bytes]]) -> str:
    """The content hash of config and weights, given bytes and sha256 of each."""
    digest = hashlib.sha256()
    for size_bytes, sha256 in files:
        digest.update(size_bytes.to_bytes(8, "little"))
        digest.update(sha256)
    return digest.hexdigest()


def version(content_hash: str) -> str:
    """What answers call contents: the first digits of their hash."""
    return content_hash[:VERSION_DIGITS]


def file_versions(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Inode, size and time of the last write of config and weights, where they are seen: others once one is written."""
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with suppress(OSError):  # missing or not readable: whoever reads the file says so
            one = (folder / name).stat()
            found.append((one.st_ino, one.st_size, one.st_mtime_ns))
    return tuple(found)
