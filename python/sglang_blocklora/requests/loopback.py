"""Tells whether a server is reached from its own machine only."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str | None) -> bool:
    """Whether a server that listens on ``host`` is reached from its own machine only. Unsure is no."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:  # a name: it may mean any address
        return False
