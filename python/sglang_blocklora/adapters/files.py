"""Reads an adapter's small files. Reads are bounded, and every failure is an ``AdapterError``."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from sglang_blocklora.adapters.errors import AdapterError

CONFIG_BYTES = 2**18  # of adapter_config.json; two patterns for each module of a large model take a quarter of it


def open_regular(path: Path) -> int:
    """A file descriptor of the regular file ``path``. Raises ``OSError``; never waits, as a named pipe would."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(0, "not a regular file", str(path))


def unreadable(adapter: str, path: Path, error: OSError) -> AdapterError:
    """What to say of a file that is there, and cannot be read."""
    if isinstance(error, PermissionError):
        return AdapterError(
            adapter,
            f"{path} that is not readable ({error.strerror})",
            "files and folders that the server's user may read",
            "Change their permissions or owner.",
        )
    return AdapterError(
        adapter, f"{path} that cannot be read ({error.strerror or error})", "a whole file", "Copy it again."
    )


def read_bytes(adapter: str, path: Path, max_bytes: int) -> bytes | None:
    """The contents of ``path``, or None where there is no such file. Raises ``AdapterError``."""
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(adapter, path, error) from error
    if len(data) > max_bytes:
        raise AdapterError(adapter, f"{path} of more than {max_bytes} bytes", f"at most {max_bytes}", "Save it again.")
    return data


def read_json(adapter: str, path: Path) -> dict[str, Any] | None:
    """The JSON object in the small file ``path``, or None where there is no such file. Raises ``AdapterError``."""
    data = read_bytes(adapter, path, CONFIG_BYTES)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise not_json(adapter, path, error) from error
    if not isinstance(value, dict):
        raise AdapterError(adapter, f"{path} holding a {type(value).__name__}", "a JSON object", "Save it again.")
    return value


def not_json(adapter: str, path: Path, error: Exception) -> AdapterError:
    return AdapterError(adapter, f"{path} that is not JSON ({error})", "a JSON object", "Save it again, or delete it.")
