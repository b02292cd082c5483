"""Keeps fetched adapters as folders on disk, within a budget, for every server that is given the same folder.

Each lies in a folder named by the hash of its URL and revision, with a file that who uses it locks: shared by readers,
alone by who writes or removes it. A lock goes with its process, however that ends, so nothing has to be tidied up.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

LOCK = ".lock"
PART = ".part"  # of a folder that is on its way
GONE = "gone-"
KEY_DIGITS = 64


class CacheFull(ValueError):
    """There is no room: what is in use takes it."""


def is_cached(path: Path, cache: Path) -> bool:
    """Whether ``path`` is that of a whole adapter in ``cache``. Does not ask the file system."""
    return path.parent == cache and len(path.name) == KEY_DIGITS


class Held:
    """A folder that nobody removes until ``release``."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    def release(self) -> None:
        os.close(self._lock)


class FolderCache:
    """The adapters in the folder ``root``. For any thread, and for several processes.

    max_bytes  of all of them, those on their way included. Processes do not tell each other what is on its way.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._coming: dict[str, int] = {}  # name of a folder on its way -> bytes it will have
        self._lock = threading.Lock()

    def hold(self, key: str) -> Held | None:
        """The whole adapter under ``key``, which counts as used now, or None. Raises ``OSError``."""
        folder = self.root / key
        lock = _locked(folder, fcntl.LOCK_SH)
        if lock is None:
            return None
        os.utime(folder)
        return Held(folder, lock)

    def begin(self, key: str, size_bytes: int, wait: Callable[[], None]) -> Part | None:
        """A folder to write ``size_bytes`` of an adapter into, or None where somebody else has just brought it.

        What another began and did not end is in it. ``wait`` is called while somebody else writes: it pauses, or raises
        to give up. The least recently used make room. Raises ``CacheFull`` and ``OSError``.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = self.root / f"{key}{PART}"
        while True:
            if (self.root / key).exists():
                return None
            folder.mkdir(exist_ok=True)
            lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None:
                break
            wait()
        try:
            with self._lock:
                self._make_room(size_bytes, folder.name)
                self._coming[folder.name] = size_bytes
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            raise
        return Part(self, folder, lock)

    def ended(self, part: Path) -> None:
        """What was written into ``part`` is whole now, or gone."""
        with self._lock:
            del self._coming[part.name]

    def _make_room(self, size_bytes: int, newcomer: str) -> None:
        sizes = {folder: self._coming.get(folder.name) or _size(folder) for folder in self._folders()}
        used = sum(size for folder, size in sizes.items() if folder.name != newcomer)
        for folder in sorted(sizes, key=_used_at):
            if not self.max_bytes - used < size_bytes <= self.max_bytes:
                break
            if folder.name != newcomer and self.remove(folder):
                used -= sizes[folder]
        if used + size_bytes > self.max_bytes:
            raise CacheFull(
                f"{size_bytes} bytes beside {used} of adapters that are loaded or on their way, in {self.root}; "
                f"expected at most {self.max_bytes / 2**30:g} GiB together"
            )

    def _folders(self) -> list[Path]:
        return [folder for folder in self.root.iterdir() if folder.is_dir()]

    def remove(self, folder: Path) -> bool:
        """Remove a folder of the cache that nobody uses; whether it went."""
        lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return False
        try:
            gone = folder.rename(folder.with_name(f"{GONE}{uuid4().hex}"))
            shutil.rmtree(gone, ignore_errors=True)
            return True
        finally:
            os.close(lock)


class Part:
    """An adapter on its way into a cache: its files go into ``folder``, then it ends by one of the three methods."""

    def __init__(self, cache: FolderCache, folder: Path, lock: int) -> None:
        self.folder = folder
        self._cache, self._lock = cache, lock

    def finish(self) -> Path:
        """All is there: others find it from now on. Its folder. Raises ``OSError``."""
        whole = self.folder.with_name(self.folder.name.removesuffix(PART))
        self.folder.rename(whole)
        self._end()
        return whole

    def stop(self) -> None:
        """Leave what is there for who fetches it next, or to give way."""
        self._end()

    def drop(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._end()

    def _end(self) -> None:
        self._cache.ended(self.folder)
        os.close(self._lock)


def _locked(folder: Path, how: int) -> int | None:
    """A file descriptor that holds the lock of ``folder``; None where there is no such folder, or it is locked."""
    path = folder / LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, how)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):  # in use; removed between the two
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _size(folder: Path) -> int:
    sizes = []
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    return sum(sizes)


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
