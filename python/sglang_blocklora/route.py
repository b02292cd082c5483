"""Puts one OpenAI-compatible address before several servers: ``python -m sglang_blocklora.route``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from aiohttp import web

from sglang_blocklora import flags
from sglang_blocklora.fleet.front import application
from sglang_blocklora.fleet.settings import RouteSettings

DESCRIPTION = """One OpenAI-compatible address before several servers of the same base model. A request goes to the
server where its adapter is; where that one is gone, to another. docs/routers.md"""


def parse(argv: Sequence[str]) -> RouteSettings:
    """What the command line asks for. ``SystemExit`` with a message where it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m sglang_blocklora.route", description=DESCRIPTION)
    flags.add_arguments(parser.add_argument_group("flags"), RouteSettings)
    return flags.from_arguments(parser.parse_args(argv), RouteSettings)


def main(argv: Sequence[str]) -> None:
    """Serve until a signal; what is being answered then has a minute to come to its end."""
    settings = parse(argv)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    web.run_app(
        application(settings),
        host=settings.host,
        port=settings.port,
        access_log=None,
        handler_cancellation=True,  # a client that goes away ends its request on the replica
        print=lambda *_: logging.info("Listening on http://%s:%d", settings.host, settings.port),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
