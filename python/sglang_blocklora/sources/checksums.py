"""What a store tells of a file's bytes, and whether they came as they are there."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_blocklora.sources.urls import protocol_of

# Algorithm of git's object ids: sha1 behind a header that holds the size.
GIT = "git"
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def told(file_system: Any, url: str, info: Mapping[str, Any]) -> dict[str, str]:
    """Algorithm -> digest in hex of what lies at ``url``, whose entry in a listing is ``info``; empty where none is."""
    protocol = protocol_of(url)
    if protocol == "hf":
        return _of_the_hub(info)
    if protocol in ("s3", "s3a"):
        bucket, _, key = url.partition("://")[2].partition("/")
        return _of_s3(file_system.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"))
    md5 = info.get("Content-MD5") or info.get("md5Hash")  # of HTTP, of Google's store
    return {"md5": base64.b64decode(md5).hex()} if md5 else {}


def _of_the_hub(info: Mapping[str, Any]) -> dict[str, str]:
    large = info.get("lfs")
    if large is None:
        return {GIT: info["blob_id"]} if info.get("blob_id") else {}
    return {"sha256": large["sha256"]}


def _of_s3(head: Mapping[str, Any]) -> dict[str, str]:
    """An object in several parts has checksums of these, with a dash, and one under a key of KMS a random ETag."""
    found = {}
    sha256, etag = head.get("ChecksumSHA256", ""), _MD5.fullmatch(head.get("ETag", ""))
    if sha256 and "-" not in sha256:
        found["sha256"] = base64.b64decode(sha256).hex()
    if etag and head.get("ServerSideEncryption") in (None, "AES256"):
        found["md5"] = etag[1]
    return found


def of_file(path: Path, algorithm: str) -> str:
    """The digest in hex of the file at ``path``. Raises ``OSError``."""
    with path.open("rb") as file:
        if algorithm != GIT:
            return hashlib.file_digest(file, algorithm).hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        while piece := file.read(2**20):
            digest.update(piece)
        return digest.hexdigest()
