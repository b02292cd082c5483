"""Reads the tenants' file: who has which key, which adapters and which limits (docs/tenancy.md)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

OPERATOR = "(operator)"  # who is no tenant, where usage is told
_HASHED = "sha256:"
_HASH_DIGITS = 64
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be asked for; None is no limit.

    requests_per_minute  prompts, times the answers that each shall have
    tokens_per_minute    tokens of prompts and generated ones
    concurrent_requests  prompts, times the answers that each shall have, that are waiting or running
    share_of_slots       share of the KV cache's slots that these may come to need, answers at their longest
    """

    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    concurrent_requests: AtLeastOne | None = None
    share_of_slots: Share | None = None


NO_LIMITS = Limits()


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who asks with one of ``keys``.

    name      what logs, metrics and messages call it
    keys      each as it is sent, or "sha256:" and the hexadecimal sha256 of that
    adapters  names; with a * at the end, all names that begin so
    limits    of all that it asks for together, the base model's answers too
    """

    name: str
    keys: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    adapters: tuple[str, ...] = ()
    limits: Limits = NO_LIMITS

    def may_use(self, adapter: str) -> bool:
        """Whether it may know and name ``adapter``."""
        return any(_matches(pattern, adapter) for pattern in self.adapters)


class AdapterLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of each adapter that ``name`` matches, as those of a tenant are matched, whoever asks for it."""

    name: str
    limits: Limits


class Tenants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds. ``ValueError`` where it contradicts itself.

    adapters  the first that matches a name counts
    """

    tenants: tuple[Tenant, ...] = ()
    adapters: tuple[AdapterLimits, ...] = ()

    def __post_init__(self) -> None:
        for what, found in (
            ("tenants", [tenant.name for tenant in self.tenants]),
            ("adapters", [one.name for one in self.adapters]),
        ):
            wrong = [name for name in found if not name.strip() or not name.isprintable() or name.startswith("(")]
            if wrong:
                raise ValueError(f"{what} have the name {wrong[0]!a}: give printable text that does not begin with (")
            if (twice := _twice(found)) is not None:
                raise ValueError(f"two of {what} have the name {twice!r}: give one")
        for tenant in self.tenants:
            for i, key in enumerate(tenant.keys):
                if (problem := _problem_of_key(key)) is not None:
                    raise ValueError(f"tenant {tenant.name!r}: keys[{i}] {problem}")
        hashes = [(_hash_of(key), tenant.name) for tenant in self.tenants for key in tenant.keys]
        if (twice := _twice(key for key, _ in hashes)) is not None:
            names = sorted(name for key, name in hashes if key == twice)
            raise ValueError(f"a key of tenant {names[0]!r} is given twice, also to {names[1]!r}: give each its own")

    def refuse_keys(self, keys: Mapping[str, str | None]) -> None:
        """``ValueError`` where a tenant has one of the operator's ``keys``: flag -> key, None where there is none."""
        of_tenants = self.by_hash()
        for flag, key in keys.items():
            tenant = of_tenants.get(key_hash(key)) if key else None
            if tenant is not None:
                raise ValueError(f"gives tenant {tenant.name!r} the key of {flag}, which is the operator's")

    def by_hash(self) -> dict[str, Tenant]:
        """Hexadecimal sha256 of a key -> whose it is."""
        return {_hash_of(key): tenant for tenant in self.tenants for key in tenant.keys}

    def limits_of_adapter(self, adapter: str) -> Limits:
        """The limits of an adapter, whoever asks for it."""
        return next((one.limits for one in self.adapters if _matches(one.name, adapter)), NO_LIMITS)


def key_hash(key: str) -> str:
    """What is known of a key here: the hexadecimal sha256 of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read(path: str | Path) -> Tenants:
    """What the file at ``path`` holds, TOML or JSON by its ending. ``ValueError`` saying what is wrong, and no key."""
    decoders = {".toml": msgspec.toml.decode, ".json": msgspec.json.decode}
    decode: Any = decoders.get(Path(path).suffix)
    if decode is None:
        raise ValueError("is neither a .toml nor a .json file")
    try:
        tenants: Tenants = decode(Path(path).read_bytes(), type=Tenants)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"is no tenants' file: {error}") from None
    return tenants


def tenants_file(path: str) -> str:
    """Where the file at ``path`` is, for any working directory. ``ValueError`` unless ``read`` reads it."""
    read(path)
    return str(Path(path).resolve())


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _problem_of_key(key: str) -> str | None:
    if key.startswith(_HASHED):
        digits = key.removeprefix(_HASHED)
        is_hash = len(digits) == _HASH_DIGITS and set(digits.lower()) <= set("0123456789abcdef")
        return None if is_hash else f"is {_HASHED} without {_HASH_DIGITS} hexadecimal digits"
    # What a client can send after "Bearer", and what headers keep as it is.
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        return "is empty, or has spaces at its ends or characters that are not printable ASCII"
    return None


def _hash_of(key: str) -> str:
    return key.removeprefix(_HASHED).lower() if key.startswith(_HASHED) else key_hash(key)


def _twice(values: Iterable[str]) -> str | None:
    """The first that is there twice."""
    return next((value for value, times in Counter(values).items() if times > 1), None)
