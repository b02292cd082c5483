"""Tells URLs of adapters from folders, in one spelling each, so that one lies below another or does not."""

from __future__ import annotations

import re
from collections.abc import Iterable

import fsspec

from sglang_blocklora.flags import folder

# What would let one adapter be written in two ways, lead out of a prefix, chain file systems, or carry a secret.
_NEVER = ("%", "?", "#", "\\", "::")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_REVISION = re.compile(r"@[^/]*")
# Package of a protocol -> our extra that brings it. Others are installed by their own names.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class BadURL(ValueError):
    """No adapter can have this URL; the message says why."""


def is_url(path: str) -> bool:
    """Whether ``path`` is a URL and not a folder."""
    return _SCHEME.match(path) is not None


def protocol_of(url: str) -> str:
    """``s3`` of ``s3://bucket/adapter``."""
    return url.partition("://")[0]


def located(path: str) -> str:
    """``path`` in its one spelling: ``file://`` becomes a folder, a folder stays as it is. Raises ``BadURL``."""
    match = _SCHEME.match(path)
    if match is None:
        return path
    protocol, rest = match[1].lower(), match[2]
    if protocol == "file":
        return rest
    found = [part for part in _NEVER if part in rest]
    if found:
        raise BadURL(f"{path!a} holds {found[0]!r}, which a URL of adapters may not")
    parts = rest.removesuffix("/").split("/")
    if not all(parts) or {".", ".."} & set(parts):
        raise BadURL(f"{path!a} has a part that is empty or made of dots")
    if not rest.isprintable() or " " in rest or any("\ud800" <= letter <= "\udfff" for letter in rest):
        raise BadURL(f"{path!a} holds a character that a URL may not")
    if protocol != "hf" and "@" in parts[0]:
        raise BadURL("a URL of adapters may not hold a user's name or password: they come from the environment")
    return f"{protocol}://{'/'.join(parts)}"


def is_below(url: str, roots: Iterable[str]) -> bool:
    """Whether ``url`` is one of ``roots`` or lies below it, part by part. All are ``located``.

    A root of the Hub without a revision has all revisions below it; one with a revision, only that.
    """
    spellings = {url, _REVISION.sub("", url, count=1)} if protocol_of(url) == "hf" else {url}
    return any(f"{one}/".startswith(f"{root}/") for one in spellings for root in roots)


def place(text: str) -> str:
    """A flag's value: a folder, or a URL of a store that can be read here. ``ValueError`` saying what is wrong."""
    where = located(text)
    if not is_url(where):
        return folder(where)
    protocol = protocol_of(where)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = f"pip install 'sglang-blocklora[{extra}]'" if extra else "install it"
        raise ValueError(f"needs a package that is not installed ({error}): {advice}") from None
    except ValueError:
        raise ValueError(f"has a protocol, {protocol!r}, that fsspec does not know") from None
    return where
