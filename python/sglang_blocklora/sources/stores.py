"""Asks the stores that URLs lie in: which files an adapter has there, and which adapters lie below a URL."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import fsspec

from sglang_blocklora.adapters.checkpoint import PICKLE_NAME, WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME
from sglang_blocklora.adapters.errors import AdapterError, brief
from sglang_blocklora.adapters.tokenizer_files import TOKEN_FILES
from sglang_blocklora.naming.folders import NotReadable
from sglang_blocklora.sources.checksums import told
from sglang_blocklora.sources.urls import BadURL, located, protocol_of

logger = logging.getLogger(__name__)

# All that is ever fetched: what a load reads, as PEFT and transformers name it.
REQUIRED = (CONFIG_NAME, WEIGHTS_NAME)
FETCHED = (*REQUIRED, *TOKEN_FILES, "chat_template.json")
# What a store may tell of a file that differs once other bytes are in its place.
_STAMPS = ("size", "ETag", "etag", "blob_id", "xet_hash", "md5Hash", "generation", "VersionId")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "mtime", "updated")
CONNECT_SECONDS, SILENT_SECONDS = 10, 30
LISTED_SECONDS = 10.0  # for which a listing of names is told again


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of an adapter, as its store tells of it.

    stamp    another one once the file holds other bytes; None: the store tells nothing of the kind
    digests  algorithm -> what it must come to, in hex
    """

    name: str
    url: str
    size_bytes: int
    stamp: str | None
    digests: Mapping[str, str]


class Unreachable(OSError):
    """A store did not answer a question about a URL."""


def file_system(url: str) -> Any:
    """fsspec's file system of ``url``, with credentials from where its own tools look for them; nothing is cached."""
    protocol = protocol_of(url)
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
    if protocol in ("http", "https"):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # proxies, and passwords of .netrc
    if protocol != "hf":  # which asks twice where it may not remember
        options["use_listings_cache"] = False
    made = fsspec.filesystem(protocol, **options)
    made.invalidate_cache()
    return made


def files_of(adapter: str, url: str) -> list[RemoteFile]:
    """The files to fetch of the adapter at ``url``. Raises ``AdapterError``, also where one is not there."""
    with _refusals(adapter, url):
        store = file_system(url)
        entries = _entries(store, url)
        for name in REQUIRED:
            if name not in entries:
                raise _missing(adapter, url, name, entries)
        return [_remote(adapter, store, f"{url}/{name}", entries[name]) for name in FETCHED if name in entries]


def _entries(store: Any, url: str) -> dict[str, Mapping[str, Any]]:
    """Name -> what the store tells of it, of all files directly below ``url``, or of those that are asked for."""
    if protocol_of(url) not in ("http", "https"):
        try:
            listed = store.ls(url, detail=True)
            return {one["name"].rpartition("/")[2]: one for one in listed if one["type"] == "file"}
        except PermissionError:
            logger.info("%s may not be listed: its files are asked for one by one", url)
    return {name: info for name in (*FETCHED, PICKLE_NAME) if (info := _info(store, f"{url}/{name}")) is not None}


def _info(store: Any, url: str) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = store.info(url)
        return found
    except FileNotFoundError as error:
        meant = as_meant(error)
        if meant is not error:
            raise meant from error
        return None
    except PermissionError:
        if url.endswith(REQUIRED):
            raise
        return None  # S3 says so of files that are not there, to who may not list


