"""The flags of ``python -m sglang_blocklora.route``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from sglang_blocklora.flags import Flag, check


def base_url(text: str) -> str:
    """The address of a server, without a slash at its end. ``ValueError`` where it is none."""
    scheme, _, rest = text.partition("://")
    address = rest.rstrip("/")
    if scheme not in ("http", "https") or not address or set(address) & set("/?#@ "):
        raise ValueError("is not the address of a server, as http://HOST:PORT")
    return f"{scheme}://{address}"


class RouteSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a front was asked for. ``ValueError`` naming the flags whose values cannot be."""

    replica: Annotated[
        tuple[str, ...],
        Flag(
            help="address of a server, whose text decides which adapters it gets",
            metavar="URL",
            parse=base_url,
            told="required",
        ),
    ] = ()
    host: Annotated[str, Flag(help="where to listen", metavar="HOST")] = "127.0.0.1"
    port: Annotated[int, Flag(help="where to listen", at_least=0)] = 30000
    api_key: Annotated[
        str | None,
        Flag(
            help="the replicas' --api-key, for what the front asks by itself; clients send their own",
            metavar="KEY",
            told="none",
        ),
    ] = None
    admin_api_key: Annotated[
        str | None, Flag(help="the replicas' --admin-api-key, where they have one", metavar="KEY", told="--api-key")
    ] = None
    check_seconds: Annotated[float, Flag(help="seconds between two checks of a replica's health", above=0)] = 2.0

    def __post_init__(self) -> None:
        check(self)
        if not self.replica:
            raise ValueError("--replica is missing: give the address of each server")
        if len(set(self.replica)) < len(self.replica):
            raise ValueError(f"--replica names one twice: {' '.join(self.replica)}")

    @property
    def managing_key(self) -> str | None:
        """The key that loads need."""
        return self.admin_api_key or self.api_key
