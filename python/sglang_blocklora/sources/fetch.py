"""Fetches an adapter from its URL into the cache: whole, checked and under its name, or not at all."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sources.cache import CacheFull, FolderCache, Held, Part
from sglang_blocklora.sources.checksums import of_file
from sglang_blocklora.sources.stores import RemoteFile, as_meant, file_system, files_of, refusal, said
from sglang_blocklora.sources.urls import protocol_of

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**23  # of one request to an object store
TRIES = 5  # in a row without a byte
RETRY_SECONDS = 0.25  # before the second try; then twice as long each time
PROGRESS_SECONDS = 5.0


class Cancelled(AdapterError):
    """Somebody unloaded the adapter while it was on its way."""

    def __init__(self, adapter: str, url: str) -> None:
        super().__init__(adapter, f"an unload while {url} was fetched", "nobody to stop it", "Load it again.")


class Unfinished(AdapterError):
    """A store stopped answering half-way: what came may be kept for the next try."""


def fetch(adapter: str, url: str, cache: FolderCache, stop: threading.Event) -> Held:
    """The folder of the adapter at ``url``, fetched unless the cache has this revision of it. Blocks.

    stop  once it is set, nothing more is fetched and nothing is left
    Raises ``AdapterError``: whatever goes wrong, no adapter is in the cache that is not whole.
    """
    files = files_of(adapter, url)
    key = _key(url, files)
    try:
        while (held := cache.hold(key)) is None:
            part = cache.begin(key, sum(file.size_bytes for file in files), _waiting(adapter, url, stop))
            if part is not None:
                _fill(adapter, url, part, files, stop)
    except CacheFull as error:
        raise AdapterError(
            adapter, str(error), "room for it", "Unload some, or start the server with more --adapter-cache-gb."
        ) from error
    except OSError as error:
        raise AdapterError(
            adapter,
            f"{cache.root} that cannot keep {url} ({error.strerror or error})",
            "a folder that this server may write",
            "See --adapter-cache-dir.",
        ) from error
    return held


def _key(url: str, files: Sequence[RemoteFile]) -> str:
    """Names a revision; of a store that tells none, this one time."""
    digest = hashlib.sha256(url.encode())
    for file in files:
        digest.update(f"\n{file.name} {file.stamp or os.urandom(16).hex()}".encode())
    return digest.hexdigest()


def _waiting(adapter: str, url: str, stop: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        if stop.wait(0.2):
            raise Cancelled(adapter, url)

    return wait


def _fill(adapter: str, url: str, part: Part, files: Sequence[RemoteFile], stop: threading.Event) -> None:
    progress = _Progress(adapter, url, sum(file.size_bytes for file in files))
    try:
        store = file_system(url)
        for file in files:
            _copy(adapter, store, file, part.folder / file.name, stop, progress)
            _check(adapter, file, part.folder / file.name)
        if [file.stamp for file in files_of(adapter, url)] != [file.stamp for file in files]:
            raise AdapterError(
                adapter,
                f"files in {url} that changed while they were fetched",
                "an adapter that stays as it is",
                "Load it again once it is written.",
            )
        part.finish()
        progress.done()
    except Unfinished:
        part.stop()
        raise
    except BaseException:
        part.drop()
        raise


def _copy(adapter: str, store: Any, file: RemoteFile, target: Path, stop: threading.Event, progress: _Progress) -> None:
    """Write what ``target`` lacks of ``file``; a connection that breaks goes on where it broke."""
    tries = 0
    with target.open("ab") as out:
        while out.tell() < file.size_bytes:
            before = out.tell()
            try:
                for piece in _pieces(store, file, before):
                    if stop.is_set():
                        raise Cancelled(adapter, file.url)
                    out.write(piece[: file.size_bytes + 1 - out.tell()])
                    progress.came(len(piece))
                if out.tell() == before:
                    raise EOFError("it ended early")
            except Cancelled:
                raise
            except Exception as error:  # each client has exceptions of its own
                if isinstance(as_meant(error), FileNotFoundError | PermissionError):
                    raise refusal(adapter, file.url, as_meant(error)) from error
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                gained = out.tell() - before
                if before and not gained and isinstance(error, ValueError):  # a server that serves no ranges
                    out.seek(0)
                    out.truncate()
                tries = _again(adapter, file, tries=1 if gained else tries + 1, error=error, stop=stop)


def _pieces(store: Any, file: RemoteFile, start: int) -> Any:
    streamed = protocol_of(file.url) in ("http", "https") and not start
    with store.open(file.url, "rb", block_size=0 if streamed else PIECE_BYTES, cache_type="none") as source:
        if start:
            source.seek(start)
        while piece := source.read(PIECE_BYTES if not streamed else 2**20):
            yield piece


def _again(adapter: str, file: RemoteFile, *, tries: int, error: Exception, stop: threading.Event) -> int:
    """Pause before the next try, given how many there were in a row without a byte. ``Unfinished`` after the last."""
    if tries == TRIES:
        raise Unfinished(
            adapter,
            f"{file.url} that stopped half-way ({said(error)})",
            "a store that answers",
            "Load it again: it goes on from there.",
        ) from error
    logger.info("adapter %r: %s stopped (%s), trying again", adapter, file.url, said(error))
    if stop.wait(RETRY_SECONDS * 2 ** (tries - 1)):
        raise Cancelled(adapter, file.url)
    return tries


def _check(adapter: str, file: RemoteFile, path: Path) -> None:
    found = {"size": str(path.stat().st_size)} | {kind: of_file(path, kind) for kind in file.digests}
    told = {"size": str(file.size_bytes)} | dict(file.digests)
    wrong = [kind for kind in told if found[kind] != told[kind]]
    if wrong:
        raise AdapterError(
            adapter,
            f"{file.url} whose {wrong[0]} is {found[wrong[0]]}",
            f"{told[wrong[0]]}, as its store says",
            "It was damaged on its way, or written meanwhile. Load it again.",
        )


class _Progress:
    """Tells the log how far a download is, now and then."""

    def __init__(self, adapter: str, url: str, size_bytes: int) -> None:
        self._what = f"adapter {adapter!r}: {url}"
        self._size, self._came = size_bytes, 0
        self._started = self._told = time.monotonic()
        logger.info("%s: fetching %.1f MiB", self._what, size_bytes / 2**20)

    def came(self, size_bytes: int) -> None:
        self._came += size_bytes
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            share = 100 * self._came / max(1, self._size)
            logger.info("%s: %.0f %% of %.1f MiB", self._what, share, self._size / 2**20)

    def done(self) -> None:
        logger.info("%s: here after %.1f s", self._what, time.monotonic() - self._started)