def as_meant(error: Exception) -> Exception:
    """What a store's client says, where it says something else: fsspec calls everything over HTTP not found."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, aiohttp.ClientError | TimeoutError):
        return error
    status = getattr(cause, "status", None)
    if status in (404, 410):
        return error
    return PermissionError(f"status {status}") if status in (401, 403, 407) else Unreachable(str(cause))


def _remote(adapter: str, store: Any, url: str, info: Mapping[str, Any]) -> RemoteFile:
    if info.get("size") is None:
        raise AdapterError(
            adapter, f"{url} whose size the server does not tell", "a Content-Length", "Serve it as a plain file."
        )
    stamps = {key: str(info[key]) for key in (*_STAMPS, *_TIMES) if info.get(key) is not None}
    return RemoteFile(
        name=url.rpartition("/")[2],
        url=url,
        size_bytes=int(info["size"]),
        stamp=json.dumps(stamps, sort_keys=True) if stamps.keys() - {"size"} else None,
        digests=told(store, url, info),
    )


def _missing(adapter: str, url: str, name: str, entries: Mapping[str, Any]) -> AdapterError:
    if name == WEIGHTS_NAME and PICKLE_NAME in entries:
        return AdapterError(
            adapter,
            f"only {PICKLE_NAME} in {url}",
            f"{WEIGHTS_NAME} (unpickling a .bin file can run any code in it)",
            "Load it where you trust it with PEFT and save_pretrained(..., safe_serialization=True).",
        )
    return AdapterError(
        adapter, f"no {name} in {url}", "a PEFT adapter folder", "Give the URL of the adapter's folder."
    )


@contextmanager
def _refusals(adapter: str, url: str) -> Iterator[None]:
    """Everything that a store's client raises, as a refusal that says what the store said."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:  # each client has exceptions of its own
        raise refusal(adapter, url, error) from error


def refusal(adapter: str, url: str, error: Exception) -> AdapterError:
    """What to say where a store's client raised ``error``."""
    if isinstance(error, FileNotFoundError):
        return AdapterError(
            adapter, f"nothing at {url}", "a PEFT adapter folder", "Check the URL, its revision and who may read it."
        )
    if isinstance(error, PermissionError) or "credentials" in type(error).__name__.lower():
        return AdapterError(
            adapter,
            f"{url} that is not readable for this server ({said(error)})",
            "files that its credentials may read",
            "They come from the server's environment, as for the store's own tools (docs/sources.md).",
        )
    return AdapterError(
        adapter, f"{url} that cannot be read ({said(error)})", "a store that answers", "Try again once it does."
    )


def said(error: Exception) -> str:
    """An exception of somebody else's, in one short line."""
    return brief(str(error) or type(error).__name__)[1:-1]


class Stores:
    """The adapters below URLs: each is what lies directly below one, and the first that has it wins. For any thread."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = tuple(roots)
        self._listed: dict[str, tuple[float, list[str]]] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> str | None:
        """The URL that ``name`` is, or None. Raises ``NotReadable`` where a store does not tell."""
        for root in self.roots:
            url = _below(root, name)
            if url is None:
                continue
            try:
                if _info(file_system(url), f"{url}/{CONFIG_NAME}") is not None:
                    return url
            except Exception as error:  # each client has exceptions of its own
                raise NotReadable(f"{root} does not tell whether it is there ({said(error)}).") from error
        return None

    def all(self) -> dict[str, str]:
        """Every name that could be one and its URL, by name, as the stores listed them at most 10 s ago.

        What lies below a name is not looked at. A store that cannot be listed has none.
        """
        found: dict[str, str] = {}
        for root in reversed(self.roots):
            found |= {name: url for name in self._names(root) if (url := _below(root, name)) is not None}
        return dict(sorted(found.items()))

    def _names(self, root: str) -> list[str]:
        asked_at, names = self._listed.get(root, (float("-inf"), []))
        if time.monotonic() - asked_at <= LISTED_SECONDS or not self._lock.acquire(blocking=False):
            return names  # as they were, while somebody else asks: a store that hangs holds one thread
        try:
            names = _folders_below(root)
            self._listed[root] = (time.monotonic(), names)
            return names
        finally:
            self._lock.release()


def _folders_below(root: str) -> list[str]:
    try:
        entries = file_system(root).ls(f"{root}/" if root.startswith("http") else root, detail=True)
    except Exception as error:  # each client has exceptions of its own
        logger.warning("%s cannot be listed (%s): adapters in it are found by their names only", root, said(error))
        return []
    return [one["name"].rstrip("/").rpartition("/")[2] for one in entries if one["type"] == "directory"]


def _below(root: str, name: str) -> str | None:
    """The URL of ``name`` directly below ``root``, or None where no adapter can be called so there."""
    if not name or name.startswith(".") or "/" in name or "@" in name:
        return None
    try:
        return located(f"{root}/{name}")
    except BadURL:
        return None
