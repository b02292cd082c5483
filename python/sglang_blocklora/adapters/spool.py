"""Keeps adapters that came as tensors as folders, so that they are checked, cut and read again as any other.

The folders lie in one of this process's own, which nobody else may write. It goes when the process ends, however it
ends. Each folder is named by the content hash of what it holds, and never changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME
from sglang_blocklora.adapters.content_hash import combined
from sglang_blocklora.adapters.spooled import PREFIX

MEMORY = Path("/dev/shm")
# Waits until the process that holds the other end of file 3 has ended, then removes a folder.
_REMOVE = 'exec 3<&0; (read -r _ <&3; rm -rf -- "$0") </dev/null >/dev/null 2>&1 &'


class SpoolFull(ValueError):
    """There is no room for another adapter."""


class Spool:
    """The folders of one process's adapters, made when the first one comes. For any thread.

    where      folder to make it in; None: in memory where there is room for ``max_bytes``, else a temporary folder
    max_bytes  of all adapters in it, those on their way in included
    """

    def __init__(self, where: Path | None, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._where = where
        self._root: Path | None = None
        self._sizes: dict[str, int] = {}  # path of a whole adapter -> bytes
        self._held: Counter[str] = Counter()
        self._count = 0
        self._lock = threading.RLock()

    def receive(self) -> Incoming:
        """An adapter that begins to come in. Raises ``OSError``."""
        with self._lock:
            if self._root is None:
                room = _free_bytes(MEMORY) >= self.max_bytes
                where = self._where or (MEMORY if room else Path(tempfile.gettempdir()))
                self._root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where)).resolve()  # nobody else may enter it
                self._lease = _removed_after_this_process(self._root)
            self._count += 1
            folder = self._root / f"new-{self._count}"
        folder.mkdir()
        return Incoming(self, folder)

    def __contains__(self, path: str) -> bool:
        return path in self._sizes

    def release(self, path: str) -> None:
        """What ``Incoming.finish`` gave may go once ``keep_only`` is not told of it."""
        with self._lock:
            self._held[path] -= 1
            self._held = +self._held

    def keep_only(self, paths: Collection[str]) -> list[Path]:
        """Forget the adapters that are not among ``paths`` and not held; the folders for the caller to remove."""
        gone = []
        with self._lock:
            for path in [path for path in self._sizes if path not in paths and path not in self._held]:
                self._count += 1
                gone.append(Path(path).rename(Path(path).with_name(f"gone-{self._count}")))
                self.take(-self._sizes.pop(path))
        return gone

    def take(self, count: int) -> None:
        """Note that so many bytes more are used. Raises ``SpoolFull``."""
        with self._lock:
            if count > 0 and self.used_bytes + count > self.max_bytes:
                raise SpoolFull(
                    f"adapters that came as tensors would take more than {self.max_bytes / 2**30:g} GiB "
                    "(--adapter-spool-gb). Unload some, or start the server with more."
                )
            self.used_bytes += count

    def put(self, folder: Path, content_hash: str, size_bytes: int) -> Path:
        """Keep a whole adapter under its hash, held; one that is there already stays, and ``folder`` goes."""
        path = folder.with_name(content_hash)
        with self._lock:
            known = str(path) in self._sizes
            if not known:
                folder.rename(path)
                self._sizes[str(path)] = size_bytes
            self._held[str(path)] += 1
        if known:
            shutil.rmtree(folder)
            self.take(-size_bytes)
        return path


class Incoming:
    """One adapter on its way in: its weights, written and hashed piece by piece, then its config. A context manager;
    what is not finished when it ends is gone.
    """

    def __init__(self, spool: Spool, folder: Path) -> None:
        self._spool, self._folder = spool, folder
        self._weights = (folder / WEIGHTS_NAME).open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._over = False
        self._lock = threading.Lock()  # a write that goes on in a thread when its client has gone

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Take the next bytes of the weights. For any thread, one call after another.

        Raises ``SpoolFull`` and ``OSError``.
        """
        with self._lock:
            for piece in pieces if not self._over else ():
                self._spool.take(len(piece))
                self._size += len(piece)
                self._weights.write(piece)

    def hash(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Take the same bytes into the content hash: another thread may, while they are written."""
        for piece in pieces:
            self._hash.update(piece)

    def written(self) -> Path:
        """The file of what came so far. Raises ``OSError``."""
        with self._lock:
            if not self._over:
                self._weights.flush()
        return self._folder / WEIGHTS_NAME

    def finish(self, config: Mapping[str, Any]) -> Path:
        """The adapter's folder, once all weights have come; it is held until ``Spool.release``.

        Raises ``SpoolFull`` and ``OSError``.
        """
        data = json.dumps(config, indent=2, sort_keys=True).encode()
        with self._lock:
            if self._over:
                raise OSError("who brought the adapter has gone")
            self._spool.take(len(data))
            weights_bytes, self._size = self._size, self._size + len(data)
            (self._folder / CONFIG_NAME).write_bytes(data)
            self._weights.close()
            files = [(len(data), hashlib.sha256(data).digest()), (weights_bytes, self._hash.digest())]
            path = self._spool.put(self._folder, combined(files), self._size)
            self._over = True
            return path

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                with suppress(OSError):  # no room for its last bytes
                    self._weights.close()
                shutil.rmtree(self._folder, ignore_errors=True)
                self._spool.take(-self._size)


def _free_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize if os.access(folder, os.W_OK) else 0


def _removed_after_this_process(folder: Path) -> int:
    """Have ``folder`` removed when this process ends, also by SIGKILL; a file descriptor to be kept until then."""
    theirs, ours = os.pipe()
    with open(theirs, "rb") as end:
        subprocess.run(["sh", "-c", _REMOVE, str(folder)], stdin=end, check=True, start_new_session=True)
    return ours
