"""Tells a folder of a spool (``spool.py``) from others, in whichever process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

PREFIX = "sglang-blocklora-spool-"
SHA256_DIGITS = 64


def named_as_spooled(folder: Path) -> bool:
    """Whether only an adapter of some process's spool would be called so. Asks nothing of the file system."""
    return folder.parent.name.startswith(PREFIX) and len(folder.name) == SHA256_DIGITS


def spooled_hash(folder: Path) -> str | None:
    """The content hash of an adapter in some process's spool, which its name is; None for any other folder.

    Only a process of this user can have made such a folder. Asks the file system.
    """
    if not named_as_spooled(folder):
        return None
    try:
        found = folder.parent.lstat()
    except (OSError, ValueError):  # gone; a path that cannot be
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder.name if own else None
