"""A plugin that fails is logged, and SGLang serves without what it was to change."""

from __future__ import annotations

import logging
from unittest import mock


def broken() -> None:
    raise RuntimeError("this plugin does not fit this release")


def fault() -> str | None:
    from sglang.srt import plugins

    logging.disable(logging.CRITICAL)
    found = {"broken": (broken, "a-distribution")}
    with (
        mock.patch.object(plugins, "load_plugins_by_group", return_value=found),
        mock.patch.object(plugins, "_plugins_loaded", False),
    ):
        try:
            plugins.load_plugins()
        except Exception:
            return None
    return "load_plugins() returns as if nothing had happened"


if __name__ == "__main__":
    print(fault() or "mended")
