"""Real stores of adapters on this machine: an S3 server, a Hub that huggingface_hub talks to, a plain web server."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sglang_blocklora.sources.cache import FolderCache
from sglang_blocklora.sources.fetch import fetch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GIB = 2**30
S3_ACCESS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
DIRECTLY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@dataclass(frozen=True)
class Store:
    """Adapters below ``url``; ``environment`` is what its clients need, ``put(name, folder)`` copies one there."""

    url: str
    environment: Mapping[str, str]
    put: Callable[[str, Path], None]

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the clients of this process ask it."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)


@contextmanager
def s3_store() -> Iterator[Store]:
    """moto's S3 server with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket="models")

        def put(name: str, folder: Path) -> None:
            for file in folder.iterdir():
                client.upload_file(str(file), "models", f"adapters/{name}/{file.name}")

        yield Store("s3://models/adapters", {"AWS_ENDPOINT_URL": endpoint, **S3_ACCESS, **DIRECTLY}, put)
    finally:
        server.stop()


@dataclass
class Faults:
    """What a web server does wrong, for files whose path ends with a key.

    cuts     how many answers break off after half of their bytes
    damaged  whose last byte is another one
    status   answered instead
    asked    (path, Range or None) of each GET, as they came
    pause    waited for in the middle of each file that is cut or not
    """

    cuts: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    pause: Callable[[], Any] = lambda: None
    ranges: bool = True


class _Files(BaseHTTPRequestHandler):
    """Files of ``root`` with ETags and ranges, folders as pages of links."""

    protocol_version = "HTTP/1.1"
    root: Path
    faults: Faults
    etags = True

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self.faults.asked.append((self.path, self.headers.get("Range")))
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        self.serve(self.root / self.path.split("?")[0].strip("/"), head)

    def serve(self, path: Path, head: bool) -> None:
        status = next((code for end, code in self.faults.status.items() if self.path.endswith(end)), None)
        if status is not None or not path.exists():
            self.say(status or 404, b"no", head=head)
        elif path.is_dir():
            links = "".join(f'<a href="{one.name}{"/" * one.is_dir()}">x</a>' for one in sorted(path.iterdir()))
            self.say(200, links.encode(), {"Content-Type": "text/html"}, head)
        else:
            self._file(path, head)

    def _file(self, path: Path, head: bool) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if self.etags else {}
        headers |= self.more_headers(data)
        if path.name in self.faults.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked, status = self.headers.get("Range"), 200
        if asked and self.faults.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            whole, status = len(data), 206
            data = data[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
        self.say(status, data, headers, head, cut=not head and self._is_cut(path.name))

    def more_headers(self, data: bytes) -> dict[str, str]:
        return {"Accept-Ranges": "bytes"} if self.faults.ranges else {}

    def _is_cut(self, name: str) -> bool:
        left = self.faults.cuts.get(name, 0)
        self.faults.cuts[name] = max(0, left - 1)
        return left > 0

    def say(
        self, status: int, data: bytes, headers: Mapping[str, str] | None = None, head: bool = False, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            with suppress(ConnectionError):  # a client that saw enough
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if len(data) > 1000:
                    self.faults.pause()
                if cut:
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.wfile.write(data[len(data) // 2 :])
                return
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Nothing: a test reads what it wants to know off ``Faults.asked``."""


class _Hub(_Files):
    """The part of the Hub's API by which files of a repository are listed and read.

    A folder of ``root`` is the repository ``team/FOLDER``, of one revision.
    """

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        repository, path = self._api()
        paths = body["paths"] if isinstance(body["paths"], list) else [body["paths"]]
        found = [self._entry(repository, repository / one) for one in paths if (repository / one).exists()]
        self._tell(found if path == "paths-info" else None)

    def _answer(self, head: bool) -> None:
        if self.path.startswith("/api/models/"):
            repository, path = self._api()
            if not repository.is_dir():
                self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"}, head)
            elif path == "tree":
                self._tell([self._entry(repository, one) for one in sorted(repository.iterdir())])
            else:
                self._tell({"id": f"team/{repository.name}", "sha": "1" * 40, "siblings": []})
            return
        parts = self.path.split("?")[0].split("/")  # "", team, NAME, "resolve", "main", path in the repository
        if parts[1] == "team" and parts[3:5] == ["resolve", "main"]:
            self.serve(self.root / parts[2] / "/".join(parts[5:]), head)
        else:
            self.say(404, b"{}", head=head)

    def _api(self) -> tuple[Path, str]:
        """The folder of the repository, and what is asked about it."""
        parts = self.path.split("?")[0].split("/")  # "", api, models, team, NAME, what, ...
        return self.root / parts[4], parts[5] if len(parts) > 5 else ""

    def _entry(self, repository: Path, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        found = {"type": "file", "path": str(file.relative_to(repository)), "size": len(data), "oid": git}
        if file.suffix == ".safetensors":
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found

    def _tell(self, value: Any) -> None:
        self.say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def more_headers(self, data: bytes) -> dict[str, str]:
        return super().more_headers(data) | {"X-Repo-Commit": "1" * 40}


@contextmanager
def web_store(root: Path, faults: Faults | None = None, **attributes: Any) -> Iterator[Store]:
    """A web server for the files below ``root``."""
    with _serving(_Files, root, faults, attributes) as address:
        yield Store(address, DIRECTLY, _copier(root))


@contextmanager
def hub_store(root: Path, faults: Faults | None = None) -> Iterator[Store]:
    """A Hub whose repositories are the folders of ``root``."""
    with _serving(_Hub, root, faults, {}) as address:
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **DIRECTLY}
        yield Store("hf://team", environment, _copier(root))


def _copier(root: Path) -> Callable[[str, Path], None]:
    return lambda name, folder: (shutil.copytree(folder, root / name, dirs_exist_ok=True), None)[1]


@contextmanager
def _serving(kind: type[_Files], root: Path, faults: Faults | None, attributes: Mapping[str, Any]) -> Iterator[str]:
    handler = type("Handler", (kind,), {"root": root, "faults": faults or Faults(), **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def adapter(folder: Path, weights: bytes = b"w" * 5000, **others: bytes) -> Path:
    """Write what looks like an adapter from outside, with other files (``a__b`` is called ``a.b``)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"r": 4}))
    (folder / WEIGHTS).write_bytes(weights)
    for name, data in others.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Contents of a fetched adapter's files by name."""
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name != ".lock"}


def whole(cache: FolderCache) -> list[str]:
    """What is in the cache."""
    return sorted(one.name for one in cache.root.iterdir()) if cache.root.exists() else []


def get(url: str, cache: FolderCache, stop: threading.Event | None = None) -> Path:
    """Fetch an adapter that nobody holds afterwards."""
    held = fetch("sql", url, cache, stop or threading.Event())
    held.release()
    return held.folder
